"""How a Llama's parameters start."""

import math
from functools import partial

from torchtitan_rd.model_spec import InitFn
from torchtitan_rd.models.layers import normal_, ones_
from torchtitan_rd.models.llama.model import Llama


def inits(model: Llama) -> dict[str, InitFn]:
    """How each unique parameter starts, by its name in the unwrapped model.

    wq, wk, wv, w1: std init_std. (The ancestor cuts at an absolute 2, which is 100 std: no cut.)
    wo, w2, w3: init_std / sqrt(2 * number of layers up to this one), or of all layers without depth_init.
    Head: std dim^-0.5, cut at 3 std. Embedding: std 1. Tied, they have init_std, as Hugging Face's: a token's
    own embedding is most of the first residual stream, so a larger one would make each token predict itself.
    Norms: 1.
    """
    shape = model.shape
    fills: dict[str, InitFn] = {}
    for name, _ in model.named_parameters():  # a shared parameter comes once, under its first name
        parts = name.split(".")
        if parts[-2] == "tok_embeddings" and not shape.tie_word_embeddings:
            fills[name] = partial(normal_, std=1.0)
        elif parts[-2] == "output":
            fills[name] = partial(normal_, std=shape.dim**-0.5, cut=3.0)
        elif parts[-2].endswith("norm"):
            fills[name] = ones_
        elif parts[-2] in ("wo", "w2", "w3"):
            depth = int(parts[1]) + 1 if shape.depth_init else shape.n_layers
            fills[name] = partial(normal_, std=shape.init_std / math.sqrt(2 * depth))
        else:
            fills[name] = partial(normal_, std=shape.init_std)
    return fills
