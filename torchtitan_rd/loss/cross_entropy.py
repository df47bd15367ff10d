"""The training objective, always as a SUM over valid tokens: the caller divides by their global number."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from torchtitan_rd.batch import IGNORE_INDEX


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
    cross_entropy = _CrossEntropySum.apply(logits, labels)
    if z_loss_weight == 0.0:
        return LossSums(cross_entropy, cross_entropy.detach())
    squares = logits.logsumexp(dim=-1).square()
    z_loss = torch.where(labels != IGNORE_INDEX, squares, 0.0).sum()
    return LossSums(cross_entropy + z_loss_weight * z_loss, cross_entropy.detach())


class _CrossEntropySum(torch.autograd.Function):
    """F.cross_entropy(reduction="sum") whose backward holds one tensor of the logits' size instead of two.

    Torch's own goes through the gradient of the log-probabilities, all zero but for one entry a token: filling that
    tensor and reading it again costs more than the softmax itself. Here d logits = (softmax - onehot) d sum directly.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probabilities, labels)
        return F.nll_loss(log_probabilities, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probabilities, labels = ctx.saved_tensors
        valid = (labels != IGNORE_INDEX).unsqueeze(1)
        targets = labels.unsqueeze(1).where(valid, 0)  # any column will do for an ignored label: it gets 0
        scale = torch.where(valid, dsum, 0)

        dlogits = log_probabilities.exp().mul_(scale)
        return dlogits.scatter_add_(1, targets, -scale), None
