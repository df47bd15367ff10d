"""Matrices made of several, shared out by rows: which row lies where.

A raven's Wqkv is queries, keys and values in one, its fc gate and up. Under tensor parallelism a rank needs
its share of each of them, but a sharded tensor gives it neighbouring rows. So the rows are arranged: those of
rank 0 first, part by part, then those of rank 1. Checkpoints hold them in the order of the model, whatever
the degree: there the arranged rows are written, and read, as the runs of neighbours that they are.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """Rows that are neighbours in both orders.

    arranged, original: the first of them in each. length: how many.
    """

    arranged: int
    original: int
    length: int


@dataclass(frozen=True)
class RowOrder:
    """parts: rows of each matrix in the whole one, in the order of the model. degree: of the ranks."""

    parts: tuple[int, ...]
    degree: int

    @property
    def rows(self) -> int:
        return sum(self.parts)

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run]:
        """Those of the arranged rows start .. stop - 1, in the arranged order."""
        stop = self.rows if stop is None else stop
        found, arranged = [], 0
        firsts = [0, *accumulate(self.parts)]
        for rank in range(self.degree):
            for first, size in zip(firsts, self.parts, strict=False):
                share = size // self.degree
                begin, end = max(start, arranged), min(stop, arranged + share)
                if begin < end:
                    found.append(Run(begin, first + rank * share + begin - arranged, end - begin))
                arranged += share
        return found

    def arrange(self, original: torch.Tensor) -> torch.Tensor:
        """(rows, ...) in the model's order -> in the arranged one; a copy."""
        return torch.cat([original.narrow(0, run.original, run.length) for run in self.runs()])

    def restore(self, arranged: torch.Tensor) -> torch.Tensor:
        """The inverse of `arrange`."""
        runs = sorted(self.runs(), key=lambda run: run.original)
        return torch.cat([arranged.narrow(0, run.arranged, run.length) for run in runs])
