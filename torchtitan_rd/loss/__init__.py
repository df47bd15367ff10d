"""The training objective: cross entropy as a sum over valid tokens, goldfish masking, and a guard on the result."""

from torchtitan_rd.loss.config import ObjectiveKeys
from torchtitan_rd.loss.cross_entropy import LossSums, count_valid, cross_entropy_sums
from torchtitan_rd.loss.goldfish import goldfish_labels
from torchtitan_rd.loss.guard import exceeds_guard, guard_error

__all__ = [
    "LossSums",
    "ObjectiveKeys",
    "count_valid",
    "cross_entropy_sums",
    "exceeds_guard",
    "goldfish_labels",
    "guard_error",
]
