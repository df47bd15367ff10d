"""The Llama model, as mathematics on one device. Shapes: B batch, S sequence, E dim, H heads, D head dim, V vocabulary.

Parameter names and the interleaved rotary pairs are those of Meta's release; hf.py maps them to Hugging Face's.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_rd.model_spec import InitFn, Model, ReadOut
from torchtitan_rd.models.attention import Mask, attend, build_mask
from torchtitan_rd.models.layers import Rotary, apply_rotary, build_norm, normal_, ones_
from torchtitan_rd.models.llama.config import LlamaConfig


class Attention(nn.Module):
    """Causal self-attention with rotary positions; each key and value head serves H / H_kv query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        heads, kv_heads, self.head_dim = config.attention_shape
        self.wq = nn.Linear(config.dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        # The number of heads is left open: under tensor parallelism a rank holds a share of them.
        q_BSHD = apply_rotary(self.wq(x_BSE).unflatten(-1, (-1, self.head_dim // 2, 2)), rotary)
        k_BSHD = apply_rotary(self.wk(x_BSE).unflatten(-1, (-1, self.head_dim // 2, 2)), rotary)
        v_BSHD = self.wv(x_BSE).unflatten(-1, (-1, self.head_dim))
        out_BHSD = attend(q_BSHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), mask)
        return self.wo(out_BHSD.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        h_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), rotary, mask)
        return h_BSE + self.feed_forward(self.ffn_norm(h_BSE))


class Llama(Model):
    """Tokens -> logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = Rotary(config.attention_shape.head_dim, config.rope_theta, config.rope_scaling)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_buffers(self, device: torch.device | str) -> None:
        """Fills the rotary frequencies, which `to_empty` leaves undefined and no checkpoint holds."""
        self.rotary.init_buffers(device)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        document_ids_BS: torch.Tensor | None = None,
        *,
        read_out: ReadOut | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Next-token logits (B, S, V), float32. Tokens attend to earlier ones of their own document."""
        rotary = self.rotary(tokens_BS.shape[1])
        mask = build_mask(tokens_BS, document_ids_BS)
        h_BSE = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            h_BSE = layer(h_BSE, rotary, mask)
        logits_BSV = self.output(self.norm(h_BSE)).float()
        return logits_BSV if read_out is None else [read_out(logits_BSV)]


def inits(model: Llama) -> dict[str, InitFn]:
    """How each unique parameter starts, by its name in the unwrapped model.

    wq, wk, wv, w1: std init_std. (The ancestor cuts at an absolute 2, which is 100 std: no cut.)
    wo, w2, w3: init_std / sqrt(2 * number of layers up to this one), or of all layers without depth_init.
    Head: std dim^-0.5, cut at 3 std. Embedding: std 1. Tied, they have init_std, as Hugging Face's: a token's own
    embedding is most of the first residual stream, so a larger one would make each token predict itself.
    Norms: 1.
    """
    config = model.config
    fills: dict[str, InitFn] = {}
    for name, _ in model.named_parameters():  # a shared parameter comes once, under its first name
        parts = name.split(".")
        if parts[-2] == "tok_embeddings" and not config.tie_word_embeddings:
            fills[name] = partial(normal_, std=1.0)
        elif parts[-2] == "output":
            fills[name] = partial(normal_, std=config.dim**-0.5, cut=3.0)
        elif parts[-2].endswith("norm"):
            fills[name] = ones_
        elif parts[-2] in ("wo", "w2", "w3"):
            depth = int(parts[1]) + 1 if config.depth_init else config.n_layers
            fills[name] = partial(normal_, std=config.init_std / math.sqrt(2 * depth))
        else:
            fills[name] = partial(normal_, std=config.init_std)
    return fills
