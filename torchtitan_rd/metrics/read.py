"""The rows and the config that a run has left in its folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import tomli

from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger


@dataclass(frozen=True)
class RunRecord:
    """name: of the folder. rows: of metrics.jsonl, by step. config: section -> key -> value;
    empty if not there.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the rows that have a finite number under `key`."""
        found = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def restarts(self) -> list[int]:
        """Steps of the checkpoints from which it went on."""
        return [row["resumed_from"] for row in self.rows if "resumed_from" in row]

    def keys(self) -> list[str]:
        """Of all rows, in the order in which they first appear."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def is_number(value: Any) -> TypeGuard[float]:
    """Of a cell of a row: whether it can be drawn. Ours are finite or null; JSON of others may hold NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> RunRecord:
    """folder: job.dump_folder. Raises ConfigError if there is no run, DataError if its files
    cannot be read.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run: it has no {path.name}; name the job.dump_folder of one")
    rows, torn = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            torn.append(number)
    if torn:
        logger.warning("%s: left out unreadable lines %s", path, torn)
    if not rows:
        raise DataError(f"{path} has no rows yet")
    config_path = folder / "config.toml"
    try:
        config = tomli.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{config_path} is no readable TOML: {error}") from None
    return RunRecord(folder.resolve().name, folder, sorted(rows, key=lambda row: row["step"]), config)
