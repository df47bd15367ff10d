"""Several sources of a Huginn run config, and how their weights change, as [[training.mixture]].

There a schedule counts microbatches from 0 and is asked before each update (seal-rg/recurrent-pretraining,
recpre/data_scheduler_utils.py): before update u it stands at the microbatches of the updates before. Shares
are weights over their sum, as here.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.huginn_keys import PACKED
from torchtitan_rd.job import expand_variables

_MOST_PIECES = 1000  # of one schedule, where a wave or its steps must be written out
_FILLS = {"base": "rest", "base-renorm": "gaps"}
_ALL = 100.0  # what the weights of a config with a base add up to
_KEYS = ("type", "prefix", "weight", "name", "data_dir", "max_epoch", "scheduler")
_HARMLESS = ("data_signature", "text_key", "repetitions", "return_data_id")  # of other types than packed rows


@dataclass
class Clock:
    """updates_in: how many updates the first so many microbatches make. length: of the run, in microbatches.
    rounded: whether a step was asked for that lies within an update.
    """

    updates_in: Callable[[int], float]
    length: int
    rounded: bool = False

    def step_at(self, microbatch: int) -> int:
        """The first step that is drawn at this microbatch or later; the first of all is 1."""
        updates = self.updates_in(microbatch)
        whole = math.ceil(updates - 1e-9)
        self.rounded |= abs(whole - updates) > 1e-9
        return 1 + whole


def mixture_of(entries: Sequence[Any], clock: Clock) -> tuple[list[dict[str, Any]], list[str]]:
    """Entries of data_config.train_data as entries of training.mixture, and what is to be told.

    Raises one ConfigError with all that cannot be carried over.
    """
    sources: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        where = f"data_config.train_data[{number}]"
        try:
            source = _source(entry, clock)
        except ConfigError as error:
            problems += [f"{where}: {line}" for line in str(error).splitlines()]
            continue

        taken = {one["name"] for one in sources}
        source["name"] = next(
            name
            for name in (source["name"], *(f"{source['name']}-{i}" for i in range(2, len(entries) + 2)))
            if name not in taken
        )
        sources.append(source)

    if sum("fills" in source for source in sources) > 1:
        problems.append("data_config.train_data: several entries are a base; there the last of them is")
    if problems:
        raise ConfigError("\n".join(problems))
    notes = ["data_config.train_data is drawn row by row from the seed, not in the order of that trainer"]
    if clock.rounded:
        notes.append(
            "data_config.train_data: steps of its schedules that lie within an update are rounded up"
        )
    return sources, notes


def path_of(entry: dict[str, Any]) -> str:
    """The files of an entry, as a pattern, which is read whole whatever its files are named after."""
    folder = Path(expand_variables(str(entry["data_dir"])))
    return str(folder / str(entry.get("prefix") or "") / "*.parquet")


def _source(entry: Any, clock: Clock) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"is {entry!r}; expected a table")
    problems = [f"unknown field {key!r}" for key in entry if key not in (*_KEYS, *_HARMLESS)]
    if entry.get("type") not in PACKED or not entry.get("data_dir"):
        problems.append(
            f"type {entry.get('type')!r} is not carried over; only {' and '.join(PACKED)} with a data_dir are"
        )
    weight, epochs = entry.get("weight", 1), entry.get("max_epoch")
    if not _is_number(weight):
        problems.append(f"weight = {weight!r} must be a number of at least 0")
    if epochs is not None and not (_is_count(epochs) and epochs >= 1):
        problems.append(f"max_epoch = {epochs!r} must be a whole number of at least 1")
    if problems:
        raise ConfigError("\n".join(problems))

    name = str(entry.get("name") or entry.get("prefix") or "source")
    name = re.sub("[^A-Za-z0-9_-]+", "-", name).strip("-")
    source = {
        "name": name if name[:1].isalpha() else f"source-{name}".rstrip("-"),
        "dataset": "packed",
        "dataset_path": path_of(entry),
        **_schedule(entry.get("scheduler"), float(weight), clock),
    }
    return source | ({} if epochs is None else {"max_epochs": epochs})


def _schedule(scheduler: Any, weight: float, clock: Clock) -> dict[str, Any]:
    """The keys of a source that say its weight."""
    if scheduler is None:
        return {"weight": weight}
    if not isinstance(scheduler, list | tuple) or not scheduler:
        raise ConfigError(f"scheduler = {scheduler!r} must be a list that begins with its name")
    if isinstance(scheduler[0], str) and scheduler[0] in _FILLS:
        return {"weight": _ALL, "fills": _FILLS[scheduler[0]]}

    phases: list[Any] = [[0, scheduler]] if isinstance(scheduler[0], str) else list(scheduler)
    if not all(isinstance(p, list | tuple) and len(p) == 2 and _is_count(p[0]) for p in phases):
        raise ConfigError(f"scheduler = {scheduler!r}: expected pairs of a microbatch and a schedule")
    begins = [int(phase[0]) for phase in phases]
    if begins != sorted({*begins}):
        raise ConfigError(f"scheduler: its pieces begin at {begins}: expected a growing order")

    pieces: list[dict[str, Any]] = []
    for begin, end, (_, phase) in zip(begins, [*begins[1:], clock.length], phases, strict=True):
        pieces += _pieces(phase, begin, max(end, begin + 1), clock)
    # Of several that begin within one update, the last is the one that is asked.
    by_step = {piece["start_step"]: piece for piece in pieces}
    if len(by_step) == 1 and 1 in by_step:
        alone = by_step[1]
        return alone if "schedule" in alone else {"weight": alone["weight"]}
    return {"weight": weight, "pieces": list(by_step.values())}


def _pieces(phase: Any, begin: int, end: int, clock: Clock) -> list[dict[str, Any]]:
    """A schedule that is not made of others, from microbatch `begin` to `end`; it counts from `begin`."""
    given: list[Any] = list(phase) if isinstance(phase, list | tuple) and phase else [None]
    kind, numbers = str(given[0]), given[1:]
    if kind in _FILLS:  # within pieces there, a base weighs nothing
        return [{"weight": 0.0, "start_step": clock.step_at(begin)}]
    if kind == "linear" and len(numbers) == 2:
        numbers = [*numbers, clock.length]
    if {"const": 1, "linear": 3, "cosine": 3, "step": 3}.get(kind) != len(numbers):
        raise ConfigError(
            f"scheduler {phase!r}: expected const and a weight; linear and two weights (and microbatches); "
            "cosine, two weights and microbatches; or step, a weight, microbatches and a factor"
        )
    spans = {"linear": 2, "cosine": 2, "step": 1}
    if not all(map(_is_number, numbers)) or (kind in spans and not numbers[spans[kind]] >= 1):
        raise ConfigError(f"scheduler {phase!r}: weights and factors are at least 0, microbatches at least 1")

    weight = float(numbers[0])
    if kind == "const":
        return [{"weight": weight, "start_step": clock.step_at(begin)}]
    span = int(numbers[spans[kind]])
    if kind == "linear":
        return [_line(kind, weight, float(numbers[1]), begin, begin + span, clock)]
    # A wave begins anew after its end there, and each step down is a piece.
    starts = range(begin, end, span)
    if len(starts) > _MOST_PIECES:
        raise ConfigError(f"scheduler {phase!r}: changes {len(starts)} times, more than {_MOST_PIECES}")
    if kind == "cosine":
        return [_line(kind, weight, float(numbers[1]), start, start + span, clock) for start in starts]
    factor = float(numbers[2])
    return [
        {"weight": weight * factor**number, "start_step": clock.step_at(start)}
        for number, start in enumerate(starts)
    ]


def _line(kind: str, weight: float, last: float, begin: int, end: int, clock: Clock) -> dict[str, Any]:
    first_step, last_step = clock.step_at(begin), clock.step_at(end)
    if first_step == last_step:
        return {"weight": last, "start_step": first_step}
    ends = {"schedule": kind, "end_weight": last, "end_step": last_step}
    return {"weight": weight, "start_step": first_step, **ends}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
