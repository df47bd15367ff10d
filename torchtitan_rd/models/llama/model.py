"""The Llama model, as mathematics on one device. Shapes: B batch, S sequence, E dim, H heads,
D head dim, V vocabulary.

Parameter names and the interleaved rotary pairs are those of Meta's release;
hf.py maps them to Hugging Face's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_rd.model_spec import FusedReadOut, GatedFeedForward, Model, ReadOut
from torchtitan_rd.models.attention import Mask, attend, build_mask
from torchtitan_rd.models.layers import Head, Rotary, apply_rotary, build_norm
from torchtitan_rd.models.llama.shape import LlamaShape


class Attention(nn.Module):
    """Causal self-attention with rotary positions; each key and value head serves H / H_kv query heads."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        heads, kv_heads, self.head_dim = shape.attention_shape
        self.wq = nn.Linear(shape.dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, kv_heads * self.head_dim, bias=False)
        self.attend = attend
        self.wo = nn.Linear(heads * self.head_dim, shape.dim, bias=False)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        # The number of heads is left open: under tensor parallelism a rank holds a share of them.
        q_BSHD = apply_rotary(self.wq(x_BSE).unflatten(-1, (-1, self.head_dim // 2, 2)), rotary)
        k_BSHD = apply_rotary(self.wk(x_BSE).unflatten(-1, (-1, self.head_dim // 2, 2)), rotary)
        v_BSHD = self.wv(x_BSE).unflatten(-1, (-1, self.head_dim))
        out_BHSD = self.attend(q_BSHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), mask)
        return self.wo(out_BHSD.transpose(1, 2).flatten(-2))


class FeedForward(GatedFeedForward):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)
        self.w2 = nn.Linear(shape.hidden_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def matrices(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        return (self.w1.weight, self.w3.weight), self.w2.weight


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.attention_norm = build_norm(shape.norm_type, shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = build_norm(shape.norm_type, shape.dim, shape.norm_eps)
        self.feed_forward = FeedForward(shape)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        h_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), rotary, mask)
        return h_BSE + self.feed_forward(self.ffn_norm(h_BSE))


class Llama(Model):
    """Tokens -> logits."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.rotary = Rotary(shape.attention_shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = build_norm(shape.norm_type, shape.dim, shape.norm_eps)
        self.output = Head(shape.dim, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_buffers(self, device: torch.device | str) -> None:
        """Fills the rotary frequencies, which `to_empty` leaves undefined and no checkpoint holds."""
        self.rotary.init_buffers(device)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        document_ids_BS: torch.Tensor | None = None,
        *,
        read_out: ReadOut | FusedReadOut | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Next-token logits (B, S, V), float32. Tokens attend to earlier ones of their own document."""
        rotary = self.rotary(tokens_BS.shape[1])
        mask = build_mask(tokens_BS, document_ids_BS)
        h_BSE = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            h_BSE = layer(h_BSE, rotary, mask)
        result = self.output.read(self.norm(h_BSE), read_out)
        return result if read_out is None else [result]
