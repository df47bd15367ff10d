"""A launcher that is killed takes its ranks with it: torchrun, and the shell that started torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import start_python
from tests.launch import free_port, wait_for_step
from torchtitan_rd.reliability.launcher import GRACE_SECONDS, POLL_SECONDS, launcher_watched
from torchtitan_rd.signals import StopRequest

ROOT = Path(__file__).parent.parent
SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
    "--training.steps=1000000",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--checkpoint.enable",
]

# Stands for torchrun: starts two ranks, says who they are, and waits.
LAUNCHER = """
import os, sys
from pathlib import Path
pids = []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        from torchtitan_rd import train
        from torchtitan_rd.train_step import TrainStep
        if "--hang" in sys.argv:
            sys.argv.remove("--hang")
            from torchtitan_rd.reliability import launcher
            launcher.GRACE_SECONDS = 1.0
            call = TrainStep.__call__
            def hanging(self, step, *arguments):
                if step == 3:
                    import ctypes
                    mutex = ctypes.create_string_buffer(64)
                    for _ in range(2):
                        ctypes.CDLL(None).pthread_mutex_lock(mutex)
                return call(self, step, *arguments)
            TrainStep.__call__ = hanging
        os._exit(train.main(sys.argv[2:]))
    pids.append(pid)
Path(sys.argv[1]).write_text(" ".join(map(str, pids)))
os.waitpid(pids[0], 0)
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_until_gone(pids: list[int], limit: float) -> float:
    started = time.monotonic()
    while any(map(is_alive, pids)) and time.monotonic() - started < limit:
        time.sleep(0.05)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{left} live on after {limit} s"
    return time.monotonic() - started


def ranks_of(folder: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not (folder / "pids").exists() or not (folder / "pids").read_text():
        assert time.monotonic() < deadline, "no rank was started"
        time.sleep(0.05)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


@pytest.mark.parametrize("hang", [[], ["--hang"]], ids=["in its steps", "in C"])
def test_ranks_whose_launcher_is_killed_save_and_end_or_end_at_least(hang, tmp_path):
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "none",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [tmp_path / "pids", *SMALL, f"--job.dump_folder={tmp_path}", *hang]
    with start_python("-c", LAUNCHER, *arguments, env=environment) as program:
        ranks = ranks_of(tmp_path)
        wait_for_step(tmp_path, 2)
        program.kill()
        took = seconds_until_gone(ranks, limit=10.0)
        error = program.output()[1]
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert f"the launcher (process {program.pid}) has died" in status["reason"]
    if hang:
        assert took > 1 and GRACE_SECONDS + POLL_SECONDS < 9
        assert status["status"] == "stopped" and "ended at once" in status["reason"]
    else:
        assert status["status"] == "preempted", error
        assert (tmp_path / "checkpoint" / f"step-{status['step']}" / "manifest.json").exists()
        assert not (tmp_path / ".lock").exists()


def test_a_rank_that_hears_of_the_end_before_it_has_looked_names_the_launcher_too(monkeypatch):
    """The other rank may look first, and its flag ends this one's step too."""
    stop = StopRequest()
    with launcher_watched(lambda reason: None, lambda reason: None) as stop.look:
        assert stop.reason() == "another rank was told to stop"
        launcher = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.reason() == f"the launcher (process {launcher}) has died"
        stop.signal_name = "SIGINT"
        assert stop.reason() == "received SIGINT"


def test_a_process_without_torchrun_outlives_the_shell_that_started_it(tmp_path):
    """As after `nohup python -m torchtitan_rd.train ... &` and a logout."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    orphan = """
import os, sys, time
from pathlib import Path
from torchtitan_rd import train
if not os.fork():
    os._exit(train.main(sys.argv[2:]))
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""
    arguments = [*SMALL, "--no-checkpoint.enable", "--training.steps=400", f"--job.dump_folder={tmp_path}"]
    with start_python("-c", orphan, tmp_path / "metrics.jsonl", *arguments, env=environment) as program:
        program.wait(30)
        wait_for_step(tmp_path, 400)


# launch.sh in front of a torchrun that waits, after it has said who it is.
KILLED_SHELL = """
    source scripts/launch.sh
    python() {
        if [ "$2" = torch.distributed.run ]; then echo $BASHPID; exec sleep 30; fi
        [ "$2" != torchtitan_rd ] || echo "$FOLDER"
    }
    _ranks_per_node() { echo 1; }
    launch x.toml
"""


def test_torchrun_is_killed_when_the_shell_that_started_it_is(tmp_path):
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    shell = subprocess.Popen(
        ["bash", "-c", KILLED_SHELL], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    torchrun = int(shell.stdout.readline())
    assert is_alive(torchrun)
    shell.kill()  # and it stays a zombie, since nobody waits for it yet
    assert seconds_until_gone([torchrun], limit=5.0) < 5
    shell.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "the shell"])
def test_the_ranks_of_a_script_end_within_10_seconds_of_a_kill(victim, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "train_debug.sh", *SMALL, f"--job.dump_folder={tmp_path}"]
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_for_step(tmp_path, 3, timeout=120)
        children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        [torchrun] = [int(pid) for pid in children if b"distributed.run" in command_of(pid)]
        ranks = [int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()]
        assert len(ranks) == 2
        os.kill(torchrun if victim == "torchrun" else shell.pid, signal.SIGKILL)
        seconds_until_gone([*ranks, torchrun], limit=10.0)
    finally:
        shell.kill()
        shell.wait()
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert status["status"] == "preempted" and "has died" in status["reason"], status
    assert not (tmp_path / ".lock").exists()


def command_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
