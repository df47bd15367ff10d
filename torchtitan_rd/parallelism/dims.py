"""How the ranks are laid out: replicas x shards.
The one place that checks degrees against the number of ranks.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import ConfigError


class ParallelismConfig(Section):
    data_parallel_replicate_degree: int = Field(1, ge=-1)
    """Copies of the sharded model (HSDP); gradients are all-reduced between them. 1: plain FSDP.
    -1: as many as the ranks make at the given shard degree, so that one config serves any number of nodes.
    """
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    """Ranks that one copy of the model is sharded over (FSDP2). -1: all ranks that are left.
    At most one of the two degrees may be -1.
    """
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free the gathered parameters after forward. default: yes, but for the last unit, which backward
    needs at once, and for a unit that forward runs several times (the core of a raven) if its gathered
    parameters are at most 4 GiB: it is needed again as soon as the few units behind it are done. always,
    never: without exception.
    """
    fsdp_prefetch_units: int = Field(1, ge=1)
    """How many units of FSDP (blocks, embedding, head) are gathered ahead of the one that computes, in
    forward and in backward. 1: the next one alone. More hides gathers that take longer than a unit
    computes, and holds as many more gathered units.
    """
    reduce_each_microbatch: bool = True
    """Sum gradients over the ranks in every microbatch of a step. false: in the last one alone, which saves
    a reduce-scatter of all gradients in each other one; until then each rank holds its own gradients of all
    parameters, 4 bytes a parameter (2 with training.mixed_precision_reduce = "bfloat16"). With
    fsdp_reshard_after_forward = "never" the parameters stay gathered from microbatch to microbatch too.
    """
    all_reduce_chunk_mb: int = Field(0, ge=0)
    """With copies of the model (HSDP): sum the gradients over the copies when backward is over, in messages
    of so many MiB, one after the other, of which each may hold several parameters. For networks that hang
    on large or concurrent all-reduces; nothing of it overlaps backward. 0: by FSDP2, a message a unit, during
    backward.
    """


@dataclass(frozen=True)
class ParallelDims:
    """Degrees that multiply to the number of ranks.

    Tensor and context parallelism would each be one more field here and one more mesh dimension
    after `dp_shard`; ranks of one such group share their data, which is why `data_degree` is not
    simply the world size.
    """

    replicate: int
    shard: int

    @classmethod
    def resolve(cls, config: ParallelismConfig, world_size: int) -> "ParallelDims":
        """Fills -1 and checks the product. Raises ConfigError naming the keys."""
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
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

        if shard == -1:
            shard = world_size // replicate
        if replicate == -1:
            replicate = world_size // shard
        if replicate * shard != world_size:
            raise ConfigError(
                f"[parallelism] data_parallel_replicate_degree ({replicate}) x "
                f"data_parallel_shard_degree ({shard}) is {replicate * shard}, "
                f"but {world_size} ranks were started: change a degree or the number of ranks"
            )
        return cls(replicate, shard)

    @property
    def data_degree(self) -> int:
        """The number of ranks that read different data."""
        return self.replicate * self.shard

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh that FSDP2 takes: 1-D (`dp_shard`), or 2-D (`dp_replicate`, `dp_shard`) for HSDP."""
        if self.replicate == 1:
            return init_device_mesh(device_type, (self.shard,), mesh_dim_names=("dp_shard",))
        return init_device_mesh(
            device_type, (self.replicate, self.shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
