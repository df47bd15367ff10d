"""The blocks of a depth-recurrent transformer (Huginn, arXiv 2502.05171),
and what a forward hands to each of them.

Shapes: B batch, S sequence, K keys (cached ones and S), E n_embd, H heads, D head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from .configuration_raven import RavenConfig
from .model_steps import KeyValues, grouped_attention


class Context(NamedTuple):
    """Of one forward. mask: (B, 1, S, K) or (S, K), True where a query may look.
    None: causal, or one new token. cache: to which each layer adds, or a list of one for each layer at hand
    that attends by itself (stepper.py).
    """

    cos: torch.Tensor  # (B or 1, S, 1, D/2) float32
    sin: torch.Tensor
    mask: torch.Tensor | None
    cache: DynamicCache | list[KeyValues] | None


class RMSNorm(nn.Module):
    """In float32, cast back to the input's type before the weight is applied."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Linear(nn.Linear):
    """One matrix for several outputs of `rows` features.
    rows and ends_branch matter to `_init_weights` alone.
    """

    def __init__(self, fan_in: int, *rows: int, ends_branch: bool = False):
        super().__init__(fan_in, sum(rows), bias=False)
        self.rows, self.ends_branch = rows, ends_branch


class Adapter(Linear):
    """Takes the embedded input into the state: [s, e] -> s. Only `_init_weights` tells it from a Linear."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i + 1) of (B, S, H, D) by their angles, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention: one matrix for queries, keys and values, then, as configured: all three
    clamped, biases on queries and keys (one a query head: grouped keys are copied), rotary positions,
    queries and keys normalised.
    """

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.config = config
        heads, kv_heads, self.head_dim = config.n_heads, config.num_key_value_heads, config.head_dim
        self.heads = (heads, kv_heads, kv_heads)
        self.clip_qkv = config.clip_qkv
        self.qk_norm = config.qk_norm
        self.Wqkv = Linear(config.n_embd, *(number * self.head_dim for number in self.heads))
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, heads, self.head_dim)) if config.qk_bias else None
        self.proj = Linear(heads * self.head_dim, config.n_embd, ends_branch=True)

    def forward(self, x: torch.Tensor, context: Context, slot: int) -> torch.Tensor:
        qkv = self.Wqkv(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.qk_bias is not None:
            k, v = (t.repeat_interleave(self.heads[0] // self.heads[1], dim=2) for t in (k, v))
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k = (rotate(t, context.cos, context.sin).type_as(v) for t in (q, k))
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.head_dim,), eps=torch.finfo(torch.float32).eps) for t in (q, k))

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, D)
        return self.proj(self._attended(q, k, v, context, slot).transpose(1, 2).flatten(-2))

    def _attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context, slot: int
    ) -> torch.Tensor:
        """(B, H, S, D), (B, H_kv, S, D) twice -> (B, H, S, D)."""
        if isinstance(context.cache, list):
            return context.cache[slot].attend(q, k, v)
        if context.cache is not None:
            k, v = context.cache.update(k, v, slot)
        if self.config._attn_implementation == "eager":
            return attend(q, k, v, context.mask)
        return grouped_attention(q, k, v, context.mask, causal=context.mask is None and q.shape[2] > 1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of (B, H, S, D), (B, H_kv, K, D) twice -> (B, H, S, D),
    with the softmax in float32.

    The "eager" implementation, which shows each step; mask is that of Context.
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).type_as(v) @ v


class GatedMLP(nn.Module):
    """proj(silu(gate) * up), gate and up from one matrix."""

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size, config.intermediate_size)
        self.proj = Linear(config.intermediate_size, config.n_embd, ends_branch=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class SandwichBlock(nn.Module):
    """x = norm_2(x + attn(norm_1(x))); x = norm_4(x + mlp(norm_3(x)))."""

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: torch.Tensor, context: Context, slot: int) -> torch.Tensor:
        x = self.norm_2(x + self.attn(self.norm_1(x), context, slot))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


class TransformerPostNormBlock(nn.Module):
    """x = norm_1(x + attn(x)); x = norm_2(x + mlp(x))."""

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.attn = Attention(config)
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: torch.Tensor, context: Context, slot: int) -> torch.Tensor:
        x = self.norm_1(x + self.attn(x, context, slot))
        return self.norm_2(x + self.mlp(x))


class TransformerPreNormBlock(TransformerPostNormBlock):
    """x = x + attn(norm_1(x)); x = x + mlp(norm_2(x))."""

    def forward(self, x: torch.Tensor, context: Context, slot: int) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x), context, slot)
        return x + self.mlp(self.norm_2(x))


def positions_and_mask(
    embeds: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, past: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> positions (B or 1, S), and the mask of Context."""
    batch, length, _ = embeds.shape
    keys = torch.arange(past + length, device=embeds.device)
    if attention_mask is not None and attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, but must be {(batch, past + length)}"
        )
    if position_ids is None:
        counted = keys[None] if attention_mask is None else attention_mask.long().cumsum(-1) - 1
        position_ids = counted[:, past:].clamp(min=0)
    if (
        attention_mask is not None
        and length > 1
        and not torch.compiler.is_compiling()
        and bool(attention_mask.all())
    ):
        # The causal kernels are faster and need no mask.
        # Neither compiled code nor each new token waits for the answer.
        attention_mask = None
    if attention_mask is None and (past == 0 or length == 1):
        return position_ids, None
    queries = keys[past:, None]
    if attention_mask is None:
        return position_ids, keys <= queries
    # Padding sees itself: a query that sees nothing would be undefined.
    return position_ids, ((keys <= queries) & attention_mask[:, None, None].bool()) | (keys == queries)
