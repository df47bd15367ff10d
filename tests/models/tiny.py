"""Tiny models, initialised as training initialises them."""

import torch

from torchtitan_rd.models.llama.init import inits
from torchtitan_rd.models.llama.model import Llama
from torchtitan_rd.models.llama.shape import LlamaShape


def tiny_config(**fields) -> LlamaShape:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 61}
    return LlamaShape(**{**shape, **fields})


@torch.no_grad()
def initialise(model: Llama, seed: int = 0) -> Llama:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, fill in inits(model).items():
        fill(parameters[name], generator)
    return model


def tiny_llama(**fields) -> Llama:
    return initialise(Llama(tiny_config(**fields)))


def some_tokens(batch: int = 2, length: int = 24, vocab_size: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
