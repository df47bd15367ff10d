"""The line a logged step prints, and on a terminal a progress bar below it."""

import logging
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torchtitan_rd.log import logger

_RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN, _RESET = (
    f"\033[{code}m" for code in (31, 32, 33, 34, 35, 36, 39)
)


class Console:
    """Prints rows through the package's logger.

    On a terminal (stderr) lines are coloured, unless `color` is false, and a tqdm bar shows progress and ETA;
    elsewhere each line ends with them.
    """

    def __init__(self, *, step: int, total_steps: int, color: bool):
        self._total_steps = total_steps
        is_terminal = sys.stderr.isatty()
        self._color = color and is_terminal
        self._bar = None
        self._handlers: list[logging.StreamHandler] = []
        # A terminal of unknown width (some containers and CI) has 0 columns, where a bar would be empty.
        if is_terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=step, unit="step", file=sys.stderr, dynamic_ncols=True
            )
            self._handlers = [
                handler
                for handler in logger.handlers
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
            ]
            self._redirect(_AboveTheBar())

    def log(self, row: Mapping[str, Any]) -> None:
        fields = [self._paint(color, text) for color, text in _fields(row)]
        if self._bar is None:
            step, total = row["step"], self._total_steps
            eta = timedelta(seconds=round((total - step) * row["step_seconds"]))
            fields.append(f"{100 * step / total:.1f}% eta: {eta}")
        logger.info("  ".join(fields))
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._redirect(sys.stderr)

    def _paint(self, color: str, text: str) -> str:
        return f"{color}{text}{_RESET}" if self._color else text

    def _redirect(self, stream: Any) -> None:
        for handler in self._handlers:
            handler.setStream(stream)


class _AboveTheBar:
    """A stream that clears the bar, writes, and draws the bar again, so that log lines and bar do not mix."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def _fields(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    full, causal = row["mfu_full"], row["mfu_causal"]
    mfu = "n/a" if full is None else f"{100 * full:.2f}% (causal {100 * causal:.2f}%)"
    if "memory_max_reserved_gib" in row:
        memory = f"{row['memory_max_reserved_gib']:.2f}GiB({row['memory_max_reserved_pct']:.2f}%)"
    else:
        memory = f"{row['memory_max_rss_gib']:.2f}GiB"
    return [
        (_RED, f"step: {row['step']}"),
        (_GREEN, f"loss: {_number(row['loss'], '.4f')}"),
        (_YELLOW, f"grad_norm: {_number(row['grad_norm'], '.4f')}"),
        (_YELLOW, f"lr: {row['lr']:.3e}"),
        (_BLUE, f"tps: {row['tokens_per_second_per_device']:,.0f}"),
        (_MAGENTA, f"mfu: {mfu}"),
        (_CYAN, f"memory: {memory}"),
    ]


def _number(value: float | None, spec: str) -> str:
    """A row holds null for a number that is not finite."""
    return "not finite" if value is None else format(value, spec)
