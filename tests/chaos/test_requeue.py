"""Jobs that end at their time limit until the run is done: row 13 of docs/reliability.md.

The script is that of `torchtitan-rd launch`; bash, scripts/launch.sh, torchrun and both ranks are the real
ones. Only Slurm is not: sbatch keeps the script, and this test is what runs, signals and requeues it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.harness import LIMIT, Job
from torchtitan_rd.__main__ import main

ROOT = Path(__file__).parents[2]
CONFIG = f"--job.config_file={ROOT / 'train_configs' / 'debug.toml'}"
STEPS = 200
PROFILE = "#LAUNCH gpus_per_node=2\nexport GLOO_SOCKET_IFNAME=lo\n"


class Slurm:
    """Of one node. Each job gets its signal once the run has so many rows."""

    def __init__(self, folder: Path, job: Job):
        self.job, self.folder = job, folder / "slurm"
        (self.folder / "bin").mkdir(parents=True)
        self._program("sbatch", f'cat > {self.folder}/script; echo 1 >> {self.folder}/jobs; echo "7;here"')
        self._program("scontrol", f'[ "$1 $2" != "requeue 7" ] || echo 1 >> {self.folder}/requeued')
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def _program(self, name: str, body: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)

    def count(self, name: str) -> int:
        path = self.folder / name
        return path.read_text().count("1") if path.exists() else 0

    def run_job(self, signal_at: int | None) -> int:
        """One job, in a process group of its own; -> its exit code. B:TERM goes to its shell alone."""
        with (self.folder / "output").open("a") as output:
            shell = subprocess.Popen(
                ["bash", str(self.folder / "script")],
                env=self.environment,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            deadline = time.monotonic() + LIMIT
            try:
                while signal_at is not None and self.job.last_step() < signal_at:
                    assert shell.poll() is None and time.monotonic() < deadline, self.output()
                    time.sleep(0.02)
                if signal_at is not None:
                    shell.send_signal(signal.SIGTERM)
                return shell.wait(LIMIT)
            finally:
                if shell.poll() is None:
                    os.killpg(shell.pid, signal.SIGKILL)

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def orphans(self) -> list[str]:
        """Command lines of processes of the run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            found += [words] if str(self.job.dump) in words else []
        return found


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["requeued", "chained"])
def test_jobs_that_are_cut_short_twice_end_in_the_losses_of_one_long_job(jobs, tmp_path, monkeypatch):
    keys = {"training__steps": STEPS, "checkpoint__interval": 50}
    whole = Job(tmp_path / "whole", **keys)
    whole.finish(2, CONFIG)

    job = Job(tmp_path / "pieces", **keys)
    slurm = Slurm(tmp_path, job)
    (tmp_path / "ours.sh").write_text(PROFILE)
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    monkeypatch.chdir(ROOT)
    command = ["launch", CONFIG.partition("=")[2], "--profile", str(tmp_path / "ours.sh"), "--time", "60"]
    chain = ["--chain", "3"] if jobs == "chained" else []
    assert main([*command, *chain, *job.arguments]) == 0
    assert slurm.count("jobs") == (3 if chain else 1)
    assert "#SBATCH --signal=B:TERM@" in (slurm.folder / "script").read_text()

    done = 0
    for ended, signal_at in enumerate([30, 90, None], 1):
        assert slurm.run_job(signal_at) == 0, slurm.output()
        assert slurm.orphans() == []
        assert job.last_step() > done, "each job goes on where the one before has ended"
        done = job.last_step()
        # A job that is done, and one of a chain, is not requeued.
        assert slurm.count("requeued") == (min(ended, 2) if jobs == "requeued" else 0), slurm.output()
        if signal_at is not None:
            assert signal_at <= done < STEPS, "the run was too fast for its signal"
            assert f"step-{done}" in {path.name for path in job.checkpoints()}, "none of its steps is lost"
    assert slurm.output().count("resuming after step ") == 2
    assert job.history() == whole.history() and len(job.history()) == STEPS
