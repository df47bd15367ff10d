"""Small wrong edits of the code, each of which a test must notice: does the suite fail when it should?

    python tests/mutations.py                     # all of them; `bash run_tests.sh --mutations` does the same
    python tests/mutations.py --only telemetry    # those with the word in their name, file or tests
    python tests/mutations.py --jobs 2            # so many at a time

The edits are data: `tests/mutations_table/*.toml`, one `[[mutation]]` an edit. `before` must occur exactly
once in `file` and becomes `after`; `tests` are the arguments of pytest that select, narrowly, what must fail
then. An edit that changes nothing that anybody could see says why in `equivalent`.

Each edit is applied to a copy of the repository in a temporary folder, never here. Its tests are first run
without any edit, once for all selections from the same files: a test that fails anyway proves nothing. Exit
status 1 if an edit survives without being equivalent, if one that is called equivalent is killed, or if
there was no verdict.
"""

import argparse
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tomli

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "mutations_table"
LIMIT_SECONDS = 300.0

PYTEST_PASSED, PYTEST_FAILED = 0, 1  # any other exit status: pytest could not run what it was given
KILLED, SURVIVED, EQUIVALENT, NO_VERDICT = "killed", "survived", "equivalent", "no verdict"


@dataclass(frozen=True)
class Mutation:
    """One edit. tests: arguments of pytest. equivalent: why no test can see it; empty for all others."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    equivalent: str = ""

    def split_tests(self) -> tuple[str, str]:
        """-> the files or node ids, and the expression after -k, which comes last; empty without one."""
        files, _, expression = self.tests.partition(" -k ")
        return files, " ".join(shlex.split(expression))


@dataclass(frozen=True)
class Verdict:
    """What became of an edit. detail: the first line of pytest that tells why."""

    mutation: Mutation
    outcome: str
    seconds: float
    detail: str = ""

    @property
    def is_as_meant(self) -> bool:
        return self.outcome == (EQUIVALENT if self.mutation.equivalent else KILLED)


def read_table(folder: Path = TABLE) -> list[Mutation]:
    """All edits, in the order of the files and of their lines."""
    return [
        Mutation(**entry)
        for path in sorted(folder.glob("*.toml"))
        for entry in tomli.loads(path.read_text(encoding="utf-8"))["mutation"]
    ]


def judge(mutation: Mutation, root: Path, limit: float = LIMIT_SECONDS) -> Verdict:
    """Applies `mutation` below `root`, runs its tests there, and takes it back."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        return Verdict(mutation, NO_VERDICT, 0.0, f"`before` occurs {text.count(mutation.before)} times")

    started = time.monotonic()
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        status, output = run_tests(mutation.tests, root, limit)
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - started

    if status == PYTEST_FAILED:
        return Verdict(mutation, KILLED, seconds, first_failure(output))
    if status == PYTEST_PASSED:
        return Verdict(mutation, EQUIVALENT if mutation.equivalent else SURVIVED, seconds, last_line(output))
    return Verdict(mutation, NO_VERDICT, seconds, last_line(output))


def judge_all_of(
    mutations: Sequence[Mutation], root: Path, limit: float = LIMIT_SECONDS
) -> Iterator[Verdict]:
    """The verdicts on edits whose tests are of the same files, and must pass without any of them."""
    started = time.monotonic()
    status, output = run_tests(all_tests_of(mutations), root, limit * len(mutations))
    seconds = time.monotonic() - started
    if status != PYTEST_PASSED:
        why = f"without the edit too: {first_failure(output)}"
        yield from (Verdict(mutation, NO_VERDICT, seconds, why) for mutation in mutations)
        return
    for mutation in mutations:
        yield judge(mutation, root, limit)


def all_tests_of(mutations: Sequence[Mutation]) -> str:
    """One selection for the tests of all; they name the same files."""
    files, words = mutations[0].split_tests()[0], {mutation.split_tests()[1] for mutation in mutations}
    if "" in words:  # the whole files
        return files
    return f"{files} -k {shlex.quote(' or '.join(f'({each})' for each in sorted(words)))}"


def run_tests(tests: str, root: Path, limit: float) -> tuple[int | None, str]:
    """pytest's exit status in `root`, None if it took longer than `limit` seconds, and what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        # Scripts that the tests start take the first `python` there is.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # An edit and its reversal may fall within one second,
        # and so within one time stamp of a compiled file.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, f"no end within {limit:.0f} s"
        finally:
            # Ranks that a test has left behind, or everything if it took too long.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def first_failure(output: str) -> str:
    """The test that failed first, else the last line."""
    for line in output.splitlines():
        if line.startswith(("FAILED tests/", "ERROR tests/")):  # not what the code itself logs
            return line
    return last_line(output)


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextmanager
def copies(number: int, root: Path = ROOT) -> Iterator[queue.Queue[Path]]:
    """So many copies of what git tracks, or would, in the working tree of `root`; removed afterwards."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for copy in range(number):
            target = Path(folder) / str(copy)
            for name in names:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target / name)
            free.put(target)
        yield free


def run(mutations: Sequence[Mutation], jobs: int = 1, limit: float = LIMIT_SECONDS) -> list[Verdict]:
    """Judges all, those of `jobs` test files at a time; prints each verdict as it falls."""
    groups: defaultdict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations:
        groups[mutation.split_tests()[0]].append(mutation)

    with copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:

        def judge_group(files: str) -> list[Verdict]:
            root = free.get()
            verdicts = []
            try:
                for verdict in judge_all_of(groups[files], root, limit):
                    print(line_of(verdict), flush=True)
                    verdicts.append(verdict)
            finally:
                free.put(root)  # else the other groups would wait for a copy forever
            return verdicts

        return [verdict for verdicts in pool.map(judge_group, groups) for verdict in verdicts]


def line_of(verdict: Verdict) -> str:
    mark = " " if verdict.is_as_meant else "!"
    where = f"{verdict.mutation.file}: {verdict.mutation.name}"
    return f"{mark} {verdict.outcome:<10} {verdict.seconds:4.0f} s  {where}  <- {verdict.detail}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORD", default="", help="edits with this word in name, file or tests"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="so many at a time")
    parser.add_argument(
        "--limit", metavar="SECONDS", type=float, default=LIMIT_SECONDS, help="for one run of pytest"
    )
    options = parser.parse_args()

    word = options.only
    chosen = [m for m in read_table() if any(word in text for text in (m.name, m.file, m.tests))]
    if not chosen:
        parser.error(f"no mutation has {word!r} in its name, file or tests")

    started = time.monotonic()
    verdicts = run(chosen, options.jobs, options.limit)
    wrong = [verdict for verdict in verdicts if not verdict.is_as_meant]
    numbers = Counter(verdict.outcome for verdict in verdicts)
    if wrong:
        print("\nNot as it should be:", *map(line_of, wrong), sep="\n")
    counted = ", ".join(
        f"{numbers[outcome]} {outcome}" for outcome in (KILLED, EQUIVALENT, SURVIVED, NO_VERDICT)
    )
    print(f"\nMutations: {len(verdicts)}, in {(time.monotonic() - started) / 60:.1f} min: {counted}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
