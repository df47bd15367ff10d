"""Whole runs on each device: the same command on 1 and 2 CPU ranks (gloo) and on 1 and 2 GPUs (NCCL).

`pytest -m gpu` runs the rows of the GPUs; elsewhere they skip themselves.
"""

import json

import pytest
import torch

from tests.launch import launch, rows
from tests.ranks import EACH_DEVICE
from torchtitan_rd import job
from torchtitan_rd.checkpoint.manifest import verify
from torchtitan_rd.config import load
from torchtitan_rd.train import Trainer

SMALL = [
    "--training.dataset=pydoc",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--metrics.log_freq=1",
    "--metrics.log_data_hash",
    "--comm.heartbeat_seconds=0",
]
LLAMA = [
    "--model.overrides.dim=64",
    "--model.overrides.n_layers=2",
    "--training.mixed_precision_param=float32",
]
RAVEN = [
    "--model.name=raven",
    "--model.flavor=debug-demo",
    *("--model.overrides.dim=64", "--model.overrides.n_heads=2", "--model.overrides.ffn_dim=96"),
    "--training.mixed_precision_param=bfloat16",
    "--activation_checkpoint.mode=full",
    *("--validation.enable", "--validation.dataset=pydoc-validation", "--validation.freq=2"),
    *("--validation.sequences=4", "--validation.partial_depth_eval=1,3"),
]


def train(folder, device, world_size, *arguments):
    """A run to its end; -> the rows of metrics.jsonl."""
    finished = launch(world_size, [*SMALL, f"--job.dump_folder={folder}", *arguments], device=device)
    assert finished.codes == [0] * world_size, finished.errors
    return rows(folder)


@EACH_DEVICE
def test_a_run_saves_in_the_background_and_goes_on_as_if_it_had_never_stopped(device, world_size, tmp_path):
    checkpoint = ["--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=9"]
    # Pinned memory is where a GPU's tensors are staged.
    mode = "async" if device == "cpu" else "async_with_pinned_mem"
    arguments = [*LLAMA, *checkpoint, f"--checkpoint.async_mode={mode}"]
    whole = train(tmp_path / "whole", device, world_size, *arguments, "--training.steps=6")
    checkpoints = tmp_path / "whole" / "checkpoint"
    assert [verify(checkpoints / f"step-{step}") for step in (2, 4, 6)] == [[], [], []]

    # Put back to step 4, as a kill would have left it.
    (checkpoints / "step-6").rename(tmp_path / "step-6")
    again = train(tmp_path / "whole", device, world_size, *arguments, "--training.steps=6")
    keys = ("step", "data_hash", "tokens_seen")
    assert [[row[key] for key in keys] for row in again] == [[row[key] for key in keys] for row in whole]
    tolerance = 0 if device == "cpu" else 1e-4  # a GPU's atomic additions have no fixed order
    assert [row["loss"] for row in again] == pytest.approx(
        [row["loss"] for row in whole], rel=tolerance, abs=0
    )


@pytest.fixture(scope="module")
def raven_on_one_rank(tmp_path_factory):
    """In float32 on the CPU: what every other run must come near."""
    arguments = [*RAVEN, "--training.mixed_precision_param=float32", "--training.steps=4"]
    return train(tmp_path_factory.mktemp("raven"), "cpu", 1, *arguments)


@EACH_DEVICE
def test_a_raven_in_bfloat16_trains_and_validates_as_in_float32(
    device, world_size, raven_on_one_rank, tmp_path
):
    found = train(tmp_path, device, world_size, *RAVEN, "--training.steps=4")
    for row, expected in zip(found, raven_on_one_rank, strict=True):
        for key in ("data_hash", "num_steps_no_grad", "num_steps_with_grad"):
            assert row[key] == expected[key]
        assert row["loss"] != expected["loss"]
        for key in ("loss", *(key for key in expected if key.startswith("val_loss"))):
            assert row[key] == pytest.approx(expected[key], rel=0.01), key
    assert "val_loss_3" in found[-1]
    assert ("memory_max_active_gib" in found[-1]) == (device == "cuda")


@pytest.mark.gpu
def test_a_compiled_raven_in_bfloat16_trains_on_the_gpu(raven_on_one_rank, tmp_path):
    found = train(
        tmp_path, "cuda", 1, *RAVEN, "--training.steps=4", "--compile.enable", "--compile.fail_on_recompile"
    )
    losses = [[row["loss"] for row in run] for run in (found, raven_on_one_rank)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Several of them meet in each row."""
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{number} {'abcdefg'[number % 7] * 12}"}) + "\n" for number in range(99))
    )
    return [f"--training.dataset_path={path}", "--training.dataset=text", "--training.steps=2", *LLAMA]


@pytest.fixture(scope="module")
def on_one_rank(short_documents, tmp_path_factory):
    """Losses with and without a document mask, on one CPU rank."""
    return [
        [
            row["loss"]
            for row in train(tmp_path_factory.mktemp("run"), "cpu", 1, *short_documents, f"--{flag}")
        ]
        for flag in ("training.document_mask", "no-training.document_mask")
    ]


@EACH_DEVICE
def test_documents_are_masked_alike_on_each_device(
    device, world_size, short_documents, on_one_rank, tmp_path
):
    """By a dense mask on the CPU; by flex attention, forward and backward, on a GPU."""
    masked, unmasked = on_one_rank
    losses = [
        row["loss"]
        for row in train(tmp_path, device, world_size, *short_documents, "--training.document_mask")
    ]
    assert losses == pytest.approx(masked, rel=1e-5 if device == "cpu" else 1e-4)
    assert losses != pytest.approx(unmasked, rel=4e-4)


@pytest.mark.gpu
def test_a_run_writes_memory_snapshots_of_the_gpu(tmp_path):
    keys = ["--profiling.enable_memory_snapshot", "--profiling.profile_freq=2", "--training.steps=4"]
    train(tmp_path, "cuda", 1, *LLAMA, *keys)
    assert sorted(path.parent.name for path in tmp_path.rglob("*memory_snapshot.pickle")) == [
        "iteration_2",
        "iteration_4",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("model", [LLAMA, RAVEN], ids=["llama3", "raven"])
@pytest.mark.parametrize("optimizer", ["AdamW", "ELLISAdam", "Muon"])
def test_the_host_waits_for_the_gpu_on_no_step_that_is_not_logged(model, optimizer, tmp_path, monkeypatch):
    """The whole loop, with torch's own watch on everything that makes the host wait."""
    watched = []

    def at_the_start_of(self, step):
        watching = 3 <= step < 6  # the first steps allocate; the sixth is logged
        torch.cuda.set_sync_debug_mode("error" if watching else "default")
        watched.append(step) if watching else None

    monkeypatch.setattr(job.GarbageCollector, "run", at_the_start_of)
    arguments = [
        *SMALL,
        *model,
        "--metrics.log_freq=6",
        "--training.steps=6",
        f"--optimizer.name={optimizer}",
    ]
    arguments += ["--no-metrics.log_data_hash", f"--job.dump_folder={tmp_path}"]
    arguments += ["--validation.freq=6"] if model is RAVEN else []
    environment = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
    try:
        Trainer(load(arguments, environment), environment).run()
        assert watched == [3, 4, 5]
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
