"""A step that fails each time ends the restarts: another exit code, other words, and no fourth start."""

import json
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.launch import launch
from torchtitan_rd import parts, train
from torchtitan_rd.errors import RestartLoopError
from torchtitan_rd.reliability.restarts import FailureCount

ROOT = Path(__file__).parent.parent
SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
    "--training.steps=5",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--comm.heartbeat_seconds=0",
]


def status_of(folder: Path) -> str:
    return json.loads((folder / "exit_status.json").read_text())["status"]


def start(arguments: list[str]) -> int:
    """A run in this process, which in its own would end with this code."""
    code = train.main(arguments)
    if dist.is_initialized():  # as a run that has failed leaves it
        dist.destroy_process_group()
    return code


@pytest.fixture
def failing(monkeypatch):
    """The steps that fail, each time that they are run; and those that were run."""
    call, steps, seen = parts.TrainStep.__call__, {3}, []

    def watched(self, step, *arguments):
        seen.append(step)
        if step in steps:
            raise ValueError("row 7 is bad")
        return call(self, step, *arguments)

    monkeypatch.setattr(parts.TrainStep, "__call__", watched)
    return steps, seen


def test_the_third_failure_of_a_step_has_a_code_of_its_own_and_there_is_no_fourth(tmp_path, failing, capfd):
    _, seen = failing
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    assert [start(arguments) for _ in range(2)] == [1, 1] and status_of(tmp_path) == "failed"
    capfd.readouterr()
    assert start(arguments) == 3 and status_of(tmp_path) == "looping"
    error = capfd.readouterr().err
    assert "step 3 has failed 3 times in a row" in error and "training.skip_ranges" in error
    assert "Traceback" in error and "row 7 is bad" in error, "the failure itself is still reported"

    seen.clear()
    assert start(arguments) == 3 and status_of(tmp_path) == "looping" and not seen
    assert "step 3 has failed 3 times" in capfd.readouterr().err


def test_a_changed_config_or_a_removed_count_starts_again(tmp_path, failing):
    steps, seen = failing
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    assert [start(arguments) for _ in range(4)] == [1, 1, 3, 3]
    assert start([*arguments, "--metrics.log_freq=2"]) == 1, "the first failure of another config"
    assert start(arguments) == 1, "whose count has taken the place of the other one"

    assert [start(arguments) for _ in range(3)] == [1, 3, 3]
    steps.clear()
    (tmp_path / "failures.json").unlink()
    assert start(arguments) == 0 and seen[-3:] == [3, 4, 5]
    assert status_of(tmp_path) == "finished" and not (tmp_path / "failures.json").exists()


def test_another_step_begins_the_count_anew(tmp_path, failing):
    steps, _ = failing
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    assert [start(arguments) for _ in range(2)] == [1, 1]
    steps.symmetric_difference_update({3, 4})
    assert [start(arguments) for _ in range(3)] == [1, 1, 3]


def test_a_failure_outside_of_the_steps_is_no_loop(tmp_path, monkeypatch):
    def broken(self):
        raise OSError("not today")

    monkeypatch.setattr(train.Trainer, "_restore", broken)
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    assert [start(arguments) for _ in range(4)] == [1] * 4
    assert not (tmp_path / "failures.json").exists()


def test_two_ranks_that_fail_together_count_once(tmp_path):
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    failing = ("--fail-at", "1", "3")
    assert launch(2, arguments, failing).codes == [1, 1]
    count = json.loads((tmp_path / "failures.json").read_text())
    assert (count["step"], len(count["reasons"])) == (3, 1)

    count["reasons"] *= 2
    (tmp_path / "failures.json").write_text(json.dumps(count))
    assert sorted(launch(2, arguments, failing).codes) == [1, 3], "one of them counts, and says so"
    assert status_of(tmp_path) == "looping"


def test_a_count_that_is_cut_short_or_of_a_full_disk_does_not_hide_the_failure(tmp_path):
    count = FailureCount(tmp_path, {})
    assert [count.add(7, "bad") for _ in range(2)] == [None, None]
    (tmp_path / "failures.json").write_text('{"step": 7, "rea')
    count.refuse_a_loop()
    assert count.add(7, "bad") is None
    nowhere = FailureCount(tmp_path / "nowhere", {})
    assert nowhere.add(7, "bad") is None
    assert [count.add(7, "https://me:secret@host/x") is None for _ in range(2)] == [True, False]
    with pytest.raises(RestartLoopError, match="step 7 has failed 3 times"):
        count.refuse_a_loop()
    assert "secret" not in (tmp_path / "failures.json").read_text(), "credentials are hidden"


def test_a_script_says_so_returns_3_and_does_not_requeue(tmp_path):
    script = f"""
        source scripts/launch.sh
        scontrol() {{ echo requeued; }}
        python() {{
            if [ "$2" = torchtitan_rd ]; then echo {tmp_path}; return; fi
            if [ "$2" = torch.distributed.run ]; then
                echo '{{"status": "looping"}}' > {tmp_path}/exit_status.json
                return 1
            fi
            command python "$@"
        }}
        SLURM_JOB_ID=4711 NPROC=2 launch x.toml
    """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 3 and "requeued" not in done.stdout, done.stderr
    assert "not started again" in done.stderr
