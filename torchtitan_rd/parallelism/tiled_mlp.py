"""[training] mlp_tile_tokens: the feed-forward of a few tokens at a time, in forward and again in backward.

Nothing in a feed-forward depends on another token, and its hidden activations are several times as wide as
the model: at 131072 tokens an 8B's are 15 GiB in bfloat16. In tiles only those of one are in memory, for the
price of two of the three matmuls once more. (Arctic Long Sequence Training, arXiv 2506.13996, section 3.1.)

One operation for torch, so that it goes through torch.compile and activation checkpointing as it is.
Shapes: N tokens, E dim, I hidden width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from torchtitan_rd.config_loader import Section
from torchtitan_rd.model_spec import GatedFeedForward


class TilingKeys(Section):
    """The [training] keys of computing a few tokens at a time."""

    mlp_tile_tokens: int | None = Field(None, ge=1)
    """Compute the feed-forward of each block so many tokens at a time, in forward and again in backward: for
    long sequences, whose hidden activations would otherwise all be in memory. Unset: all tokens at once.
    """


def apply_tiled_mlp(feed_forwards: Sequence[nn.Module], tile_tokens: int | None) -> None:
    """Makes each compute so many tokens at a time; None: as it was."""
    if tile_tokens is None:
        return
    for module in feed_forwards:
        if not isinstance(module, GatedFeedForward):
            raise TypeError(f"{type(module).__name__} is no GatedFeedForward")
        module.forward = _tiled(module.matrices, tile_tokens)


def _tiled(matrices: Callable, tile_tokens: int) -> Callable:
    # A function of its own, not functools.partial: blocks would not share a compilation.
    def tiled_forward(x: torch.Tensor) -> torch.Tensor:
        gate_up, down = matrices()
        x_NE = x.to(down.dtype).flatten(0, -2)
        return swiglu(x_NE, list(gate_up), down, tile_tokens).view(x.shape)

    return tiled_forward


@torch.library.custom_op("torchtitan_rd::tiled_swiglu", mutates_args=())
def swiglu(
    x_NE: torch.Tensor, gate_up: list[torch.Tensor], down_EI: torch.Tensor, tile_tokens: int
) -> torch.Tensor:
    """down(silu(gate x) * up x), `tile_tokens` at a time -> (N, E).

    gate_up: the gate and the up matrix, (I, E) each, or both in one (2 I, E). down_EI: (E, I).
    """
    return forward_in_tiles(x_NE, gate_up, down_EI, tile_tokens)


def forward_in_tiles(
    x_NE: torch.Tensor, gate_up: Sequence[torch.Tensor], down_EI: torch.Tensor, tile_tokens: int
) -> torch.Tensor:
    """What `swiglu` computes; as plain Python it can be watched."""
    y_NE = torch.empty_like(x_NE)
    for x, y in zip(x_NE.split(tile_tokens), y_NE.split(tile_tokens), strict=True):
        gate, up = _gate_and_up(x, gate_up)
        torch.mm(F.silu(gate).mul_(up), down_EI.T, out=y)
    return y_NE


def backward_in_tiles(
    dy_NE: torch.Tensor,
    x_NE: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    down_EI: torch.Tensor,
    tile_tokens: int,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """-> gradients of x, of each of `gate_up` and of `down_EI`. Those of matrices are summed in float32 and
    stay so: autograd rounds them once, to the type in which it wants them.
    """
    dx_NE = torch.empty_like(x_NE)
    dgate_up = [torch.zeros_like(matrix, dtype=torch.float32) for matrix in gate_up]
    ddown_EI = torch.zeros_like(down_EI, dtype=torch.float32)

    tiles = (tensor.split(tile_tokens) for tensor in (x_NE, dy_NE, dx_NE))
    for x, dy, dx in zip(*tiles, strict=True):
        gate, up = _gate_and_up(x, gate_up)
        activated = F.silu(gate)
        ddown_EI += dy.T @ (activated * up)
        dhidden = dy @ down_EI
        dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
        dup = dhidden.mul_(activated)

        # One gradient for each of the matrices: of both halves if they are one.
        products = [dgate, dup] if len(gate_up) == 2 else [torch.cat((dgate, dup), dim=-1)]
        torch.mm(products[0], gate_up[0], out=dx)
        for product, matrix in zip(products[1:], gate_up[1:], strict=True):
            dx.addmm_(product, matrix)
        for product, dmatrix in zip(products, dgate_up, strict=True):
            dmatrix += product.T @ x
    return dx_NE, dgate_up, ddown_EI


def _gate_and_up(x: torch.Tensor, gate_up: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(gate_up) == 2:
        return x @ gate_up[0].T, x @ gate_up[1].T
    gate, up = (x @ gate_up[0].T).chunk(2, dim=-1)
    return gate, up


@torch.library.custom_op("torchtitan_rd::tiled_swiglu_backward", mutates_args=())
def swiglu_backward(
    dy_NE: torch.Tensor,
    x_NE: torch.Tensor,
    gate_up: list[torch.Tensor],
    down_EI: torch.Tensor,
    tile_tokens: int,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    return backward_in_tiles(dy_NE, x_NE, gate_up, down_EI, tile_tokens)


@swiglu.register_fake
def _(x_NE: torch.Tensor, gate_up: Any, down_EI: Any, tile_tokens: int) -> torch.Tensor:
    return torch.empty_like(x_NE)


@swiglu_backward.register_fake
def _(dy_NE: Any, x_NE: torch.Tensor, gate_up: Any, down_EI: torch.Tensor, tile_tokens: int) -> Any:
    like_float32 = partial(torch.empty_like, dtype=torch.float32)
    return torch.empty_like(x_NE), [like_float32(m) for m in gate_up], like_float32(down_EI)


def _keep_inputs(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x_NE, gate_up, down_EI, ctx.tile_tokens = inputs
    ctx.save_for_backward(x_NE, *gate_up, down_EI)


def _backward(ctx: Any, dy_NE: torch.Tensor) -> tuple:
    x_NE, *gate_up, down_EI = ctx.saved_tensors
    dx, dgate_up, ddown = swiglu_backward(dy_NE, x_NE, gate_up, down_EI, ctx.tile_tokens)
    return dx, dgate_up, ddown, None


swiglu.register_autograd(_backward, setup_context=_keep_inputs)
