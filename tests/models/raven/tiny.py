"""Tiny ravens, initialised as training initialises them, and their inputs."""

import torch

from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.raven.init import inits
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.shape import RavenShape

VOCAB = 61
RETROFITTED = {  # what a dense Llama becomes, every field away from Huginn's
    "block": "pre",
    "final_norm": "once",
    "qk_bias": False,
    "init_strategy": "scaled",
    "n_kv_heads": 2,
    "head_dim": 16,
    "norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16),
    "tie_word_embeddings": False,
}


def tiny_config(**fields) -> RavenShape:
    shape = {
        "dim": 32,
        "n_heads": 4,
        "ffn_dim": 48,
        "n_layers_prelude": 1,
        "n_layers_core": 2,
        "n_layers_coda": 1,
        "mean_recurrence": 6,
        "mean_backprop_depth": 3,
        "vocab_size": VOCAB,
    }
    return RavenShape(**{**shape, **fields})


@torch.no_grad()
def tiny_raven(seed: int = 0, **fields) -> Raven:
    """With norms and biases off their initial 1 and 0, so that a test sees them."""
    model = Raven(tiny_config(**fields))
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, fill in inits(model).items():
        fill(parameters[name], generator)
        if "norm" in name or "ln_f" in name or "qk_bias" in name:
            parameters[name] += 0.2 * torch.randn(parameters[name].shape, generator=generator)
    return model


def some_tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_state(batch: int = 2, length: int = 12, dim: int = 32, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))
