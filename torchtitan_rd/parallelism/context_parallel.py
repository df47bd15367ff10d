"""[parallelism] context_parallel_degree: the tokens of a sequence on several ranks (DeepSpeed-Ulysses,
arXiv 2309.14509).

Each rank computes its part of the tokens in every layer, with all heads; only for attention they change
places, so that a rank has all tokens of its part of the heads, and afterwards back. So any kernel and any
mask works unchanged, and nothing of the whole sequence is ever on one rank but tokens, positions and masks.

The model is told nothing: it is called with whole rows. The embedding looks up this rank's tokens of them,
the rotary table keeps this rank's positions, and `attend` of each attention is wrapped.

Shapes: B batch, S sequence, T = S / c tokens of this rank, H heads, D head dim, c the degree.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_rd.model_spec import WrapPlan


def apply_context_parallel(model: nn.Module, plan: WrapPlan, mesh: DeviceMesh) -> None:
    """Makes `model` compute this rank's tokens of whole rows, where `mesh` has a dimension `context`.

    Its outputs, and what is given to it beside tokens and document ids, are then of these tokens alone: part
    number i of c equal ones on rank i of the dimension.
    """
    if "context" not in (mesh.mesh_dim_names or ()):
        return
    group = mesh.get_group("context")

    embedding, rotary = model.get_submodule(plan.embedding), model.get_submodule(plan.rotary)
    embedding.forward = _of_own_tokens(embedding.forward, group)
    rotary.forward = _of_own_positions(rotary.forward, group)
    for name in plan.attentions:
        attention: Any = model.get_submodule(name)
        attention.attend = over_whole_sequences(attention.attend, group)


def _of_own_tokens(forward: Callable, group: dist.ProcessGroup) -> Callable:
    def embed(tokens_BS: torch.Tensor) -> torch.Tensor:
        return forward(tokens_BS.chunk(group.size(), dim=1)[group.rank()])

    return embed


def _of_own_positions(forward: Callable, group: dist.ProcessGroup) -> Callable:
    def table(seq_len: int) -> torch.Tensor:
        return forward(seq_len).chunk(group.size())[group.rank()]

    return table


def sum_over_tokens(mesh: DeviceMesh) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes of a sum over this rank's tokens that over all tokens of its rows, in place: a collective of
    the ranks that share them.
    """
    if "context" not in (mesh.mesh_dim_names or ()):
        return lambda own: own
    group = mesh.get_group("context")

    def summed(own: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(own, group=group)
        return own

    return summed


def over_whole_sequences(attend: Callable, group: dist.ProcessGroup) -> Callable:
    """`attend(q (B, H, S, D), k, v (B, H_kv, S, D), mask) -> (B, H, S, D)` as a function of q, k and v of T
    tokens and all heads; the mask is of whole sequences.

    One exchange before for all three, one after it. A key head that several ranks need is copied first, and
    its gradients are summed with that.
    """
    degree = group.size()

    def attend_over_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        copies = degree // math.gcd(degree, k.shape[1])
        if copies > 1:
            k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)

        heads = [x.shape[1] // degree for x in (q, k, v)]
        qkv_BHSD = _exchange_heads_for_tokens((q, k, v), group)
        out_BHSD = attend(*qkv_BHSD.split(heads, dim=1), mask)
        return _exchange_tokens_for_heads(out_BHSD, group)

    return attend_over_ranks


def _exchange_heads_for_tokens(tensors: tuple[torch.Tensor, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """(B, H_i, T, D) each, of all heads -> (B, sum of H_i / c, S, D), this rank's part of the heads of each.

    Tokens stand before heads in memory, as the matmuls before leave them and kernels like them, so that what
    arrives needs no copy where B = 1.
    """
    parts = [x.unflatten(1, (group.size(), -1)).permute(1, 0, 3, 2, 4) for x in tensors]
    received_cBTHD = _all_to_all(torch.cat(parts, dim=3), group)
    return received_cBTHD.transpose(0, 1).flatten(1, 2).transpose(1, 2)


def _exchange_tokens_for_heads(x_BHSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, H / c, S, D), this rank's heads of all tokens -> (B, H, T, D), all heads of its tokens."""
    received_cBTHD = _all_to_all(x_BHSD.unflatten(2, (group.size(), -1)).permute(2, 0, 3, 1, 4), group)
    return received_cBTHD.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sends x[i] to rank i; what rank i has sent becomes y[i]."""
    return wait_tensor(all_to_all_single(x.contiguous(), None, None, group))
