"""Launches whole runs as the ranks' own processes (what torchrun does, minus the seconds of start-up)."""

import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import start_python
from tests.ranks import needs_gpus

TOLD = """
[metrics]
log_freq = 1
log_data_hash = true
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 20
heartbeat_seconds = 0
"""
"""For the config of a run: every step is a row with the digest of its batch, and a rank that waits in vain
for another one ends soon.
"""


@dataclass
class Finished:
    """Exit codes and standard errors, in rank order."""

    codes: list[int]
    errors: list[str]


class Run:
    """Processes of one run; always used as a context, so that none is left behind."""

    def __init__(
        self,
        world_size: int,
        arguments: list[str],
        options: tuple[str, ...] = (),
        device: str = "cpu",
        module: str = "tests.launched_rank",
    ):
        """device: "cpu", where the ranks see no GPU, or "cuda": rank r takes GPU r.
        module: what each rank runs, as `python -m module *options -- *arguments`.
        """
        if device == "cuda":
            needs_gpus(world_size)
        port = free_port()
        self.processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
            }
            command = ("-m", module, *options, "--", *arguments)
            self.processes.append(start_python(*command, env=environment))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.close()

    def wait(self, timeout: float = 120.0) -> Finished:
        """Waits for all ranks; one that outlives the limit is an error."""
        errors = [process.communicate(timeout)[1] for process in self.processes]
        return Finished([process.returncode for process in self.processes], errors)

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)


def launch(
    world_size: int,
    arguments: list[str],
    options: tuple[str, ...] = (),
    timeout: float = 120.0,
    device: str = "cpu",
) -> Finished:
    """A whole run, on as many ranks; skips the test if there are fewer GPUs."""
    with Run(world_size, arguments, options, device) as run:
        return run.wait(timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(folder: Path, step: int, timeout: float = 60.0) -> None:
    """Returns once metrics.jsonl has a row of `step` or a later one."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole_lines = text.splitlines()[: text.count("\n")]
        if whole_lines and json.loads(whole_lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no row of step {step} in {folder}")


def arguments_of(folder: Path, config: str, **values: object) -> list[str]:
    """Of a run on `config`, in which {dump} and the other values are filled in, below `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(config.format(dump=folder / "dump", **values))
    return ["--job.config_file", str(path)]
