"""Goldfish loss (Hans et al., arXiv 2406.10209): labels that are left out, by position or by their context."""

from functools import cache

import torch

from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.loss.config import ObjectiveKeys

_TABLE_SIZE, _TABLE_SEED = 1_000_003, 2971215073  # two primes


def goldfish_labels(labels: torch.Tensor, config: ObjectiveKeys) -> torch.Tensor:
    """`labels` (B, S) int64 on any device -> the same with the left-out ones set to -100; a copy if any can be.

    static: positions start, start + k, ... of every row.
    hash-table: each window of `context_width` labels leaves out its last with a chance of 1/k, drawn from a table of
    uniforms by the product of its labels (int64, wrapping) modulo the table's size. So positions 0 .. width - 2 are
    always kept, and a label of -100 in the window counts as that number.
    Must come before valid labels are counted.
    """
    if config.goldfish_strategy == "none":
        return labels
    labels = labels.clone()
    if config.goldfish_strategy == "static":
        labels[:, config.goldfish_start_position :: config.goldfish_k] = IGNORE_INDEX
        return labels
    width = config.goldfish_context_width
    if labels.shape[1] >= width:
        places = labels.unfold(1, width, 1).prod(dim=-1) % _TABLE_SIZE
        left_out = _uniforms(labels.device)[places] < 1 / config.goldfish_k
        labels[:, width - 1 :].masked_fill_(left_out, IGNORE_INDEX)
    return labels


@cache
def _uniforms(device: torch.device) -> torch.Tensor:
    """The table: 4 MB, made at the first use; drawn on the CPU, so that every device has the same numbers."""
    return torch.rand(_TABLE_SIZE, generator=torch.Generator().manual_seed(_TABLE_SEED)).to(device)
