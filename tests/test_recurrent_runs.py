"""Whole recurrent runs: depths, noise and batches are functions of the step,
through kills and changes of ranks.
"""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import TOLD, arguments_of, launch, rows
from torchtitan_rd.checkpoint.manifest import verify
from torchtitan_rd.conversion.dcp import open_dcp

CONFIG = """
[job]
dump_folder = "{dump}"
[model]
name = "raven"
flavor = "debug-demo"
[model.overrides]
dim = 32
n_heads = 2
ffn_dim = 48
[optimizer]
name = "ELLISAdam"
lr = 1e-2
update_clipping = true
atan_adam = true
running_init = true
[lr_scheduler]
warmup_steps = 2
[training]
dataset = "pydoc-train"
shuffle_seed = 0
seq_len = 16
local_batch_size = 1
global_batch_size = 4
steps = 12
mixed_precision_param = "float32"
[validation]
enable = true
dataset = "pydoc-validation"
freq = 6
sequences = 8
partial_depth_eval = [1, 3]
[activation_checkpoint]
mode = "full"
[checkpoint]
enable = true
interval = 4
"""
CONFIG += TOLD
TELEMETRY = (
    "num_steps_no_grad",
    "num_steps_with_grad",
    "recurrent_residual",
    "rel_residual",
    "recurrent_state_norm",
)


def arguments_for(folder: Path) -> list[str]:
    return arguments_of(folder, CONFIG)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recurrent")
    finished = launch(2, arguments_for(folder))
    assert finished.codes == [0, 0], finished.errors
    return rows(folder / "dump")


def without_timings(row: dict) -> dict:
    kept = ("step", "loss_hex", "data_hash", "lr", "grad_norm", *TELEMETRY)
    return {k: v for k, v in row.items() if k in kept or k.startswith("val_loss")}


def test_depths_vary_and_every_row_describes_the_state(uninterrupted):
    depths = {(row["num_steps_no_grad"], row["num_steps_with_grad"]) for row in uninterrupted}
    assert len(depths) > 4
    assert all(row[name] >= 0 for row in uninterrupted for name in TELEMETRY)
    validated = [row["step"] for row in uninterrupted if "val_loss" in row]
    assert validated == [6, 12]
    assert {key for key in uninterrupted[5] if key.startswith("val_loss")} == {
        "val_loss",
        "val_loss_1",
        "val_loss_3",
    }


def test_a_kill_leaves_no_trace_in_losses_depths_noise_or_validation(uninterrupted, tmp_path):
    arguments = arguments_for(tmp_path)
    killed = launch(2, arguments, ("--die-at", "1", "7", "1"))
    assert killed.codes[1] == -signal.SIGKILL
    finished = launch(2, arguments)
    assert finished.codes == [0, 0], finished.errors
    assert "resuming after step 4 " in finished.errors[0]
    assert [without_timings(row) for row in rows(tmp_path / "dump")] == [
        without_timings(row) for row in uninterrupted
    ]


def test_another_number_of_ranks_draws_the_same_depths_noise_and_batches(uninterrupted, tmp_path):
    arguments = arguments_for(tmp_path)
    killed = launch(2, arguments, ("--die-at", "0", "7", "0"))
    assert killed.codes[0] == -signal.SIGKILL
    finished = launch(1, arguments)
    assert finished.codes == [0], finished.errors
    for found, expected in zip(rows(tmp_path / "dump"), uninterrupted, strict=True):
        for key in ("step", "data_hash", "num_steps_no_grad", "num_steps_with_grad"):
            assert found[key] == expected[key]
        for key in ("loss", *(key for key in expected if key.startswith("val_loss"))):
            assert found[key] == pytest.approx(expected[key], abs=1e-5)


def test_a_run_whose_ranks_share_rows_is_killed_and_goes_on_alone_with_the_same_rows(uninterrupted, tmp_path):
    arguments = arguments_for(tmp_path)
    together = [*arguments, "--parallelism.context_parallel_degree=2"]
    killed = launch(2, together, ("--die-at", "1", "7", "1"))
    assert killed.codes[1] == -signal.SIGKILL
    assert "each row is shared by 2 ranks: its tokens (context) by 2" in killed.errors[0]
    finished = launch(1, arguments)
    assert finished.codes == [0], finished.errors
    assert "resuming after step 4 " in finished.errors[0]
    assert_same_rows(rows(tmp_path / "dump"), uninterrupted)


@pytest.mark.slow
def test_a_run_goes_from_layout_to_layout_and_ends_alone(uninterrupted, tmp_path):
    """4 data ranks, then 2 that share rows by 2, then the same as two copies of the model, then one."""
    arguments = arguments_for(tmp_path)
    shared = [*arguments, "--parallelism.context_parallel_degree=2"]
    copies = [*shared, "--parallelism.data_parallel_replicate_degree=2"]
    for number, (ranks, layout, dies_at) in enumerate([(4, arguments, 3), (4, shared, 5), (4, copies, 7)]):
        keys = [*layout, "--checkpoint.interval=2"]
        killed = launch(ranks, keys, ("--die-at", "1", str(dies_at), "0"))
        assert killed.codes[1] == -signal.SIGKILL, killed.errors
        assert (f"resuming after step {2 * number} " in killed.errors[0]) == (number > 0)
    finished = launch(1, [*arguments, "--checkpoint.interval=2"])
    assert finished.codes == [0] and "resuming after step 6 " in finished.errors[0], finished.errors
    assert_same_rows(rows(tmp_path / "dump"), uninterrupted)


def assert_same_rows(found_rows, expected_rows):
    for found, expected in zip(found_rows, expected_rows, strict=True):
        for key in ("step", "data_hash", "tokens_seen", "num_steps_no_grad", "num_steps_with_grad"):
            assert found[key] == expected[key]
        for key in ("loss", *(key for key in expected if key.startswith("val_loss"))):
            assert found[key] == pytest.approx(expected[key], abs=1e-5)


def test_a_run_in_bfloat16_is_killed_resumed_on_other_ranks_verified_and_exported(uninterrupted, tmp_path):
    arguments = [
        *arguments_for(tmp_path),
        "--training.mixed_precision_param=bfloat16",
        "--checkpoint.last_save_in_hf",
    ]
    assert launch(2, arguments, ("--die-at", "1", "7", "1")).codes[1] == -signal.SIGKILL
    finished = launch(1, arguments)
    assert finished.codes == [0], finished.errors
    for found, expected in zip(rows(tmp_path / "dump"), uninterrupted, strict=True):
        assert (
            found["loss"] == pytest.approx(expected["loss"], rel=0.01) and found["loss"] != expected["loss"]
        )
        assert all(found[key] == expected[key] for key in ("data_hash", "num_steps_no_grad"))
    last = tmp_path / "dump" / "checkpoint" / "step-12"
    assert verify(last) == []
    weights, exported = open_dcp(last), load_file(last.with_name("step-12-hf") / "model.safetensors")
    norm = weights.read("transformer.recurrence.iteration.core_block.0.norm_1.weight")
    assert torch.equal(exported["transformer.core_block.0.norm_1.weight"], norm)
    assert norm.dtype == torch.float32 and not torch.equal(norm, norm.bfloat16().float())


def test_ranks_that_draw_their_own_depths_finish(tmp_path):
    finished = launch(2, [*arguments_for(tmp_path), "--no-recurrence.lockstep", "--training.steps=3"])
    assert finished.codes == [0, 0], finished.errors
    assert len(rows(tmp_path / "dump")) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--recurrence.sampling_scheme=poison-fill", "did you mean 'poisson-fill'?"),
        ("--model.overrides.injection=liner", "did you mean 'linear'?"),
        ("--model.overrides.state_init=zeros", "did you mean 'zero'?"),
        ("--validation.partial_depth_eval=0,4", "at least 1"),
        ("--validation.sequences=3", "validation.sequences = 3 is not a multiple"),
        ("--validation.dataset=pydoc-val", "did you mean 'pydoc-validation'?"),
    ],
)
def test_a_mistake_in_the_recurrence_is_one_clear_message(override, expected, tmp_path):
    finished = launch(1, [*arguments_for(tmp_path), override, "--training.local_batch_size=2"])
    assert finished.codes == [1]
    assert expected in finished.errors[0] and "Traceback" not in finished.errors[0]


def test_a_scheme_that_needs_more_recurrence_than_backprop_says_so(tmp_path):
    arguments = [
        *arguments_for(tmp_path),
        "--model.overrides.mean_recurrence=4",
        "--recurrence.sampling_scheme=simple",
    ]
    finished = launch(1, arguments)
    assert finished.codes == [1]
    assert "needs mean_recurrence > mean_backprop_depth" in finished.errors[0]


def test_recurrence_keys_are_refused_for_a_model_without_recurrence(tmp_path):
    finished = launch(1, [f"--job.dump_folder={tmp_path}", "--training.steps=1", "--no-recurrence.lockstep"])
    assert finished.codes == [1]
    assert "[recurrence] is for recurrent models" in finished.errors[0]


def test_a_growing_batch_is_the_same_on_any_ranks_and_through_a_kill(tmp_path):
    """Stages of 2 rows: 1, 2, 3 and 4 of them over the first 8 steps."""
    ramp = [
        "--training.global_batch_size=8",
        "--training.batch_ramp_steps=8",
        "--training.batch_ramp_stages=4",
    ]
    found = {}
    for name, world_size in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        arguments = [*arguments_for(folder), *ramp]
        if name == "two":
            assert launch(2, arguments, ("--die-at", "1", "6", "2")).codes[1] == -signal.SIGKILL
        finished = launch(world_size, arguments)
        assert finished.codes == [0] * world_size, finished.errors
        found[name] = rows(folder / "dump")
    assert [row["tokens_seen"] // 32 for row in found["one"]] == [1, 2, 4, 6, 9, 12, 16, 20, 24, 28, 32, 36]
    for one, two in zip(found["one"], found["two"], strict=True):
        for key in ("step", "tokens_seen", "data_hash", "num_steps_no_grad", "num_steps_with_grad"):
            assert one[key] == two[key], key
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_a_ramp_that_does_not_divide_the_batch_is_refused(tmp_path):
    finished = launch(
        1, [*arguments_for(tmp_path), "--training.batch_ramp_steps=4", "--training.batch_ramp_stages=3"]
    )
    assert finished.codes == [1]
    assert "batch_ramp_stages = 3 must divide training.global_batch_size = 4" in finished.errors[0]
