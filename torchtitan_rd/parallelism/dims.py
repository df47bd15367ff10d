"""How the ranks are laid out: replicas x shards x parts of the sequence x parts of the matrices.
The one place that checks degrees against the number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import AttentionShape

T = TypeVar("T")

# Degrees that have their place in the mesh, and no more.
NOT_YET = ("tensor",)


class ParallelismConfig(Section):
    data_parallel_replicate_degree: int = Field(1, ge=-1)
    """Copies of the sharded model (HSDP); gradients are all-reduced between them. 1: plain FSDP.
    -1: as many as the ranks make at the given shard degree, so that one config serves any number of nodes.
    """
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    """Ranks that one copy of the model is sharded over (FSDP2), each with rows of its own. -1: all ranks that
    are left. At most one of the two degrees may be -1.
    """
    context_parallel_degree: int = Field(1, ge=1)
    """Ranks that share each sequence, a part of its tokens each (docs/parallelism.md). The model is sharded
    over them too. Must divide training.seq_len and the attention heads.
    """
    tensor_parallel_degree: int = Field(1, ge=1)
    """Ranks that share each matrix, a part of its heads or hidden units each (docs/parallelism.md)."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free the gathered parameters after forward. default: yes, but for the last unit, which backward
    needs at once, and for a unit that forward runs several times (the core of a raven) if its gathered
    parameters are at most 4 GiB: it is needed again as soon as the few units behind it are done. always,
    never: without exception.
    """


@dataclass(frozen=True)
class ParallelDims:
    """Degrees that multiply to the number of ranks.

    replicate, shard: copies of the model, and the ranks of one copy that read rows of their own.
    context, tensor: ranks that share the same rows, neighbours by their number. A rank is numbered
        ((replica * shard + shard's) * context + context's) * tensor + tensor's.
    """

    replicate: int
    shard: int
    context: int = 1
    tensor: int = 1

    @classmethod
    def resolve(cls, config: ParallelismConfig, world_size: int) -> "ParallelDims":
        """Fills -1 and checks the product. Raises ConfigError naming the keys."""
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
        context, tensor = config.context_parallel_degree, config.tensor_parallel_degree
        for name, degree in (("replicate", replicate), ("shard", shard)):
            if degree == 0:
                raise ConfigError(
                    f"[parallelism] data_parallel_{name}_degree = 0: "
                    "use -1 (what is left) or a positive degree"
                )
        if replicate == shard == -1:
            raise ConfigError(
                "[parallelism] data_parallel_replicate_degree and data_parallel_shard_degree are both -1 "
                "(what is left): set the ranks of one copy in data_parallel_shard_degree, "
                "such as the GPUs of a node"
            )
        for name, degree in (("context", context), ("tensor", tensor)):
            if degree > 1 and name in NOT_YET:
                raise ConfigError(f"[parallelism] {name}_parallel_degree = {degree}: not yet; use 1")

        # What is left is at least 1, so that the sum below says what does not fit.
        if shard == -1:
            shard = max(world_size // (replicate * context * tensor), 1)
        if replicate == -1:
            replicate = max(world_size // (shard * context * tensor), 1)
        degrees = {
            "data_parallel_replicate_degree": replicate,
            "data_parallel_shard_degree": shard,
            "context_parallel_degree": context,
            "tensor_parallel_degree": tensor,
        }
        if replicate * shard * context * tensor != world_size:
            product = " x ".join(
                f"{key} ({degree})" for key, degree in degrees.items() if degree > 1 or key.startswith("data")
            )
            raise ConfigError(
                f"[parallelism] {product} is {replicate * shard * context * tensor}, "
                f"but {world_size} ranks were started: change a degree or the number of ranks"
            )
        return cls(replicate, shard, context, tensor)

    def check(self, heads: AttentionShape, seq_len: int) -> None:
        """Raises ConfigError if the sequence or the heads cannot be shared by so many ranks.
        heads: of the whole model.
        """
        problems = []
        if seq_len % self.context:
            problems.append(
                f"[parallelism] context_parallel_degree = {self.context} does not divide "
                f"training.seq_len = {seq_len}: change one of them"
            )
        shared = heads.n_heads // self.tensor
        if shared % self.context:
            works = [str(n) for n in range(1, shared + 1) if shared % n == 0]
            of_whom = "the model" if self.tensor == 1 else "each tensor-parallel rank"
            problems.append(
                f"[parallelism] context_parallel_degree = {self.context} does not divide the {shared} "
                f"attention heads of {of_whom}: use one of {', '.join(works)}"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def heads_in_kernel(self, heads: AttentionShape) -> AttentionShape:
        """Of the model's `heads`, those that one rank's attention kernel is given, copies included."""
        n_heads, n_kv_heads = heads.n_heads // self.tensor, heads.n_kv_heads // self.tensor
        copies = self.context // math.gcd(self.context, n_kv_heads)
        return heads._replace(n_heads=n_heads // self.context, n_kv_heads=n_kv_heads * copies // self.context)

    @property
    def world_size(self) -> int:
        return self.data_degree * self.ranks_per_row

    @property
    def data_degree(self) -> int:
        """The number of ranks that read different data."""
        return self.replicate * self.shard

    @property
    def ranks_per_row(self) -> int:
        """The number of ranks that read the same data."""
        return self.context * self.tensor

    def data_rank(self, rank: int) -> int:
        """Which of the `data_degree` readers `rank` is."""
        return rank // self.ranks_per_row

    def positions(self, rank: int, seq_len: int) -> range:
        """Those of each row whose tokens `rank` computes."""
        part = rank // self.tensor % self.context
        length = seq_len // self.context
        return range(part * length, (part + 1) * length)

    def one_per_row(self, of_all_ranks: Sequence[T]) -> Sequence[T]:
        """What each rank has -> what each data rank has, where ranks of one row have the same."""
        return of_all_ranks[:: self.ranks_per_row]

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """A dimension for each degree above 1 (`dp_replicate`, `dp_shard`, `context`, `tensor`),
        and `dp_shard` always.
        """
        degrees = {
            "dp_replicate": self.replicate,
            "dp_shard": self.shard,
            "context": self.context,
            "tensor": self.tensor,
        }
        sizes = {name: size for name, size in degrees.items() if size > 1 or name == "dp_shard"}
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        sharding_mesh(mesh)  # which makes its group, while all ranks are here
        return mesh


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of `build_mesh` that FSDP2 takes: 1-D, or 2-D with copies of the model (HSDP).

    The ranks that share a sequence hold different shards: so their gradients, each of other tokens, are
    summed with those of other rows.
    """
    names = mesh.mesh_dim_names or ()
    shard = mesh["dp_shard"]
    if "context" in names:
        shard = mesh["dp_shard", "context"]._flatten("dp_shard_context")  # the same one each time
    if "dp_replicate" not in names:
        return shard
    return DeviceMesh._concatenate([mesh["dp_replicate"], shard])


def groups_of(mesh: DeviceMesh) -> dict[str, dist.ProcessGroup]:
    """The groups of this rank in a `build_mesh`, by the names of their dimensions."""
    groups = {name: mesh.get_group(name) for name in mesh.mesh_dim_names or ()}
    if "context" in groups:
        groups["dp_shard_context"] = sharding_mesh(mesh).get_group("dp_shard_context")
    return groups
