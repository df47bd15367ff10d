"""The training objective: cross entropy as a sum over valid tokens, goldfish masking, and a guard on the result."""

from torchtitan_rd.loss.config import ObjectiveKeys
from torchtitan_rd.loss.cross_entropy import IGNORE_INDEX, LossSums, count_valid, cross_entropy_sums
from torchtitan_rd.loss.goldfish import goldfish_labels
from torchtitan_rd.loss.guard import exceeds_guard, guard_error

__all__ = [
    "IGNORE_INDEX",
    "LossSums",
    "ObjectiveKeys",
    "count_valid",
    "cross_entropy_sums",
    "exceeds_guard",
    "goldfish_labels",
    "guard_error",
]
