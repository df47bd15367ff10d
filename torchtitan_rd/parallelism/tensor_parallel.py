"""Tensor parallelism: the ranks of a group share each matrix, and the tokens between the matrices.

Attention is shared by heads, the feed-forward by hidden units, embedding and head by ids of the vocabulary
(arXiv 1909.08053). Such a module gathers the tokens of all ranks, and what its ranks' last matrices give is
summed and cut along the sequence again (arXiv 2205.05198): two gathers and two scatters a block, forward and
backward, of the size of the residual stream. All else is computed by each rank on its own tokens.

Parameters are DTensors on the group's mesh, on which FSDP shards further; what modules compute with are their
plain local parts, so attention kernels, tiles, checkpointing and compile see tensors as ever.
Shapes: B batch, S sequence, E dim, V vocabulary.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import FusedReadOut, SharedModule, TensorPlan
from torchtitan_rd.parallelism.row_order import RowOrder
from torchtitan_rd.parallelism.vocabulary import VocabularyPart

SEQUENCE = 1  # of activations (B, S, E)
View = Callable[[Any], torch.Tensor]


def check_tensor_degree(plan: TensorPlan, degree: int, seq_len: int) -> None:
    """Raises ConfigError, naming the degrees that work, if `degree` ranks cannot share all evenly.
    seq_len: tokens of a row that the group computes.
    """
    counts = {**plan.counts, "tokens of a sequence": seq_len}
    uneven = [f"{count} {name}" for name, count in counts.items() if count % degree]
    if uneven:
        works = [d for d in range(1, max(counts.values()) + 1) if not any(c % d for c in counts.values())]
        raise ConfigError(
            f"[parallelism] tensor_parallel_degree = {degree} does not divide {', '.join(uneven)}: "
            f"use one of {', '.join(map(str, works))}"
        )


def row_orders(plan: TensorPlan, degree: int) -> dict[str, RowOrder]:
    """Parameter name -> how its rows are arranged, of those whose order is not the model's."""
    if degree == 1:
        return {}
    return {
        f"{shared.name}.{linear}.weight": RowOrder(parts, degree)
        for shared in plan.shared
        for linear, parts in shared.columns.items()
        if len(parts) > 1
    }


def apply_tensor_parallel(
    model: nn.Module, plan: TensorPlan, mesh: DeviceMesh, kept_whole: Collection[str] = ()
) -> None:
    """Shares `model` (on the meta device) out over the one dimension of `mesh`, in place.

    kept_whole: names of parameters that stay plain tensors, equal on all ranks. As what is not shared out
    they are used on this rank's tokens or heads alone: the sum over all ranks is their gradient.
    """
    placements: dict[str, Placement] = {}
    views: dict[str, View] = {}
    for shared in plan.shared:
        placements |= {f"{shared.name}.{linear}.weight": Shard(0) for linear in shared.columns}
        placements[f"{shared.name}.{shared.rows}.weight"] = Shard(1)
        for parameter, dim in shared.by_head.items():
            views[f"{shared.name}.{parameter}"] = _own_part(dim, mesh.get_local_rank(), mesh.size())
    placements |= {f"{name}.weight": Shard(0) for name in (plan.embedding, plan.head)}

    _distribute(model, mesh, placements, views, kept_whole)
    for shared in plan.shared:
        _gather_and_scatter(model.get_submodule(shared.name), shared, mesh)
    _look_up_own_ids(model.get_submodule(plan.embedding), mesh)
    _predict_own_ids(model.get_submodule(plan.head), mesh)


def gather_tokens(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's tokens (B, S / degree, E) -> those of the group (B, S, E). Each rank's gradient is that of
    its own share of the work: backward sums them.
    """
    whole = DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False).redistribute(mesh, [Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def scatter_sums(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """(B, S, E), of which each rank has one summand -> this rank's tokens of the sum (B, S / degree, E)."""
    summands = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return summands.redistribute(mesh, [Shard(SEQUENCE)]).to_local()


def reading_before(block: nn.Module, compiled: Callable) -> Callable:
    """`compiled`, the forward of `block`, to which parameters are given as the plain tensors that they read
    as: in a graph that recomputes, torch.compile (2.13) does not take DTensors.
    """
    readers: list[Any] = [module for module in block.modules() if hasattr(module, "_views")]

    def forward(*args: Any) -> Any:
        for module in readers:
            module._read_before = {
                name: view(module._parameters[name]) for name, view in module._views.items()
            }
        try:
            return compiled(*args)
        finally:
            for module in readers:
                module._read_before = None

    return forward


def _distribute(
    model: nn.Module,
    mesh: DeviceMesh,
    placements: dict[str, Placement],
    views: dict[str, View],
    kept_whole: Collection[str],
) -> None:
    """Makes each parameter a DTensor, of which its module reads what it computes with."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays tied
    for path, module in model.named_modules():
        read: dict[str, View] = {}
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if name in kept_whole:
                read |= {own: views[name]} if name in views else {}
                continue
            placement = placements.get(name)
            if parameter not in made:
                made[parameter] = _sharded(parameter, mesh, placement or Replicate())
            module.register_parameter(own, made[parameter])
            read[own] = _share_of_own_tokens if placement is None else _local
            if name in views:
                read[own] = _in_turn(_share_of_own_tokens, views[name])
        if read:
            reader: Any = module
            reader.__class__ = _reading(reader.__class__, tuple(read.items()))
            reader._views, reader._read_before = read, None


def _sharded(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    local = parameter.detach()
    if isinstance(placement, Shard):
        local = local.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    return nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False))


@cache
def _reading(base: type, views: tuple[tuple[str, View], ...]) -> type:
    """`base` whose parameters read as the views of them, under the names that they have."""

    def reader(name: str, view: View) -> property:
        def read(module: Any) -> torch.Tensor:
            if module._read_before is not None:
                return module._read_before[name]
            parameter = module._parameters[name]
            # On more dimensions than ours it is FSDP's, which reads it under this name too.
            is_sharded = isinstance(parameter, DTensor) and len(parameter.placements) > 1
            return parameter if is_sharded else view(parameter)

        return property(read)

    return type(base.__name__, (base,), {name: reader(name, view) for name, view in views})


def _local(parameter: DTensor) -> torch.Tensor:
    return parameter.to_local()


def _share_of_own_tokens(parameter: DTensor) -> torch.Tensor:
    """The whole of it, where a rank's gradient is that of its own tokens: the sum over the ranks is taken
    once, before FSDP reduces.
    """
    return parameter.to_local(grad_placements=[Partial()])


@cache
def _own_part(dim: int, rank: int, degree: int) -> View:
    return lambda tensor: tensor.chunk(degree, dim)[rank]


@cache
def _in_turn(first: View, second: View) -> View:
    return lambda tensor: second(first(tensor))


def _gather_and_scatter(module: nn.Module, shared: SharedModule, mesh: DeviceMesh) -> None:
    first: Any = module.get_submodule(next(iter(shared.columns)))

    def gather(module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        # In the type of the matrices, half of that of a float32 residual stream.
        return gather_tokens(x.to(first.weight.dtype), mesh), *others

    def scatter(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return scatter_sums(output, mesh)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(scatter)


def _look_up_own_ids(embedding: Any, mesh: DeviceMesh) -> None:
    def own_rows(tokens_BS: torch.Tensor) -> torch.Tensor:
        weight = embedding.weight
        row, is_own = VocabularyPart(mesh, weight.shape[0]).find(tokens_BS)
        rows_BSE = F.embedding(row, weight).masked_fill(~is_own.unsqueeze(-1), 0.0)
        return scatter_sums(rows_BSE, mesh)

    embedding.forward = own_rows


def _predict_own_ids(head: nn.Module, mesh: DeviceMesh) -> None:
    """Logits, or the matrix that a fused read-out is given, become DTensors: the loss knows by it."""

    def gather(module: Any, args: tuple) -> tuple:
        x, *others = args
        dtype = next((other for other in others if isinstance(other, torch.dtype)), module.weight.dtype)
        return gather_tokens(x.to(dtype), mesh), *(
            _OfShards(other, mesh) if isinstance(other, FusedReadOut) else other for other in others
        )

    def as_shards(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output  # of a fused read-out
        return DTensor.from_local(output, mesh, [Shard(output.ndim - 1)], run_check=False)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(as_shards)


class _OfShards(FusedReadOut):
    """Gives a read-out the rows of this rank as what they are."""

    def __init__(self, read_out: FusedReadOut, mesh: DeviceMesh):
        self.read_out = read_out
        self.mesh = mesh

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return self.read_out(hidden, DTensor.from_local(weight, self.mesh, [Shard(0)], run_check=False))
