"""A raven's forward in parts, for inference, and the noise a token starts from. See `model_steps.Steps`."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from torchtitan_rd.model_steps import CacheLayout, KeyValues, Steps
from torchtitan_rd.models.raven.model import Raven


class RavenSteps(Steps):
    """Prelude | one iteration of adapter and core | coda and head.

    State and residual stream are float32, whatever type the matrices have, as in training
    (docs/recurrence.md).
    """

    def __init__(self, model: Raven):
        self.model, self.shape = model, model.shape
        heads, kv_heads, head_dim = model.shape.attention_shape
        self.layout = CacheLayout(
            kv_heads=heads
            if model.shape.qk_bias
            else kv_heads,  # each query head has its own bias on the keys
            head_dim=head_dim,
            dtype=model.get_parameter("transformer.recurrence.iteration.core_block.0.attn.Wqkv.weight").dtype,
            before=model.shape.n_layers_prelude,
            core=model.shape.n_layers_core,
            after=model.shape.n_layers_coda,
        )
        self.mean_depth = model.shape.mean_recurrence

    def rotary(self, length: int) -> torch.Tensor:
        return self.model.rotary(length)

    def embed(
        self, tokens_BS: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        e_BSE = self.model.transformer.wte(tokens_BS).float()
        if self.shape.embedding_scale != 1.0:
            e_BSE = e_BSE * self.shape.embedding_scale
        for block, cache in zip(self.model.transformer.prelude, caches, strict=True):
            e_BSE = block(e_BSE, rotary, cache)
        return e_BSE

    def first_state(self, seed: int, position: int, scale: float) -> torch.Tensor | None:
        """The noise of `state_seed` in the exported code (huggingface/modeling_raven.py), to the last bit:
        CPU generators use 32 bits of a seed, and a standard normal is drawn before the cut one, as Huginn's
        code does."""
        shape = self.shape
        if shape.injection == "none":
            return None
        if shape.state_init == "zero" or scale == 0:
            return torch.zeros(shape.dim)
        digest = hashlib.sha256(f"state:{seed}:{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        noise = torch.empty(shape.dim).normal_(generator=generator)
        if shape.state_init == "like-init":
            std = shape.weight_std * scale
            nn.init.trunc_normal_(noise, 0.0, std, -3 * std, 3 * std, generator=generator)
            return noise * shape.embedding_scale
        if shape.state_init == "unit":
            spread, mean = torch.std_mean(noise, dim=-1, keepdim=True)
            noise = (noise - mean) / spread
        return noise * (scale * shape.dim**-0.5 if shape.state_init == "embed" else scale)

    def iterate(
        self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        iteration = self.model.transformer.recurrence.iteration
        s_BSE = iteration.inject(s_BSE, e_BSE)
        for block, cache in zip(iteration.core_block, caches, strict=True):
            s_BSE = block(s_BSE, rotary, cache)
        return s_BSE

    def predict(
        self, s_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues], keep: int
    ) -> torch.Tensor:
        layers = self.model.transformer
        x_BSE = self.model.latent(s_BSE)
        for block, cache in zip(layers.coda, caches, strict=True):
            x_BSE = block(x_BSE, rotary, cache)
        return self.model.lm_head(layers.ln_f(x_BSE[:, -keep:])).float()
