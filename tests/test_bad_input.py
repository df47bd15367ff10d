"""Every mistake ends the run before anything is written: one clear message, no traceback, a non-zero exit."""

import json
import signal
from pathlib import Path

import pytest

from tests.fork_server import run_python
from tests.launch import Run, launch, wait_for_step
from torchtitan_rd import train

ROOT = Path(__file__).parent.parent

GOOD = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.steps=1",
    "--training.mixed_precision_param=float32",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--checkpoint.enable",
    "--comm.heartbeat_seconds=0",
]

MISTAKES = {
    "a misspelt key": (["--training.stepz=1"], "did you mean 'steps'?"),
    "a wrong type": (["--training.steps=many"], "[training] steps = 'many'"),
    "a wrong choice": (["--optimizer.name=SGD"], "'AdamW', 'Adam'"),
    "degrees beyond the ranks": (["--parallelism.data_parallel_shard_degree=3"], "1 ranks were started"),
    "a batch that does not divide": (
        ["--training.global_batch_size=3", "--training.local_batch_size=2"],
        "multiple",
    ),
    "an unknown data set": (["--training.dataset=pydocs"], "did you mean 'pydoc'?"),
    "an unknown model": (["--model.name=lama3"], "did you mean 'llama3'?"),
    "an unknown flavor": (["--model.flavor=debgu"], "did you mean 'debug'?"),
    "an unknown backend": (["--model.attention_backend=fa5"], "'fa3'"),
    "a backend that is not here": (["--model.attention_backend=fa3"], "FA3 needs a Hopper GPU"),
    "an unknown override": (["--model.overrides.dimm=8"], "did you mean 'dim'?"),
    "an impossible shape": (["--model.overrides.n_heads=5"], "not divisible by n_heads"),
    "a missing data path": (
        ["--training.dataset=text", "--training.dataset_path=nowhere.jsonl"],
        "nowhere.jsonl",
    ),
    "a missing tokenizer": (["--model.tokenizer_path=./no/such/folder"], "no/such/folder"),
    "ids beyond the vocabulary": (["--model.vocab_size=100"], "vocab"),
    "a missing initial checkpoint": (["--checkpoint.initial_load_path=./no/such/step-0"], "no/such/step-0"),
    "a feature that is gone": (["--experimental.pipeline_parallel_degree=2"], "no longer supported"),
    "offload without a GPU": (["--training.enable_cpu_offload"], "needs a GPU to offload from"),
    "snapshots without a GPU": (["--profiling.enable_memory_snapshot"], "needs a CUDA device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_and_nothing_is_written(mistake, tmp_path, capfd):
    arguments, expected = MISTAKES[mistake]
    dump = tmp_path / "dump"
    assert train.main([*GOOD, f"--job.dump_folder={dump}", *arguments]) == 1
    error = capfd.readouterr().err
    assert expected in error, error
    assert "Traceback" not in error
    assert "Error: " in error.splitlines()[-1] or "\n  " in error
    left = [path.relative_to(dump).as_posix() for path in written(dump)]
    # Which initial weights count is known once the checkpoint folder is this run's;
    # then it may say why it failed.
    assert left == (["checkpoint", "exit_status.json"] if mistake == "a missing initial checkpoint" else [])


def written(dump: Path) -> list[Path]:
    """All that lies in the dump folder, folders included."""
    return sorted(dump.rglob("*"))


def test_spikes_that_collide_with_the_separator_are_named_by_row(tmp_path, capfd):
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = pa.array([[[1, 0, 2], [0, 3, 0]], [[0, 255, 1], [2, 0, 0]]], type=pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({"spike_counts": counts}), tmp_path / "spikes.parquet")
    arguments = ["--training.dataset=primate", f"--training.dataset_path={tmp_path / 'spikes.parquet'}"]
    assert train.main([*GOOD, f"--job.dump_folder={tmp_path / 'dump'}", *arguments]) == 1
    error = capfd.readouterr().err
    assert "DataError" in error and "255" in error and "1" in error
    assert not written(tmp_path / "dump")


# A file system in a mount namespace of this process, which ends with both.
ON_A_SMALL_DISK = """
import ctypes, os, subprocess, sys
folder, size, script, *arguments = sys.argv[1:]
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
libc = ctypes.CDLL(None)
if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
    sys.exit(77)
if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
    sys.exit(77)
subprocess.run(["bash", "-c", script])
from torchtitan_rd import train
status = train.main([f"--job.dump_folder={folder}/dump", *arguments])
show = f"ls -A {folder}/dump; cat {folder}/dump/exit_status.json"
subprocess.run(show, shell=True, stderr=subprocess.DEVNULL)
sys.exit(status)
"""


def run_on_a_small_disk(folder: Path, size: str, script: str, *arguments: str):
    """A run with its dump folder below `folder`, where such a file system is mounted and `script` has run."""
    found = run_python("-c", ON_A_SMALL_DISK, folder, size, script, *arguments)
    if found.returncode == 77:
        pytest.skip("may not mount a file system here")
    return found


def test_a_full_disk_ends_the_run_with_the_path_and_the_free_bytes(tmp_path):
    """A file system of its own, 1 MiB large, in a mount namespace;
    skipped where the user may not make one.
    """
    arguments = [*GOOD, "--model.overrides.dim=256", "--training.steps=3", "--checkpoint.interval=1"]
    found = run_on_a_small_disk(tmp_path, "1m", "", *arguments)
    assert found.returncode == 1, found.stderr
    assert "CheckpointError" in found.stderr and "free" in found.stderr and str(tmp_path) in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("room", ["0", "4k", "8k"])
def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_no_status_of_the_earlier_run(
    room, tmp_path
):
    """Not a byte left for the lock, for the metrics of the first step, or for its checkpoint."""
    mount = tmp_path / "full"
    mount.mkdir()
    script = f"""
        mkdir {mount}/dump && echo '{{"status": "finished"}}' > {mount}/dump/exit_status.json
        head -c {room} /dev/zero > {mount}/room
        cat /dev/zero > {mount}/filler 2> {tmp_path}/error
        rm {mount}/room
    """
    found = run_on_a_small_disk(mount, "4m", script, *GOOD, "--training.steps=3", "--checkpoint.interval=1")
    assert found.returncode == 1, found
    assert "Traceback" not in found.stderr
    assert "space" in found.stderr and str(mount) in found.stderr, found.stderr
    assert "finished" not in found.stdout and ".lock" not in found.stdout


def test_a_second_run_in_the_same_dump_folder_changes_nothing_of_the_first(tmp_path):
    """With checkpoints off, as by default; and the first goes on."""
    arguments = [f"--job.dump_folder={tmp_path}", *GOOD, "--no-checkpoint.enable", "--training.steps=100000"]
    arguments += ["--metrics.log_freq=1", "--comm.heartbeat_seconds=0.2"]
    with Run(1, arguments, ("--slow", "0.05")) as first:
        wait_for_step(tmp_path, 2)
        before = snapshot(tmp_path)
        second = launch(1, [*arguments, "--training.steps=2"])
        assert second.codes == [1]
        assert f"{tmp_path} is in use by process {first.processes[0].pid}" in second.errors[0]
        assert "Traceback" not in second.errors[0]
        after = snapshot(tmp_path)
        assert set(after) == set(before) and after["config.toml"] == before["config.toml"]
        assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
        assert json.loads(after["heartbeat/rank_0.json"])[0]["pid"] == first.processes[0].pid
        first.signal(0, signal.SIGTERM)
        assert first.wait().codes == [130]  # nothing is saved
    assert not (tmp_path / ".lock").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of all files; one being replaced at this moment is left out."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".tmp":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_failed_run_says_why_in_exit_status(tmp_path):
    arguments = [*GOOD, f"--job.dump_folder={tmp_path}", "--training.dataset=packed", "--model.vocab_size=8"]
    assert train.main([*GOOD, f"--job.dump_folder={tmp_path}"]) == 0
    assert json.loads((tmp_path / "exit_status.json").read_text())["status"] == "finished"
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet")
    assert train.main([*arguments, f"--training.dataset_path={path}"]) == 1
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert status["status"] == "failed" and "DataError" in status["reason"]
