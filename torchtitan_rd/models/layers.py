"""Layers that the model families share. Shapes: B batch, S sequence, H heads, D head dim."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import AttentionShape, FusedReadOut, ReadOut

NormType = Literal["rmsnorm", "layernorm", "np_layernorm"]


def build_norm(norm_type: NormType, dim: int, eps: float) -> nn.Module:
    """RMSNorm, LayerNorm without bias, or LayerNorm without any parameter (`np_layernorm`)
    over the last axis.
    """
    if norm_type == "rmsnorm":
        return RMSNorm(dim, eps=eps)
    return nn.LayerNorm(dim, eps=eps, bias=False, elementwise_affine=norm_type == "layernorm")


class Linear(nn.Linear):
    """A matmul, without a bias, in the type of the weight or in `dtype`: what is of another type is cast."""

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = self.weight if dtype is None else self.weight.to(dtype)
        return F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight)


class Head(Linear):
    """The last matmul: hidden states (B, S, E) -> logits (B, S, V)."""

    def read(
        self, x: torch.Tensor, read_out: ReadOut | FusedReadOut | None, dtype: torch.dtype | None = None
    ) -> Any:
        """-> the logits in float32, or what `read_out` makes of them."""
        if isinstance(read_out, FusedReadOut):
            return self(x, dtype, read_out)
        logits = self(x, dtype).float()
        return logits if read_out is None else read_out(logits)

    def forward(
        self, x: torch.Tensor, dtype: torch.dtype | None = None, read_out: FusedReadOut | None = None
    ) -> Any:
        """A fused read-out runs in here, as FSDP gathers the weight for one forward of the module."""
        if read_out is None:
            return super().forward(x, dtype)
        weight = self.weight if dtype is None else self.weight.to(dtype)
        return read_out(x.to(weight.dtype), weight)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with half the operations in eager mode on CPU, where torch has no fused kernel. (In
    inference mode, which needs no backward, torch's takes half the time of this one: it calls its
    operations from C++.)

    The weight may be of a wider type than x: it is then multiplied in that type, before the cast back to x's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            return _RMSNormOnCPU.apply(x, self.weight, self.eps)
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        # torch has a fused kernel for equal types only.
        return super().forward(x.to(self.weight.dtype)).type_as(x)


class _RMSNormOnCPU(torch.autograd.Function):
    """y = n weight with n = x / rms(x); dx = (g - n mean(g n)) / rms(x), g = dy weight. Float32 inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x32 * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        g = dy * weight.float()
        dx = torch.addcmul(g, normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        dweight = (dy * normed).sum(tuple(range(dy.dim() - 1)))
        return dx.type_as(dy), dweight.type_as(weight), None


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies.

    Waves longer than original_max_position_embeddings / low_freq_factor are slowed by `factor`, those shorter
    than original_max_position_embeddings / high_freq_factor are kept, and the share in between is linear in
    the number of turns that fit into the original context. Source: `apply_scaling` of Meta's llama-models.
    Raises ConfigError for values at odds with each other.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ConfigError(f"{self} needs factor > 0 and 0 < low_freq_factor < high_freq_factor")

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Frequencies in radians per position -> scaled frequencies, of the same shape."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class Rotary(nn.Module):
    """Rotary position embedding on interleaved pairs:
    pair i of position p turns by p * theta^(-2i / D) radians.

    Only the D/2 frequencies are kept; forward makes the table for the sequence at hand (D/2 * S sines,
    nothing beside one block), so no length is built in and none can be exceeded. Everything is float32, also
    after the model is cast: bfloat16 angles would be wrong by whole turns at long context.
    """

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self.register_buffer("inv_freq", None, persistent=False)
        self.init_buffers(torch.get_default_device())

    def init_buffers(self, device: torch.device | str) -> None:
        """Computes the frequencies on `device`; to be called after `to_empty`,
        which leaves them undefined.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        self.inv_freq = self.scaling.apply(frequencies) if self.scaling else frequencies

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.init_buffers(self.inv_freq.device)
        return self

    def forward(self, seq_len: int) -> torch.Tensor:
        """-> exp(i * angle) of positions 0 .. S-1: (S, 1, D/2) complex64.

        Complex, because FSDP's mixed precision casts floating-point inputs of the wrapped blocks,
        and so would round a table of sines and cosines.
        """
        positions = torch.arange(seq_len, dtype=torch.float32, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq).unsqueeze(1)
        # Not torch.polar, whose sines and cosines are rounded unlike those of every other implementation.
        return torch.complex(angles.cos(), angles.sin())


def apply_rotary(pairs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (B, S, H, D/2, 2) by `table` (S, 1, D/2) -> (B, S, H, D), in float32,
    cast back at the end.
    """
    pairs32 = pairs.float()
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic, but runs complex kernels one by one
        (even, odd), (cos, sin) = pairs32.unbind(-1), torch.view_as_real(table).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs32) * table)
    return turned.flatten(-2).type_as(pairs)


def tensor_counts(heads: AttentionShape, hidden: int, vocabulary: int) -> dict[str, int]:
    """What the ranks of a tensor-parallel group share evenly (TensorPlan.counts)."""
    return {
        "query heads": heads.n_heads,
        "key heads": heads.n_kv_heads,
        "hidden units of the feed-forward": hidden,
        "rows of the vocabulary": vocabulary,
    }


def normal_(tensor: torch.Tensor, generator: torch.Generator, std: float, cut: float = math.inf) -> None:
    """Fills with a normal of mean 0, redrawing what lies beyond `cut` standard deviations."""
    if math.isinf(cut):
        nn.init.normal_(tensor, 0.0, std, generator)
    else:
        nn.init.trunc_normal_(tensor, 0.0, std, -cut * std, cut * std, generator)


def ones_(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fills with ones; the generator is not touched."""
    nn.init.ones_(tensor)
