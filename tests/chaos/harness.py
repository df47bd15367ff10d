"""Runs that are attacked: small, in process groups of their own, killed by pid, never longer than a limit."""

import os
import random
import signal
import time
from pathlib import Path

from tests.data.helpers import documents_of_letters
from tests.launch import Finished, Run, rows

# Several ends of epochs lie within 60 steps. An asynchronous save follows each step,
# so that a kill finds it anywhere. The learning rate does not depend on the number of steps.
KEYS = {
    "model.overrides.dim": 32,
    "model.overrides.n_layers": 2,
    "model.overrides.ffn_dim": 64,
    "training.dataset": "text",
    "training.shuffle_seed": 3,
    "training.seq_len": 32,
    "training.local_batch_size": 1,
    "training.global_batch_size": 4,
    "training.steps": 60,
    "training.mixed_precision_param": "float32",
    "training.num_workers": 0,
    "lr_scheduler.warmup_steps": 3,
    "lr_scheduler.schedule": "constant",
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 3,
    "checkpoint.async_mode": "async",
    "metrics.log_freq": 1,
    "comm.init_timeout_seconds": 60,
    "comm.train_timeout_seconds": 20,
    "comm.heartbeat_seconds": 0,
}
LIMIT = 90.0  # seconds, of any run


class Job:
    """One dump folder, in which the same command runs again and again."""

    def __init__(self, folder: Path, **keys: object):
        """keys: beyond `KEYS`, with two underscores for the dot; None takes one away."""
        folder.mkdir(parents=True, exist_ok=True)
        self.dump = folder / "dump"
        data = documents_of_letters(folder, 24, 130)
        chosen = KEYS | {name.replace("__", "."): value for name, value in keys.items()}
        chosen |= {"job.dump_folder": self.dump, "training.dataset_path": data}
        self.arguments = [
            "--checkpoint.enable",
            *(f"--{key}={value}" for key, value in chosen.items() if value is not None),
        ]

    def start(self, world_size: int, options: tuple[str, ...] = (), *more: str) -> "Attacked":
        """options: failpoints of tests/chaos/rank.py; more: arguments for this time alone."""
        return Attacked(world_size, [*self.arguments, *more], options, module="tests.chaos.rank")

    def finish(self, world_size: int, *more: str, limit: float = LIMIT) -> Finished:
        """The whole run; an error if it does not end well, or takes longer than `limit` seconds."""
        with self.start(world_size, (), *more) as run:
            finished = run.wait(limit)
        assert finished.codes == [0] * world_size, finished.errors
        return finished

    def history(self) -> list[tuple[int, str]]:
        """Each step with its loss, exact."""
        return [(row["step"], row["loss_hex"]) for row in rows(self.dump)]

    def last_step(self) -> int:
        """Of metrics.jsonl, whose last line a kill may have torn; 0 if there is none."""
        path = self.dump / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def checkpoints(self) -> list[Path]:
        """The committed ones, oldest first."""
        found = (self.dump / "checkpoint").glob("step-*")
        return sorted((path for path in found if path.suffix == ""), key=lambda path: int(path.name[5:]))


class Attacked(Run):
    """Its ranks lead process groups of their own (tests/chaos/rank.py)."""

    def strike(self, rank: int, number: signal.Signals) -> None:
        """A signal to a rank and all its children; nothing if it has ended."""
        process = self.processes[rank]
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has not made its group yet
                process.send_signal(number)

    def sleep(self, seconds: float) -> bool:
        """Waits so long; whether all ranks still run then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.is_alive():
            time.sleep(0.02)
        return self.is_alive()

    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """One random bit of one file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
