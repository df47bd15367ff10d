"""The raven model, as mathematics on one device (arXiv 2502.05171).

Shapes: B batch, S sequence, E dim, H heads, D head dim, V vocabulary. Letters: e embedded input, s state,
n and k iterations without and with gradient.

Precision: matmuls and attention compute in the type of the matrices. What lies between them is of
`state_dtype`: e, the state and the residual stream, in which sums and norms are made. Where all types are
equal, no cast is an operation.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan_rd.model_spec import FusedReadOut, GatedFeedForward, Model, ReadOut
from torchtitan_rd.models.attention import Mask, attend, build_mask
from torchtitan_rd.models.layers import Head, Linear, RMSNorm, Rotary, apply_rotary
from torchtitan_rd.models.raven.shape import RavenShape

# What Huginn's training program has in float32, here in every type.
QK_NORM_EPS = torch.finfo(torch.float32).eps


class Attention(nn.Module):
    """Causal self-attention: one matrix for queries, keys and values, then, as configured: all three clamped,
    biases on queries and keys, rotary positions, queries and keys normalised.
    """

    def __init__(self, shape: RavenShape):
        super().__init__()
        heads, kv_heads, self.head_dim = shape.attention_shape
        self.clip_qkv, self.qk_norm = shape.clip_qkv, shape.qk_norm
        self.queries_per_key = heads // kv_heads
        self.copies = heads // kv_heads if shape.qk_bias else 1
        self.Wqkv = Linear(shape.dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.qk_bias = nn.Parameter(torch.empty(2, 1, heads, self.head_dim)) if shape.qk_bias else None
        self.proj = Linear(heads * self.head_dim, shape.dim, bias=False)
        self.attend = attend

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        qkv = self.Wqkv(x_BSE)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        # Queries and keys stay one tensor through bias and rotary: half the operations.
        # The number of heads is left open: under tensor parallelism a rank holds a share of them.
        width_of_v = qkv.shape[-1] // (self.queries_per_key + 2)
        qk, v = qkv.split((qkv.shape[-1] - width_of_v, width_of_v), dim=-1)
        if self.copies > 1:
            qk, v = self._copied(qk, v)
        if self.qk_bias is not None:
            qk = qk + self.qk_bias.flatten()
        qk_BHSD = apply_rotary(qk.unflatten(-1, (-1, self.head_dim // 2, 2)), rotary).transpose(1, 2)
        if self.qk_norm:
            qk_BHSD = F.rms_norm(qk_BHSD, (self.head_dim,), eps=QK_NORM_EPS)
        qk_BHSD = qk_BHSD.type_as(v)  # a bias of a wider type has widened it
        v_BHSD = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        kv_heads = v_BHSD.shape[1]
        q_BHSD, k_BHSD = qk_BHSD.split((qk_BHSD.shape[1] - kv_heads, kv_heads), dim=1)
        return self.proj(self.attend(q_BHSD, k_BHSD, v_BHSD, mask).transpose(1, 2).flatten(-2))

    def _copied(self, qk: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with a key head and a value head for each query head: their biases differ."""
        q, k = qk.split((qk.shape[-1] - v.shape[-1], v.shape[-1]), dim=-1)
        k, v = (
            t.unflatten(-1, (-1, self.head_dim)).repeat_interleave(self.copies, -2).flatten(-2)
            for t in (k, v)
        )
        return torch.cat((q, k), dim=-1), v


class GatedMLP(GatedFeedForward):
    """proj(silu(gate) * up), gate and up from one matrix."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.fc = Linear(shape.dim, 2 * shape.ffn_dim, bias=False)
        self.proj = Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)

    def matrices(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        return (self.fc.weight,), self.proj.weight


class SandwichBlock(nn.Module):
    """x = norm_2(x + attn(norm_1(x))); x = norm_4(x + mlp(norm_3(x)))."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.norm_1 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm_2 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.norm_3 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.mlp = GatedMLP(shape)
        self.norm_4 = RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        x_BSE = self.norm_2(x_BSE + self.attn(self.norm_1(x_BSE), rotary, mask))
        return self.norm_4(x_BSE + self.mlp(self.norm_3(x_BSE)))


class PostNormBlock(nn.Module):
    """x = norm_1(x + attn(x)); x = norm_2(x + mlp(x))."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.attn = Attention(shape)
        self.norm_1 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.mlp = GatedMLP(shape)
        self.norm_2 = RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        x_BSE = self.norm_1(x_BSE + self.attn(x_BSE, rotary, mask))
        return self.norm_2(x_BSE + self.mlp(x_BSE))


class PreNormBlock(nn.Module):
    """x = x + attn(norm_1(x)); x = x + mlp(norm_2(x))."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.norm_1 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm_2 = RMSNorm(shape.dim, eps=shape.norm_eps)
        self.mlp = GatedMLP(shape)

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask) -> torch.Tensor:
        x_BSE = x_BSE + self.attn(self.norm_1(x_BSE), rotary, mask)
        return x_BSE + self.mlp(self.norm_2(x_BSE))


BLOCKS = {"sandwich": SandwichBlock, "post": PostNormBlock, "pre": PreNormBlock}


def blocks(shape: RavenShape, number: int) -> nn.ModuleList:
    return nn.ModuleList(BLOCKS[shape.block](shape) for _ in range(number))


class Iteration(nn.Module):
    """One step of the recurrence: takes e into the state, then runs the core blocks.
    A module, so that activation checkpointing can replace its `forward`.
    """

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.injection = shape.injection
        if shape.injection == "linear":
            self.adapter = Linear(2 * shape.dim, shape.dim, bias=False)
        self.core_block = blocks(shape, shape.n_layers_core)

    def forward(
        self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, rotary: torch.Tensor, mask: Mask
    ) -> torch.Tensor:
        s_BSE = self.inject(s_BSE, e_BSE)
        for block in self.core_block:
            s_BSE = block(s_BSE, rotary, mask)
        return s_BSE

    def inject(self, s_BSE: torch.Tensor, e_BSE: torch.Tensor) -> torch.Tensor:
        """The state with the embedded input taken in: what the core blocks see."""
        if self.injection == "linear":
            dtype = self.adapter.weight.dtype
            return self.adapter(torch.cat((s_BSE.to(dtype), e_BSE.to(dtype)), dim=-1)).type_as(e_BSE)
        if self.injection == "add":
            return s_BSE + e_BSE
        if self.injection == "gate":
            return s_BSE * e_BSE
        return s_BSE


class Recurrence(nn.Module):
    """The whole loop in one forward: FSDP gathers its weights once, however many iterations are drawn
    (docs/pytorch_traps.md, Loops)."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.iteration = Iteration(shape)

    def forward(
        self,
        s_BSE: torch.Tensor,
        e_BSE: torch.Tensor,
        rotary: torch.Tensor,
        mask: Mask,
        num_steps: tuple[int, int],
        early_read_outs: Collection[int] = (),
    ) -> list[torch.Tensor]:
        """-> the states after as many iterations without gradient as `early_read_outs` name,
        then the last one.
        """
        num_steps_no_grad, num_steps_with_grad = num_steps
        early = []
        with torch.no_grad():
            for done in range(1, num_steps_no_grad + 1):
                s_BSE = self.iteration(s_BSE, e_BSE, rotary, mask)
                if done in early_read_outs:
                    early.append(s_BSE)
        for _ in range(num_steps_with_grad):
            s_BSE = self.iteration(s_BSE, e_BSE, rotary, mask)
        return [*early, s_BSE]


class Transformer(nn.Module):
    """Holds the layers, for their names; `Raven.forward` calls them."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.dim)
        self.prelude = blocks(shape, shape.n_layers_prelude)
        self.recurrence = Recurrence(shape)
        self.coda = blocks(shape, shape.n_layers_coda)
        self.ln_f = RMSNorm(shape.dim, eps=shape.norm_eps)


class Raven(Model):
    """Tokens -> logits. It draws nothing: depth and first state are inputs."""

    def __init__(self, shape: RavenShape):
        super().__init__()
        self.shape = shape
        self.transformer = Transformer(shape)
        self.rotary = Rotary(shape.attention_shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.lm_head = Head(shape.dim, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def init_buffers(self, device: torch.device | str) -> None:
        self.rotary.init_buffers(device)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        *,
        num_steps: tuple[int, int],
        initial_state: torch.Tensor | None,
        early_read_outs: Collection[int] = (),
        read_out: ReadOut | FusedReadOut | None = None,
        state_dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """num_steps: iterations without gradient, then with. Those without are run on the state
        alone: e gets its gradient through the others, so the gradients are those of the last k
        iterations from a given state.

        initial_state: (B, S, E); None, and only then, if injection is "none", where the state starts at e.

        early_read_outs: numbers of iterations, of those without gradient, after which `read_out` is given
        the logits too; those of the last state come last. It costs a coda and a head each, and a state
        that is held till then.

        state_dtype: of e, the residual stream and the state; None: that of the embedding.
        head_dtype: in which the head multiplies; None: that of its weight,
            which may be a float32 embedding's.
        """
        layers = self.transformer
        rotary, mask = self.rotary(tokens_BS.shape[1]), build_mask(tokens_BS, document_ids)
        e_BSE = layers.wte(tokens_BS)
        e_BSE = e_BSE.to(state_dtype or e_BSE.dtype)
        if self.shape.embedding_scale != 1.0:
            e_BSE = e_BSE * self.shape.embedding_scale
        for block in layers.prelude:
            e_BSE = block(e_BSE, rotary, mask)
        if self.shape.injection == "none":
            s_BSE = e_BSE
        elif initial_state is None:
            raise ValueError("initial_state is needed unless injection is 'none'")
        else:
            s_BSE = initial_state.to(e_BSE)
        states = layers.recurrence(s_BSE, e_BSE, rotary, mask, num_steps, early_read_outs)
        if read_out is None:
            return self._predict(states[-1], rotary, mask, head_dtype)
        return [self._predict(state, rotary, mask, head_dtype, read_out) for state in states]

    def _predict(
        self,
        s_BSE: torch.Tensor,
        rotary: torch.Tensor,
        mask: Mask,
        head_dtype: torch.dtype | None,
        read_out: ReadOut | FusedReadOut | None = None,
    ) -> torch.Tensor:
        """Only called within forward: FSDP gathers the root's parameters for that and for nothing else."""
        layers = self.transformer
        # Where ln_f is called twice, telemetry.py tells the state from what the head sees by this order.
        s_BSE = self.latent(s_BSE)
        for block in layers.coda:
            s_BSE = block(s_BSE, rotary, mask)
        return self.lm_head.read(layers.ln_f(s_BSE), read_out, head_dtype)

    def latent(self, s_BSE: torch.Tensor) -> torch.Tensor:
        """The state as the coda sees it: normalised, unless ln_f is applied once, after the coda."""
        return self.transformer.ln_f(s_BSE) if self.shape.final_norm == "twice" else s_BSE
