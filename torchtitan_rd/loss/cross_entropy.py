"""The training objective, always as a SUM over valid tokens: the caller divides by their global number."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


class LossSums(NamedTuple):
    objective: torch.Tensor
    """What is differentiated: cross entropy plus z-loss, summed over the valid tokens."""
    cross_entropy: torch.Tensor
    """What is reported, in nats, summed over the valid tokens; detached."""


def count_valid(labels: torch.Tensor) -> torch.Tensor:
    """The number of labels that are not ignored (int64 scalar on the labels' device)."""
    return (labels != IGNORE_INDEX).sum()


def cross_entropy_sums(logits: torch.Tensor, labels: torch.Tensor, z_loss_weight: float = 0.0) -> LossSums:
    """Next-token loss of `logits` (B, S, V) against `labels` (B, S) int64, ignoring labels of -100.

    z-loss: z_loss_weight * logsumexp(logits)^2 for every valid token (PaLM, arXiv 2204.02311, section 5).
    """
    logits, labels = logits.flatten(0, 1), labels.flatten()
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if z_loss_weight == 0.0:
        return LossSums(cross_entropy, cross_entropy.detach())
    squares = logits.logsumexp(dim=-1).square()
    z_loss = torch.where(labels != IGNORE_INDEX, squares, 0.0).sum()
    return LossSums(cross_entropy + z_loss_weight * z_loss, cross_entropy.detach())
