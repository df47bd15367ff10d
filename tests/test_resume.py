"""Whole runs, killed and resumed: the same command again continues as if nothing had happened."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.data.helpers import documents_of_letters
from tests.launch import TOLD, Run, arguments_of, launch, rows, wait_for_step

STEPS = 24
CONFIG = """
[job]
dump_folder = "{dump}"
[model.overrides]
dim = 32
n_layers = 2
ffn_dim = 64
[training]
dataset = "text"
dataset_path = "{data}"
shuffle_seed = 3
seq_len = 32
local_batch_size = 1
global_batch_size = 4
steps = {steps}
mixed_precision_param = "float32"
num_workers = {workers}
[lr_scheduler]
warmup_steps = 3
[checkpoint]
enable = true
interval = 5
keep_latest_k = 3
async_mode = "async"
"""
CONFIG += TOLD


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """About 1,800 bytes: at 128 ids a step every lane passes an epoch's end near step 14."""
    return documents_of_letters(tmp_path_factory.mktemp("data"), 24, 130)


def arguments_for(folder: Path, documents: Path, workers: int = 0) -> list[str]:
    return arguments_of(folder, CONFIG, data=documents, steps=STEPS, workers=workers)


def history(folder: Path) -> list[tuple]:
    return [
        (row["step"], row["loss_hex"], row["data_hash"], row["tokens_seen"]) for row in rows(folder / "dump")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finished = launch(2, arguments_for(folder, documents))
    assert finished.codes == [0, 0], finished.errors
    assert finished.errors[1] == "", "rank 1 has nothing to report, at its exit least of all"
    assert "epoch 1 of" in finished.errors[0]
    expected = history(folder)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    return folder, expected


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_three_kills_leave_no_trace_in_losses_or_batches(workers, uninterrupted, documents, tmp_path):
    """One in mid-accumulation, one after an epoch's end that the resumed run must pass again,
    one of rank 0.
    """
    arguments = arguments_for(tmp_path, documents, workers)
    for rank, step, microbatch in ((1, 8, 1), (1, 17, 0), (0, 21, 1)):
        finished = launch(2, arguments, ("--die-at", str(rank), str(step), str(microbatch)))
        assert finished.codes[rank] == -signal.SIGKILL
        assert finished.codes[1 - rank] not in (0, -signal.SIGKILL), "the other rank must notice and fail"
    finished = launch(2, arguments)
    assert finished.codes == [0, 0], finished.errors
    # The newest checkpoint that was committed: an asynchronous save may still have been
    # under way at the kill.
    assert re.search("resuming after step (15|20) ", finished.errors[0])
    assert history(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_of_two_ranks_continues_on_another_number_of_ranks(
    world_size, uninterrupted, documents, tmp_path
):
    arguments = arguments_for(tmp_path, documents)
    killed = launch(2, arguments, ("--die-at", "0", "13", "0"))
    assert killed.codes[0] == -signal.SIGKILL
    finished = launch(world_size, arguments)
    assert finished.codes == [0] * world_size, finished.errors
    assert re.search("resuming after step (5|10) ", finished.errors[0])
    compare_across_ranks(history(tmp_path), uninterrupted[1])


def test_one_rank_and_two_ranks_train_alike_from_the_same_seed(uninterrupted, documents, tmp_path):
    finished = launch(1, arguments_for(tmp_path, documents))
    assert finished.codes == [0], finished.errors
    compare_across_ranks(history(tmp_path), uninterrupted[1])


def compare_across_ranks(found: list[tuple], expected: list[tuple]) -> None:
    """Batches equal; losses equal but for the order in which ranks are summed."""
    assert [(row[0], *row[2:]) for row in found] == [(row[0], *row[2:]) for row in expected]
    losses = [float.fromhex(row[1]) for row in found]
    assert losses == pytest.approx([float.fromhex(row[1]) for row in expected], abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_of_that_step(
    number, uninterrupted, documents, tmp_path
):
    arguments = arguments_for(tmp_path, documents)
    with Run(2, arguments, ("--slow", "0.2")) as run:
        wait_for_step(tmp_path / "dump", 6)
        run.signal(1, number)
        finished = run.wait()
    assert finished.codes == [0, 0], finished.errors
    status = json.loads((tmp_path / "dump" / "exit_status.json").read_text())
    assert status["status"] == "preempted"
    assert (tmp_path / "dump" / "checkpoint" / f"step-{status['step']}" / "manifest.json").exists()
    assert status["step"] == history(tmp_path)[-1][0] < STEPS
    resumed = launch(2, arguments)
    assert resumed.codes == [0, 0], resumed.errors
    assert f"resuming after step {status['step']}" in resumed.errors[0]
    assert history(tmp_path) == uninterrupted[1]
    assert json.loads((tmp_path / "dump" / "exit_status.json").read_text())["status"] == "finished"


def test_a_finished_run_started_again_has_nothing_to_do_and_more_steps_go_on(
    uninterrupted, documents, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], folder)
    arguments = arguments_for(folder, documents)
    again = launch(1, arguments)
    assert again.codes == [0], again.errors
    assert history(folder) == uninterrupted[1]
    more = launch(1, [*arguments, f"--training.steps={STEPS + 2}"])
    assert more.codes == [0], more.errors
    assert f"resuming after step {STEPS} of {STEPS + 2}" in more.errors[0]
    assert [row[0] for row in history(folder)] == list(range(1, STEPS + 3))


def test_a_corrupt_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    uninterrupted, documents, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], folder)
    flip_a_bit(next((folder / "dump" / "checkpoint" / f"step-{STEPS}").glob("*.distcp")))
    finished = launch(1, arguments_for(folder, documents))
    assert finished.codes == [0], finished.errors
    assert "damaged" in finished.errors[0] and "resuming after step 20" in finished.errors[0]
    assert (folder / "dump" / "checkpoint" / f"step-{STEPS}.corrupt").is_dir()
    compare_across_ranks(history(folder), uninterrupted[1])


def test_when_every_checkpoint_is_corrupt_the_run_stops_and_deletes_nothing(
    uninterrupted, documents, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], folder)
    checkpoints = sorted((folder / "dump" / "checkpoint").glob("step-*"))
    for checkpoint in checkpoints:
        flip_a_bit(next(checkpoint.glob("*.distcp")))
    before = (folder / "dump" / "metrics.jsonl").read_bytes()
    finished = launch(1, arguments_for(folder, documents))
    assert finished.codes == [1]
    assert all(checkpoint.name in finished.errors[0] for checkpoint in checkpoints)
    assert sorted((folder / "dump" / "checkpoint").glob("step-*")) == checkpoints
    assert (folder / "dump" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--model.overrides.dim=64", "dim"),
        ("--training.seq_len=64", "training.seq_len"),
        ("--training.global_batch_size=8", "global_batch_size"),
    ],
)
def test_what_may_not_change_on_resume_is_named(override, expected, uninterrupted, documents, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], folder)
    finished = launch(1, [*arguments_for(folder, documents), override])
    assert finished.codes == [1]
    assert expected in finished.errors[0] and "Traceback" not in finished.errors[0]


def test_a_seed_checkpoint_is_what_a_run_starts_from(uninterrupted, documents, tmp_path):
    """step-0 of another seed, made on one rank: the run on two starts from its weights, not from its own."""
    arguments = arguments_for(tmp_path, documents)
    made = launch(1, [*arguments, "--training.seed=9", "--checkpoint.create_seed_checkpoint"])
    assert made.codes == [0], made.errors
    assert [path.name for path in (tmp_path / "dump" / "checkpoint").glob("step-*")] == ["step-0"]
    finished = launch(2, [*arguments, "--training.steps=2"])
    assert finished.codes == [0, 0], finished.errors
    assert "step-0" in finished.errors[0]
    other = tmp_path / "other"
    direct = launch(1, [*arguments_for(other, documents), "--training.seed=9", "--training.steps=2"])
    assert direct.codes == [0], direct.errors
    losses = [[row["loss"] for row in rows(folder / "dump")] for folder in (tmp_path, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != float.fromhex(uninterrupted[1][0][1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
