"""Measures one part: python -m benchmarks.gpu PART [--tiny] [--output DIR] [--minutes 8.5].

Each case is kept as it ends; what stands is not measured again. Status 75: time was over, and the same
command goes on. Status 1: a case failed.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu import attention
from benchmarks.gpu.machine import environment
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.steps import (
    FEW,
    WHOLE,
    compiled,
    llama,
    measure_checkpoint,
    measure_step,
    most_layers,
    of_whole_model,
    raven,
)
from torchtitan_rd.errors import ConfigError

ROOT = Path(__file__).parents[2]
NOT_YET = 75
Cases = Iterator[tuple[str, Callable[[], Row]]]


def tests(record: Record, tiny: bool) -> Cases:
    """What is marked `gpu`; without a GPU all of it skips itself."""
    chosen = ["tests/test_devices.py"] if tiny else ["tests"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *chosen]

    def run() -> Row:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", said[0])
        row: Row = {what: int(count) for count, what in counts} | {"said": said[0]}
        return row if done.returncode == 0 else row | {"failed": "\n".join(said)}

    yield "pytest -m gpu", run


def _layers(record: Record, part: str, tokens: int, tiny: bool, *, variants: bool) -> Cases:
    """The step of few layers and of as many as fit, and what a whole model of them would take."""
    most = most_layers(tokens, tiny)
    kinds = {"plain": False, "compiled": True}
    for kind, is_compiled in kinds.items():
        for layers in (FEW, most):
            config = llama(layers, tokens, tiny, {})
            config = compiled(config, tiny) if is_compiled else config
            yield f"{kind}, {layers} layers", lambda config=config: measure_step(config, tiny)

        def whole(kind: str = kind) -> Row:
            rows = record.rows(part)
            return of_whole_model(rows[f"{kind}, {FEW} layers"], rows[f"{kind}, {most} layers"], most)

        yield f"{kind}, {WHOLE} layers", whole
    if variants:
        for name, sections in {
            "no recomputation": {"activation_checkpoint": {"mode": "none"}},
            "CPU offload": {"training": {"enable_cpu_offload": True}},
            "activations offloaded": {"activation_checkpoint": {"mode": "full", "offload": True}},
        }.items():
            config = llama(FEW, tokens, tiny, sections)
            yield f"{name}, {FEW} layers", lambda config=config: measure_step(config, tiny)


def train(record: Record, tiny: bool) -> Cases:
    return _layers(record, "train", 128 if tiny else 8192, tiny, variants=True)


def long(record: Record, tiny: bool) -> Cases:
    return _layers(record, "long", 256 if tiny else 131072, tiny, variants=False)


def ravens(record: Record, tiny: bool) -> Cases:
    for depth in ((3, 2), (5, 2), (6, 3)) if tiny else ((8, 8), (32, 8), (64, 8)):
        config = raven(depth, 256 if tiny else 4096, tiny, {})
        name = f"mean {depth[0]}, with gradient {depth[1]}"
        yield f"plain, {name}", lambda config=config: measure_step(config, tiny)
        yield f"compiled, {name}", lambda config=config: measure_step(compiled(config, tiny), tiny)


def checkpoint(record: Record, tiny: bool) -> Cases:
    for layers in (FEW, 2 * FEW):
        config = llama(layers, 128, tiny, {})
        yield f"{layers} layers", lambda config=config: measure_checkpoint(config)


def attentions(record: Record, tiny: bool) -> Cases:
    return attention.cases(tiny)


PARTS: dict[str, Callable[[Record, bool], Cases]] = {
    "tests": tests,
    "attention": attentions,
    "train": train,
    "long": long,
    "raven": ravens,
    "checkpoint": checkpoint,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: proves the program, not a card")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no further case begins")
    chosen = parser.parse_args()
    here = environment(chosen.tiny)
    if "memory GiB" not in here and not chosen.tiny:
        print("there is no GPU here; --tiny tries the program on a CPU", file=sys.stderr)
        return 1

    name = "tiny" if chosen.tiny else re.sub(r"[^a-z0-9]+", "-", str(here["device"]).lower()).strip("-")
    deadline = time.monotonic() + 60 * chosen.minutes
    try:
        record = Record(chosen.output, name, here)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 1
    for case, run in PARTS[chosen.part](record, chosen.tiny):
        if record.is_done(chosen.part, case):
            continue
        if time.monotonic() > deadline:
            print(f"{chosen.part}: time is over before {case!r}; the same command goes on", file=sys.stderr)
            return NOT_YET
        try:
            row = run()
        except Exception as error:  # one kernel that fails must not hide the figures of the others
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        record.put(chosen.part, case, row)
        print(f"{chosen.part}: {case}: {row}", flush=True)
    return int(any(line.startswith(f"{chosen.part}, ") for line in record.failures()))


if __name__ == "__main__":
    sys.exit(main())
