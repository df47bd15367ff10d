"""Tiny models as they come from disk, and generation without any cache to compare with."""

from pathlib import Path

import torch

from tests.conversion.common import tiny
from torchtitan_rd.data import Tokenizer
from torchtitan_rd.inference import Loaded
from torchtitan_rd.inference.loading import Source
from torchtitan_rd.models import get_spec

VOCAB = 61


@torch.no_grad()
def loaded(family: str, tokenizer: Tokenizer | None = None, sharp: float = 2.0, **fields) -> Loaded:
    """sharp: factor on some matrices, so that tokens depend on earlier ones; more makes the
    recurrence chaotic, and rounding decides the tokens."""
    model = tiny(family, **fields)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("wq", "wk", "wv", "Wqkv", "proj", "wo", "w2")):
            parameter *= sharp
    shape = model.shape
    source = Source(Path("memory"), None, shape.vocab_size, ())
    return Loaded(get_spec(family), shape, model.requires_grad_(False), tokenizer, source)


def prompts(*lengths: int, seed: int = 3, vocab_size: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def logits_without_cache(
    loaded: Loaded, ids: list[int], depth: int | None = None, seed: int = 0, scale: float = 1.0
):
    """(S, V): the whole sequence through the model's own forward."""
    tokens = torch.tensor([ids])
    if depth is None:
        return loaded.model(tokens)[0]
    steps = loaded.spec.steps(loaded.model)
    rows = [steps.first_state(seed, position, scale) for position in range(len(ids))]
    state = None if rows[0] is None else torch.stack(rows)[None]
    return loaded.model(tokens, num_steps=(depth, 0), initial_state=state)[0]


def greedy_without_cache(loaded: Loaded, prompt: list[int], count: int, **options) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_without_cache(loaded, ids, **options)[-1].argmax()))
    return ids[len(prompt) :]
