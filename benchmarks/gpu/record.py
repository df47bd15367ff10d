"""What was measured on one device: kept case by case in a JSON file, shown as Markdown tables."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.diagnosis.disk import check_writable
from torchtitan_rd.errors import ConfigError

Row = dict[str, Any]


class Record:
    """A file that is written after each case, so that a call which was cut off goes on where it ended.

    environment: of the machine. A file that another torch or device has measured is begun anew.
    Raises ConfigError for a folder that cannot be written, and for a file that is no record.
    """

    def __init__(self, folder: Path, name: str, environment: Mapping[str, Any]):
        self.json = folder / f"{name}.json"
        self.markdown = folder / f"{name}.md"
        self._found: dict[str, Any] = {"environment": dict(environment), "parts": {}}
        check_writable(folder, "--output")  # before minutes of a GPU, not after them
        if self.json.is_file():
            try:
                before = json.loads(self.json.read_text())
            except ValueError as error:
                raise ConfigError(f"{self.json} is no JSON ({error}): move it away to begin anew") from None
            if before["environment"] == self._found["environment"]:
                self._found = before
            else:
                print(f"{self.json} is of another environment: begun anew")

    def is_done(self, part: str, case: str) -> bool:
        """A case that failed is tried again."""
        row = self._found["parts"].get(part, {}).get(case)
        return row is not None and "failed" not in row

    def put(self, part: str, case: str, row: Row) -> None:
        self._found["parts"].setdefault(part, {})[case] = row
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self.json, json.dumps(self._found, indent=1) + "\n")
        self._replace(self.markdown, self.text())

    def rows(self, part: str) -> dict[str, Row]:
        return self._found["parts"].get(part, {})

    def failures(self) -> list[str]:
        return [
            f"{part}, {case}: {row['failed']}"
            for part, rows in self._found["parts"].items()
            for case, row in rows.items()
            if "failed" in row
        ]

    def text(self) -> str:
        """A table a part; its columns are those of any of its rows."""
        environment = [(key, value) for key, value in self._found["environment"].items()]
        tables = ["# environment\n\n" + tabulate(environment, ("what", "here"), tablefmt="github")]
        for part, rows in self._found["parts"].items():
            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            table = [[case, *(_shown(row.get(key)) for key in columns)] for case, row in rows.items()]
            headers = ["case", *columns]
            shown = tabulate(table, headers, tablefmt="github", disable_numparse=True)
            tables.append(f"# {part}\n\n{shown}")
        return "\n\n".join(tables) + "\n"

    def _replace(self, path: Path, text: str) -> None:
        beside = path.with_suffix(path.suffix + ".new")
        beside.write_text(text)
        beside.replace(path)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
