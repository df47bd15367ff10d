"""How a raven is served: what `hf_overrides` may say beside the shape. Needs neither vLLM nor torch.

mean_recurrence   R iterations for every token; by default what config.json says
kv_cache          how iterations share keys and values (`KVCache`)
state_seed        the first state is noise from (state_seed, position); null: from the device's generator
exit_criterion    "latent-diff" lets a whole batch step leave the recurrence early; "none"
exit_threshold    of the criterion
exit_min_steps    iterations that every token gets
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

MODEL_TYPE = "huginn_raven"
NEVER, LATENT_DIFF = "none", "latent-diff"
CRITERIA = (NEVER, LATENT_DIFF)
MOST = 10_000
"""Iterations: more are a mistake, for which caches would be made for ever."""
WORDS = "full, latest-m4, compress-sN, latest-m4-compress-sN"
_WORD = re.compile(r"full|latest-m4|(?:latest-m4-)?compress-s(?P<n>\d+)", re.ASCII)


class ServingError(ValueError):
    """A setting that this model or this way to serve it cannot have. One line, with the remedy."""


@dataclass(frozen=True)
class Serving:
    """The settings above, checked. Raises ServingError."""

    mean_recurrence: int
    kv_cache: str = "full"
    state_seed: int | None = 0
    exit_criterion: str = NEVER
    exit_threshold: float = 0.03
    exit_min_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("mean_recurrence", "exit_min_steps"):
            value = getattr(self, name)
            if not _is_whole(value) or not 1 <= value <= MOST:
                raise ServingError(f"{name} = {value!r} must be a number of iterations from 1 to {MOST}")
        if self.state_seed is not None and not _is_whole(self.state_seed):
            raise ServingError(f"state_seed = {self.state_seed!r} is neither a whole number nor null")

        if self.exit_criterion not in CRITERIA:
            hint = nearest(self.exit_criterion, CRITERIA)
            raise ServingError(f"exit_criterion = {self.exit_criterion!r} is not served{hint}")
        number = isinstance(self.exit_threshold, int | float) and not isinstance(self.exit_threshold, bool)
        if not number or not 0 <= self.exit_threshold < math.inf:
            raise ServingError(f"exit_threshold = {self.exit_threshold!r} must be a number of at least 0")

    @property
    def exits(self) -> bool:
        return self.exit_criterion != NEVER

    @staticmethod
    def of(config: Any, core: int) -> "Serving":
        """From a config that has been overridden. core: layers of its recurrence. Raises ServingError."""
        given = {field.name: getattr(config, field.name) for field in fields(Serving)}
        serving = Serving(**given)
        KVCache(serving.kv_cache, core, serving.mean_recurrence).check_exits(serving.exits)
        return serving


OWN = tuple(field.name for field in fields(Serving))


class KVCache:
    """Which place each application of a core layer has for its keys and values.

    Iteration t (from 0) of core layer j, of c, is application i = t c + j.

        full, latest-m4                     each application has a place of its own
        compress-sN, latest-m4-compress-sN  place i mod N: the last write counts

    With "latest-m4" a token that left early shows its newest iteration to deeper ones. Without it such a
    token would have to be absent from them, which vLLM has no mask for: these go with no exit. Names and
    meaning are those of the class released with arXiv 2502.05171, whose core has 4 layers.
    """

    def __init__(self, name: str, core: int, depth: int):
        match = _WORD.fullmatch(str(name))
        if match is None:
            known = ("full", "latest-m4", f"compress-s{core}", f"latest-m4-compress-s{core}")
            raise ServingError(
                f"kv_cache = {name!r} is no strategy that is served, only {WORDS}"
                f"{nearest(str(name), known, '')}"
            )
        self.name = name
        self.core, self.depth = core, depth
        self.fills = name.startswith("latest-m4")
        self.most = None if match["n"] is None else int(match["n"])
        if self.most is not None and (self.most == 0 or (core and self.most % core)):
            raise ServingError(
                f"kv_cache = {name!r}: {self.most} must be a multiple of the model's {core} core layers"
            )

    def check_exits(self, exits: bool) -> None:
        """Raises ServingError if tokens may leave early, and these places cannot hold that."""
        if exits and not self.fills:
            remedy = "latest-m4" if self.most is None else f"latest-m4-compress-s{self.most}"
            raise ServingError(
                f"kv_cache = {self.name!r} hides a token that left early from deeper iterations, which vLLM "
                f"cannot: use kv_cache = {remedy!r} with exit_criterion"
            )

    @property
    def is_shared(self) -> bool:
        """Whether some iterations write over others: what a token sees then depends on which tokens were
        computed together with it."""
        return self.most is not None and self.most < self.depth * self.core

    def place(self, step: int, layer: int) -> int:
        """Of core layer `layer` in iteration `step`, both from 0."""
        i = step * self.core + layer
        return i if self.most is None else i % self.most

    def written(self, steps: int) -> int:
        """Places, which are the first ones, that a token fills in `steps` iterations."""
        return steps * self.core if self.most is None else min(steps * self.core, self.most)

    @property
    def places(self) -> int:
        return self.written(self.depth)

    def unwritten(self, steps: int) -> list[tuple[int, int]]:
        """After `steps` iterations: each place that is left, and the core layer whose newest keys and values
        belong there."""
        return [(place, place % self.core) for place in range(self.written(steps), self.places)]


def check_parallel(ranks: int, heads: int, kv_heads: int, sizes: Mapping[str, int]) -> None:
    """Whether `ranks` tensor-parallel ranks can share the heads, and each of `sizes`. Raises ServingError."""
    if ranks < 1:
        raise ServingError(f"tensor-parallel-size = {ranks} must be at least 1")
    if heads % ranks:
        raise ServingError(f"tensor-parallel-size = {ranks} does not divide the model's {heads} heads")
    if kv_heads % ranks and ranks % kv_heads:
        raise ServingError(
            f"tensor-parallel-size = {ranks} neither divides the model's {kv_heads} heads of keys and values "
            "nor is a multiple of them"
        )
    for name, size in sizes.items():
        if size % ranks:
            raise ServingError(f"tensor-parallel-size = {ranks} does not divide {name} = {size}")


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """`; did you mean X?` for a close match, else `otherwise`, by default the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
