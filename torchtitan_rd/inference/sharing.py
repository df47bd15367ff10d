"""Which slot of the cache each application of a core layer writes and reads (`--kv`).

A slot holds keys and values of all positions. Iteration t (from 0) of core layer j, of c core layers, has the
number i = t c + j among the applications, and by default the slot i. A strategy is a rule for positions that
were left after fewer iterations than another position asks for, a compression, or both
(`latest-m4-compress-s16`):

    full, skip                such a position is not attended to in deeper iterations
    latest-m4, available-m4   it shows its newest iteration's instead
    always-last-m4            every earlier position always shows its last iteration's: one slot a core layer
    compress-sN               slot i mod N: the last write counts
    compress-rN               slot i div N: so it does of N applications that follow each other
    compress-anchor           the first 8 iterations have their own, those after them share c slots

Source: HuginnDynamicCache of the model that is released with arXiv 2502.05171, whose names these are; "m4"
says that it has 4 core layers. There, `full` and `skip` differ in name alone, and so do `latest` and
`available`; `always-last` there takes effect only where a position is missing.
"""

import re

from torchtitan_rd.errors import ConfigError, nearest

LOOKUPS = ("full", "skip", "latest-m4", "available-m4", "always-last-m4")
NAMES = (*LOOKUPS, "compress-s4", "compress-r4", "compress-anchor")
_ANCHORED = 8
_COMPRESSION = re.compile(r"compress-(?:(?P<kind>[sr])(?P<n>\d+)|anchor)")


class Sharing:
    """A strategy for a model with `core` layers in its recurrence and at most `depth` iterations.

    name: as above. Raises ConfigError for an unknown name and for one that this model cannot have.
    """

    def __init__(self, name: str, core: int, depth: int):
        self.name = name
        self.core, self.depth = core, depth
        self.lookup = next(
            (lookup for lookup in LOOKUPS if name == lookup or name.startswith(f"{lookup}-")), ""
        )

        # What is left of the name is a compression, or nothing.
        rest = name.removeprefix(self.lookup).removeprefix("-" if self.lookup else "")
        match = _COMPRESSION.fullmatch(rest)
        if match is None and (rest or name != self.lookup or not name):
            raise ConfigError(
                f"kv = {name!r} is no strategy{nearest(name, NAMES)}; there are {', '.join(LOOKUPS)}, "
                f"compress-sN, compress-rN, compress-anchor, and a lookup and a compression joined by '-'"
            )
        self.lookup = self.lookup or "full"
        kind, number = ("", "") if match is None else match.group("kind", "n")
        self.compression = kind or ("" if match is None else "anchor")
        self.group = n = int(number or 0)

        for wrong, problem in (
            (self.compression in ("s", "r") and n == 0, "N must be at least 1"),
            (
                self.compression == "s" and core and n % core,
                f"N must be a multiple of the model's {core} core layers",
            ),
            (
                self.compression == "r" and n and n % core and core % n if core else False,
                f"N must divide the model's {core} core layers, or be a multiple of it",
            ),
            (
                self.lookup == "always-last-m4" and self.compression,
                "has one slot a core layer: nothing is left to compress",
            ),
        ):
            if wrong:
                raise ConfigError(f"kv = {name!r}: {problem}")

    def slot(self, step: int, layer: int) -> int:
        """The slot, from 0, of core layer `layer` in iteration `step`, from 0."""
        i = step * self.core + layer
        if self.lookup == "always-last-m4":
            return layer
        if self.compression == "s":
            return i % self.group
        if self.compression == "r":
            return i // self.group
        if self.compression == "anchor" and step >= _ANCHORED:
            return _ANCHORED * self.core + layer
        return i

    @property
    def slots(self) -> int:
        """Slots of the core that `depth` iterations need."""
        return self.written(self.depth)

    @property
    def is_exact(self) -> bool:
        """Whether every iteration reads what the same iteration of earlier positions wrote,
        if none of these was left
        early: cached and uncached generation are then the same.
        """
        return self.lookup != "always-last-m4" and not self.compression

    @property
    def fills(self) -> bool:
        """Whether a position that is left early shows older keys and values in deeper iterations."""
        return self.lookup in ("latest-m4", "available-m4")

    def written(self, steps: int) -> int:
        """How many slots, which are the first ones, a position holds after `steps` iterations."""
        applications = steps * self.core
        if self.lookup == "always-last-m4":
            return min(applications, self.core)
        if self.compression == "s":
            return min(applications, self.group)
        if self.compression == "r":
            return -(-applications // self.group)  # rounded up
        if self.compression == "anchor":
            return min(applications, (_ANCHORED + 1) * self.core)
        return applications

    def shown(self, steps: int) -> list[int]:
        """For each slot, the slot whose content a position shows there that was left after `steps`
        iterations: the newest one that it holds of the same core layer. Of `compress-r` with N >= c, where a
        slot has all layers: the newest."""
        period = self.core
        if self.compression == "r":
            period = max(self.core // self.group, 1)
        held = self.written(steps)
        return [
            slot if slot < held or not steps else held - 1 - (held - 1 - slot) % period
            for slot in range(self.slots)
        ]
