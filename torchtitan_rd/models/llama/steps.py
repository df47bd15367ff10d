"""A Llama's forward in parts. See `model_steps.Steps`."""

from collections.abc import Sequence

import torch

from torchtitan_rd.model_steps import CacheLayout, KeyValues, Steps
from torchtitan_rd.models.llama.model import Llama


class LlamaSteps(Steps):
    """All layers are `before`; there is nothing to iterate."""

    def __init__(self, model: Llama):
        self.model = model
        sizes = model.shape.attention_shape
        dtype = model.get_parameter("layers.0.attention.wk.weight").dtype
        self.layout = CacheLayout(sizes.n_kv_heads, sizes.head_dim, dtype, before=model.shape.n_layers)

    def rotary(self, length: int) -> torch.Tensor:
        return self.model.rotary(length)

    def embed(
        self, tokens_BS: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        h_BSE = self.model.tok_embeddings(tokens_BS)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            h_BSE = layer(h_BSE, rotary, cache)
        return h_BSE

    def predict(
        self, s_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues], keep: int
    ) -> torch.Tensor:
        return self.model.output(self.model.norm(s_BSE[:, -keep:])).float()
