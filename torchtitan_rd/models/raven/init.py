"""How a raven's parameters start."""

import math
from functools import partial

import torch
from torch import nn

from torchtitan_rd.model_spec import InitFn
from torchtitan_rd.models.layers import normal_, ones_
from torchtitan_rd.models.raven.model import Raven


def inits(model: Raven) -> dict[str, InitFn]:
    """How each unique parameter starts, by its name in the unwrapped model.

    std = sqrt(2 / (5 dim)); attn.proj and mlp.proj: std / sqrt(2 * effective depth); normals cut at 3 std,
    or orthogonal matrices (one for each of query, key and value, and of gate and up) whose entries have
    that rms. Norms: 1; qk_bias: 0. An adapter that starts as the identity: [0 | I]. Source: takase (arXiv
    2312.16903) and scaled (arXiv 2210.15424) as Huginn was trained with: both halves of fc have std, although
    the released modelling file gives the second one that of the projections.
    """
    shape = model.shape
    heads, kv_heads, head_dim = shape.attention_shape
    fused = {"Wqkv": (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), "fc": (shape.ffn_dim,) * 2}
    fills: dict[str, InitFn] = {}
    for name, _ in model.named_parameters():  # a shared parameter comes once, under its first name
        parts = name.split(".")
        if parts[-1] == "qk_bias":
            fills[name] = zeros_
        elif parts[-2].startswith(("norm_", "ln_f")):
            fills[name] = ones_
        elif parts[-2] == "adapter" and shape.adapter_start == "identity":
            fills[name] = pass_input_
        else:
            std = shape.weight_std / (math.sqrt(2 * shape.effective_depth) if parts[-2] == "proj" else 1.0)
            if shape.init_orthogonal:
                fills[name] = partial(orthogonal_, std=std, rows=fused.get(parts[-2]))
            else:
                fills[name] = partial(normal_, std=std, cut=3.0)
    return fills


def orthogonal_(
    tensor: torch.Tensor, generator: torch.Generator, std: float, rows: tuple[int, ...] | None
) -> None:
    """Fills each group of `rows` (None: all) with a uniformly drawn semi-orthogonal matrix of
    root mean square std.
    """
    for part in tensor.split(rows) if rows else (tensor,):
        nn.init.orthogonal_(part, std * math.sqrt(max(part.shape)), generator)


def pass_input_(tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Fills the adapter (E, 2 E) with [0 | I]: of [s, e] it gives e. The generator is not touched."""
    nn.init.zeros_(tensor)
    tensor[:, len(tensor) :].fill_diagonal_(1.0)


def zeros_(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fills with zeros; the generator is not touched."""
    nn.init.zeros_(tensor)
