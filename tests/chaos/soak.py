"""Random faults for minutes or hours, at the end of which the losses are those of an undisturbed run.

    python -m tests.chaos.soak --minutes 30 [--seed 0] [--every 20 60]

First the undisturbed run: a third of its steps on two ranks, a third on one, a third on two again. Then the
same under attack: each 20 to 60 s one fault, after which the same command is started again if it has ended.
Prints figures as JSON; status 1 unless every step's loss is the same, bit for bit.
"""

import argparse
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.harness import Attacked, Job, flip_a_bit
from tests.launch import rows

LEGS = (2, 1, 2)  # ranks
FAULTS = ("kill one", "kill all", "terminate", "stop and continue", "flip a bit", "disk full")
LIMIT = 300.0  # seconds, of what takes a tenth of it on a machine that does nothing else
ACTIVE_SHARE = 0.8  # of the time; the rest is what starts take


def legs(steps: int) -> list[tuple[int, int]]:
    """(ranks, the last step of the leg)"""
    return [(ranks, steps * (number + 1) // len(LEGS)) for number, ranks in enumerate(LEGS)]


class Soak:
    """One disturbed run, with its counts."""

    def __init__(self, job: Job, seed: int, minutes: float, every: tuple[float, float], pause: float):
        """every: seconds from one fault to the next, at least and at most. pause: seconds added to a step."""
        self.job, self.rng, self.every = job, random.Random(seed), every
        self.deadline = time.monotonic() + 60 * minutes
        self.full = job.dump.parent / "full"
        self.options = ("--slow-steps", str(pause), "--disk-full", str(self.full))
        self.faults: Counter[str] = Counter()
        self.bag: list[str] = []
        self.starts = self.redone = 0

    def run(self, ranks: int, last: int) -> None:
        """One leg: starts it until it ends well."""
        while True:
            before, self.starts = self.job.last_step(), self.starts + 1
            with self.job.start(ranks, self.options, f"--training.steps={last}") as run:
                self._attack(run)
                finished = run.wait(LIMIT)
            if found := re.search(r"resuming after step (\d+) ", finished.errors[0]):
                self.redone += max(before - int(found.group(1)), 0)
            if 3 in finished.codes:
                raise SystemExit(f"the run needs a hand: {finished.errors}")
            if self.job.last_step() >= last and set(finished.codes) == {0}:
                return

    def _attack(self, run: Attacked) -> None:
        """Faults until one of them ends the run, it ends by itself, or the time is over."""
        while run.sleep(self.rng.uniform(*self.every)) and time.monotonic() < self.deadline:
            fault = self._draw()
            self.faults[fault] += 1
            if self._strike(run, fault):
                return
        while run.is_alive():  # the time is over: in peace
            run.sleep(1.0)

    def _draw(self) -> str:
        """From a bag that is filled again once it is empty: each kind comes as often as any other."""
        if not self.bag:
            self.bag = self.rng.sample(FAULTS, len(FAULTS))
        possible = list(self.bag)
        if len(self.job.checkpoints()) < 3:  # a run may lose one checkpoint, not all
            possible = [fault for fault in self.bag if fault != "flip a bit"] or ["kill all"]
        if possible[0] in self.bag:
            self.bag.remove(possible[0])
        return possible[0]

    def _strike(self, run: Attacked, fault: str) -> bool:
        """Whether this ends the run."""
        ranks = range(len(run.processes))
        victim = self.rng.choice(ranks)
        if fault == "stop and continue":
            run.strike(victim, signal.SIGSTOP)
            time.sleep(self.rng.uniform(0.5, 3.0))
            run.strike(victim, signal.SIGCONT)
            return False
        if fault == "terminate":
            run.strike(victim, signal.SIGTERM)
        elif fault == "kill one":
            run.strike(victim, signal.SIGKILL)
        elif fault == "disk full":
            self.full.touch()
            run.sleep(LIMIT)
            self.full.unlink()
        else:
            for rank in ranks:
                run.strike(rank, signal.SIGKILL)
            if fault == "flip a bit":
                newest = self.job.checkpoints()[-1]
                flip_a_bit(self.rng.choice(sorted(newest.iterdir())), self.rng)
        return True


def undisturbed(job: Job, steps: int) -> float:
    """-> seconds of a step, the median, without the starts. It saves at the ends of its legs alone."""
    for ranks, last in legs(steps):
        job.finish(ranks, f"--training.steps={last}", f"--checkpoint.interval={steps}", limit=LIMIT)
    return statistics.median(row["step_seconds"] for row in rows(job.dump))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, nargs=2, default=(20.0, 60.0), metavar=("LEAST", "MOST"))
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reference, job = (Job(Path(folder) / name) for name in ("undisturbed", "disturbed"))
        seconds = undisturbed(reference, chosen.steps)
        pause = max(60 * chosen.minutes * ACTIVE_SHARE / chosen.steps - seconds, 0.0)
        soak = Soak(job, chosen.seed, chosen.minutes, tuple(chosen.every), pause)
        started = time.monotonic()
        for ranks, last in legs(chosen.steps):
            soak.run(ranks, last)
        took = time.monotonic() - started
        same = job.history() == reference.history()
    figures = {
        "minutes": round(took / 60, 1),
        "faults": dict(soak.faults),
        "starts": soak.starts,
        "steps": chosen.steps,
        "steps_redone": soak.redone,
        "effective_step_fraction": round(chosen.steps / (chosen.steps + soak.redone), 4),
        "share_of_time_in_useful_steps": round(chosen.steps * (seconds + pause) / took, 3),
        "losses_equal_bit_for_bit": same,
    }
    print(json.dumps(figures, indent=2))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
