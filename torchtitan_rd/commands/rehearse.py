"""Goes through the whole life of a run once, small, on this machine, and says what would not do.

torchtitan-rd rehearse train_configs/primate_8b_131k.toml --ranks 144
torchtitan-rd rehearse X.toml --training.dataset_path /data/rows      # with any overrides of the run
REHEARSE=1 bash train_primate_8B_131k.sh                              # the same, on the ranks of its header

The file is checked on its own number of ranks and at its own size. Then it is made small by a declared rule,
which is printed key by key, and trained by 2 or 4 processes on the CPU: train, save, kill, resume on another
number of ranks, validate, export, generate. Status 0: all is go. docs/rehearsal.md describes it.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate

from torchtitan_rd.commands.arguments import at_least_1
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.diagnosis.hub import why_unreachable
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment, work_offline
from torchtitan_rd.rehearsal import Change, Line, Options, Rehearsal, Verdict

LIMIT = 300
INTERRUPTED = 130  # as shells say it of Ctrl-C


def main(arguments: list[str]) -> int:
    """Prints a line a stage as it ends; returns 1 if one is a no-go, 130 if it was interrupted."""
    chosen, overrides = _parser().parse_known_args(arguments)
    environment = Environment.read()
    if environment.world_size > 1:
        raise ConfigError("rehearse starts its own ranks: call it without torchrun")
    asked = ["--job.config_file", chosen.config, *overrides]
    folder = _folder(chosen.keep)
    options = Options(asked, environment, chosen.ranks, folder, chosen.limit, _hub_answers)

    print(f"rehearsal of {chosen.config}", flush=True)
    rehearsal, lines = Rehearsal(options), []
    try:
        with _sigterm_is_ctrl_c():
            for line in rehearsal.lines():
                lines.append(line)
                print(_shown(line), flush=True)
                if line.stage == "shrink" and rehearsal.changes:
                    print(_table(rehearsal.changes), flush=True)
    except KeyboardInterrupt:
        _clear(folder, chosen.keep, is_good=True)  # nobody will look there
        print("interrupted: no verdict", file=sys.stderr)
        return INTERRUPTED
    except BaseException:
        _clear(folder, chosen.keep, is_good=True)
        raise
    wrong = [line.stage for line in lines if line.verdict is Verdict.NO_GO]
    _clear(folder, chosen.keep, is_good=not (wrong and any(folder.iterdir())))
    print(_conclusion(lines, rehearsal.made_up, folder if folder.exists() else None))
    return int(bool(wrong))


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """So that the processes of a stage end, and the folder is cleared, where a job or a service is ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hub_answers() -> bool:
    """Asked before a library of the hub is imported, so that it can be told not to ask again."""
    why = why_unreachable()
    if why is not None:
        work_offline()
    return why is None


def _folder(keep: str | None) -> Path:
    """Raises ConfigError for one that is not empty, or cannot be made."""
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="rehearsal-"))
    folder = Path(keep).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--keep {keep}: this folder is not empty; name another one")
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}") from None
    return folder


def _clear(folder: Path, keep: str | None, is_good: bool) -> None:
    if keep is None and is_good:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(line: Line) -> str:
    seconds = f"{line.seconds:6.1f} s" if line.verdict is not Verdict.NOT_TRIED else " " * 8
    head = f"{line.verdict.value:<6} {line.stage:<9}{seconds}  "
    paragraphs = [
        textwrap.fill(text, 110, subsequent_indent=" " * len(head), initial_indent=" " * len(head))
        for text in line.text.splitlines()
    ]
    return head + "\n".join(paragraphs).lstrip()


def _table(changes: list[Change]) -> str:
    rows = [(c.key, _short(c.before), _short(c.after), c.why) for c in changes]
    headers = ("altered", "of the run", "here", "why")
    return "\n" + tabulate(rows, headers=headers, disable_numparse=True) + "\n"


def _short(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 36 else f"...{text[-33:]}"


def _conclusion(lines: list[Line], made_up: list[str], folder: Path | None) -> str:
    """GO, with what that says nothing about; or what stands in the way. folder: that is kept."""
    wrong = [line.stage for line in lines if line.verdict is Verdict.NO_GO]
    seconds = sum(line.seconds for line in lines)
    said = [f"NO-GO: {', '.join(wrong)}" if wrong else f"GO in {seconds:.0f} s"]
    untried = [line.stage for line in lines if line.verdict is Verdict.NOT_TRIED]
    if untried and not wrong:
        said.append(f"not tried: {', '.join(untried)}")
    if made_up and not wrong:
        said.append(f"made up here, and needed by the run: {', '.join(made_up)}")
    if folder is not None:
        said.append(f"logs and files: {folder}")
    return "\n".join(said)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "rehearse",
        __doc__,
        usage="%(prog)s X.toml [--ranks N] [--keep DIR] [--limit SECONDS] [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="the file of the run")
    parser.add_argument(
        "--ranks", type=at_least_1, help="that the run is for (default: the fewest it allows)"
    )
    parser.add_argument("--keep", metavar="DIR", help="an empty folder, where all that is written stays")
    parser.add_argument(
        "--limit", type=at_least_1, default=LIMIT, help=f"seconds that a stage may take (default {LIMIT})"
    )
    return parser
