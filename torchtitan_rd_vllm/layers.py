"""The blocks of a raven, of vLLM's layers. Each linear map is shared out over tensor-parallel ranks.

Shapes: T tokens of all sequences of a step, E n_embd, H query heads, K heads of keys and values, D head dim;
heads are those of this rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from torchtitan_rd_vllm.rotary import rotate


class Rotary(NamedTuple):
    """Of the positions at hand: (T, 1, D/2) float32."""

    cos: torch.Tensor
    sin: torch.Tensor


class Place(nn.Module):
    """A place for keys and values of every token, with vLLM's attention over it.

    remembers: keeps the newest keys and values at hand, for `last`.
    """

    def __init__(self, vllm_config: VllmConfig, heads: int, kv_heads: int, prefix: str, remembers: bool):
        super().__init__()
        head_dim = vllm_config.model_config.hf_config.head_dim
        self.attn = Attention(
            heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )
        self.remembers = remembers
        self.last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        """Queries, keys and values of the last call."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(T, H D), (T, K D) twice -> (T, H D): keys and values are kept, then attended to."""
        if self.remembers:
            self.last = q, k, v
        return self.attn(q, k, v)

    def keep(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keeps keys and values, and attends to nothing."""
        if self.attn.attn_backend.forward_includes_kv_cache_update:
            self.attn(q, k, v)  # these write within their attention, whose result is not needed
            return
        heads = (-1, self.attn.num_kv_heads, self.attn.head_size)
        unified_kv_cache_update(k.reshape(heads), v.reshape(heads), self.attn.layer_name)


class RavenAttention(nn.Module):
    """One matrix for queries, keys and values, then, as configured: all three clamped, biases on queries and
    keys (one a query head: grouped keys are copied), rotary positions, queries and keys normalised.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.head_dim = config.head_dim
        self.clip_qkv, self.qk_norm = config.clip_qkv, config.qk_norm
        self.Wqkv = QKVParallelLinear(
            config.n_embd,
            config.head_dim,
            config.n_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.Wqkv",
        )
        self.proj = RowParallelLinear(
            config.n_heads * config.head_dim,
            config.n_embd,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.proj",
        )

        self.heads, kv_heads = heads_of_this_rank(config)
        self.split = (self.heads, kv_heads, kv_heads)
        self.qk_bias: nn.Parameter | None = None
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.heads, self.head_dim))
            set_weight_attrs(self.qk_bias, {"weight_loader": load_heads})

    def forward(self, x: torch.Tensor, rotary: Rotary, place: Place) -> torch.Tensor:
        qkv, _ = self.Wqkv(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.split, dim=-2)
        if self.qk_bias is not None:
            k, v = (t.repeat_interleave(self.heads // self.split[1], dim=-2) for t in (k, v))
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.head_dim,), eps=torch.finfo(torch.float32).eps) for t in (q, k))
        out, _ = self.proj(place(*(t.flatten(-2) for t in (q, k, v.contiguous()))))
        return out


def heads_of_this_rank(config: Any) -> tuple[int, int]:
    """-> heads of queries, and of keys and values before they are copied."""
    ranks = get_tensor_model_parallel_world_size()
    return config.n_heads // ranks, max(1, config.num_key_value_heads // ranks)


def load_heads(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """(2, 1, heads, D) of the whole model -> those of this rank, whose queries are neighbours."""
    heads = parameter.shape[2]
    first = get_tensor_model_parallel_rank() * heads
    parameter.data.copy_(loaded[:, :, first : first + heads])


class GatedMLP(nn.Module):
    """proj(silu(gate) * up), gate and up from one matrix."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        sizes = [config.intermediate_size] * 2
        self.fc = MergedColumnParallelLinear(
            config.n_embd, sizes, bias=False, quant_config=quant_config, prefix=f"{prefix}.fc"
        )
        self.proj = RowParallelLinear(
            config.intermediate_size,
            config.n_embd,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.proj",
        )
        self.gate = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.proj(self.gate(self.fc(x)[0]))
        return out


class SandwichBlock(nn.Module):
    """x = norm_2(x + attn(norm_1(x))); x = norm_4(x + mlp(norm_3(x)))."""

    norms = 4

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.attn = RavenAttention(vllm_config, f"{prefix}.attn")
        self.mlp = GatedMLP(vllm_config, f"{prefix}.mlp")
        for number in range(1, self.norms + 1):
            self.add_module(f"norm_{number}", RMSNorm(config.n_embd, eps=config.norm_eps))

    def forward(self, x: torch.Tensor, rotary: Rotary, place: Place) -> torch.Tensor:
        x = self.norm_2(x + self.attn(self.norm_1(x), rotary, place))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


class TransformerPostNormBlock(SandwichBlock):
    """x = norm_1(x + attn(x)); x = norm_2(x + mlp(x))."""

    norms = 2

    def forward(self, x: torch.Tensor, rotary: Rotary, place: Place) -> torch.Tensor:
        x = self.norm_1(x + self.attn(x, rotary, place))
        return self.norm_2(x + self.mlp(x))


class TransformerPreNormBlock(SandwichBlock):
    """x = x + attn(norm_1(x)); x = x + mlp(norm_2(x))."""

    norms = 2

    def forward(self, x: torch.Tensor, rotary: Rotary, place: Place) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x), rotary, place)
        return x + self.mlp(self.norm_2(x))


BLOCKS = {
    block.__name__: block for block in (SandwichBlock, TransformerPostNormBlock, TransformerPreNormBlock)
}
