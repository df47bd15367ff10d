"""A raven's forward in parts, for programs that look between the iterations.

    e, block_idx = model.embed_inputs(ids)
    s = model.initialize_state(e)
    for step in range(8):
        s, block_idx, _ = model.iterate_one_step(e, s, block_idx=block_idx, current_step=step)
    logits = model.predict_from_latents(s).logits

These are without a cache. `RavenSteps` gives the same parts to a Stepper (stepper.py), which keeps keys and
values: `Stepper(FAMILY, model, batch=1, positions=64)`.

Shapes: B batch, S sequence, E n_embd, V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks_raven import Context, positions_and_mask
from .model_steps import CacheLayout, KeyValues, Steps


class StepMixin:
    """The methods of the released class that take one forward apart, and the first state."""

    config: Any
    transformer: Any
    lm_head: nn.Module

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Tokens (B, S) -> e (B, S, E), and the number of the last block that has run, from 0."""
        e = self.transformer.wte(input_ids) * self.config.embedding_scale
        context = self._context(e, attention_mask, position_ids)
        for slot, block in enumerate(self.transformer.prelude):
            e = block(e, context, slot)
        return e, len(self.transformer.prelude) - 1

    def initialize_state(
        self, input_embeds: torch.Tensor, scale: float = 1.0, state_seed: int | None = None
    ) -> torch.Tensor:
        """e (B, S, E) -> s_0 (B, S, E): noise, of which `forward` tells. scale 0: zeros."""
        positions = torch.arange(input_embeds.shape[1], device=input_embeds.device)[None]
        s = self.initial_state(input_embeds, positions, scale, state_seed)
        return input_embeds if s is None else s

    @torch.no_grad()
    def iterate_one_step(
        self,
        input_embeds: torch.Tensor,
        input_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        block_idx: int = 0,
        attention_mask: torch.Tensor | None = None,
        current_step: int = 0,
    ) -> tuple[torch.Tensor, int, int]:
        """e and s (B, S, E) -> the next s, block_idx and current_step counted on."""
        context = self._context(input_embeds, attention_mask, position_ids)
        s = self.core_step(input_states.to(input_embeds), input_embeds, context, 0)
        return s, block_idx + len(self.transformer.core_block), current_step + 1

    def predict_from_latents(
        self,
        latents: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """s (B, S, E) -> logits (B, S, V) in float32; hidden_states: the input of lm_head."""
        context = self._context(latents, attention_mask, position_ids)
        x = self.latent(latents)
        for slot, block in enumerate(self.transformer.coda):
            x = block(x, context, slot)
        x = self.transformer.ln_f(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x).float(), hidden_states=x)

    def _context(self, x: torch.Tensor, mask: torch.Tensor | None, places: torch.Tensor | None) -> Context:
        places, mask = positions_and_mask(x, mask, places, past=0)
        return Context(*self._rotary(places), mask, None)

    def _rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
        frequencies = 1.0 / self.config.rope_base**exponents
        if self.config.llama3_rope is not None:
            frequencies = stretched(frequencies, **self.config.llama3_rope)
        angles = position_ids[..., None, None].float() * frequencies
        return angles.cos(), angles.sin()

    def latent(self, s: torch.Tensor) -> torch.Tensor:
        """The state as the coda sees it: normalised, unless ln_f is applied once, after the coda."""
        return self.transformer.ln_f(s) if self.config.final_norm == "twice" else s

    def core_step(self, s: torch.Tensor, e: torch.Tensor, context: Context, slot: int) -> torch.Tensor:
        """One iteration: takes e into the state, then runs the core blocks, which cache from `slot` on."""
        injection, e = self.config.injection_type, e.to(s.device)
        if injection == "linear":
            s = self.transformer.adapter(torch.cat((s, e), dim=-1)).type_as(e)  # float32 under autocast
        elif injection in ("add", "gate"):
            s = s + e if injection == "add" else s * e
        for i, block in enumerate(self.transformer.core_block):
            s = block(s, context, slot + i)
        return s

    def initial_state(
        self,
        like: torch.Tensor,
        position_ids: torch.Tensor,
        init_scale: float = 1.0,
        state_seed: int | None = None,
    ) -> torch.Tensor | None:
        """First states in the layout of `like` (B, S, E); None if the state starts at e. See `forward`."""
        if self.config.injection_type == "none":
            return None
        if self.config.state_init == "zero" or init_scale <= 0:
            return torch.zeros_like(like)
        if state_seed is None:
            return self._noise(torch.empty_like(like), init_scale)
        positions, index = position_ids.unique(return_inverse=True)
        rows = []
        for position in positions.tolist():
            digest = hashlib.sha256(f"state:{state_seed}:{position}".encode()).digest()
            # CPU ones use 32 bits.
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            row = torch.empty(like.shape[-1], dtype=torch.float32, device="cpu")
            rows.append(self._noise(row, init_scale, generator))
        return torch.stack(rows).to(like)[index].expand_as(like)

    def _noise(self, x: torch.Tensor, scale: float, generator: torch.Generator | None = None) -> torch.Tensor:
        """Fills x (..., E). Draws in the order of the released class, so that equal seeds
        give equal states.
        """
        kind, x = self.config.state_init, x.normal_(generator=generator)
        if kind == "like-init":
            std = self.config.weight_std * scale
            nn.init.trunc_normal_(x, 0.0, std, -3 * std, 3 * std, generator=generator)
            return x * self.config.embedding_scale
        if kind == "unit":
            std, mean = torch.std_mean(x, dim=-1, keepdim=True)
            x = (x - mean) / std
        return x * (scale * x.shape[-1] ** -0.5 if kind == "embed" else scale)


class RavenSteps(Steps):
    """See `Steps`. The state, and what lies between blocks, has the type of the weights, as in `forward`."""

    def __init__(self, model: Any):
        config = model.config
        self.model = model
        self.layout = CacheLayout(
            # With biases, each query head has keys of its own.
            kv_heads=config.n_heads if config.qk_bias else config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=model.transformer.core_block[0].attn.Wqkv.weight.dtype,
            before=config.n_layers_in_prelude,
            core=config.n_layers_in_recurrent_block,
            after=config.n_layers_in_coda,
        )
        self.mean_depth = config.mean_recurrence

    def rotary(self, length: int) -> torch.Tensor:
        cos, sin = self.model._rotary(torch.arange(length, device=self.model.device)[None])
        return torch.complex(cos, sin)[0]

    def embed(
        self, tokens_BS: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        e = self.model.transformer.wte(tokens_BS) * self.model.config.embedding_scale
        return _through(self.model.transformer.prelude, e, rotary, caches)

    def first_state(self, seed: int, position: int, scale: float) -> torch.Tensor | None:
        like = torch.zeros(1, 1, self.model.config.n_embd, device="cpu")
        s = self.model.initial_state(like, torch.tensor([[position]], device="cpu"), scale, seed)
        return None if s is None else s[0, 0]

    def iterate(
        self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        context = Context(rotary.real, rotary.imag, None, caches)
        return self.model.core_step(s_BSE.to(e_BSE), e_BSE, context, 0)

    def predict(
        self, s_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues], keep: int
    ) -> torch.Tensor:
        layers = self.model.transformer
        x = _through(layers.coda, self.model.latent(s_BSE), rotary, caches)
        return self.model.lm_head(layers.ln_f(x[:, -keep:])).float()


def stretched(
    frequencies: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """Llama 3.1's rotary frequencies: radians per position -> the same, slow ones divided by `factor`.

    Those that turn less than low_freq_factor times within the original context are divided, those that turn
    more than high_freq_factor times are kept, and the share in between is linear in the number of turns.
    """
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def _through(
    blocks: nn.ModuleList, x: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
) -> torch.Tensor:
    context = Context(rotary.real, rotary.imag, None, caches)
    for slot, block in enumerate(blocks):
        x = block(x, context, slot)
    return x


FAMILY = SimpleNamespace(name="raven", steps=RavenSteps)
