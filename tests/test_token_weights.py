"""training.token_weights: the weighted mean of torch's cross_entropy, over the whole global batch."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from tests.small_run import VOCAB, Setup, batches_of, make
from torchtitan_rd import job
from torchtitan_rd.config import load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.loss import load_token_weights, sum_of_weights
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep

ALONE = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
# Very different ones, and some ids that do not count at all.
WEIGHTS = torch.linspace(0, 1, VOCAB).pow(2) * (torch.arange(VOCAB) % 5 > 0)
Z_LOSS = 0.05
OBJECTIVE = {
    "z_loss_weight": Z_LOSS,
    "goldfish_strategy": "static",
    "goldfish_k": 3,
    "goldfish_start_position": 1,
    "max_norm": 1e6,
}


@pytest.mark.parametrize("objective", [{"max_norm": 1e6}, OBJECTIVE], ids=["plain", "z-loss and goldfish"])
@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 8), (2, 2)])
def test_loss_and_gradients_are_torch_s_weighted_mean_of_the_whole_global_batch(
    world_size, local_batch_size, objective
):
    """Rows keep 1 to 8 labels, so ranks and microbatches hold very different numbers and weights."""
    loss, gradients = run_on_ranks(1, by_torch, objective)[0]
    chunked = None if world_size == 1 else 7  # so are the sums of a chunk
    training = {**objective, "local_batch_size": local_batch_size, "loss_chunk_tokens": chunked}
    for found_loss, _, found in run_on_ranks(world_size, by_the_step, training):
        assert found_loss == pytest.approx(loss, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def by_torch(rank, world_size, objective):
    config, model, _ = make(Setup(), 1)
    (batch,) = batches_of(1, 0, 1, config, padded=True)
    kept = batch.labels != -100
    if "goldfish_strategy" in objective:
        kept[:, 1::3] = False
    logits = model(batch.inputs)[kept]
    loss = F.cross_entropy(logits, batch.labels[kept], weight=WEIGHTS)
    z_loss = logits.logsumexp(-1).square().mean()  # of tokens, whatever they weigh
    (loss + objective.get("z_loss_weight", 0.0) * z_loss).backward()
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def by_the_step(rank, world_size, training):
    config, model, step = make(Setup({"training": training}), world_size, token_weights=WEIGHTS)
    result = step(1, batches_of(1, rank, world_size, config, padded=True))
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return result.loss, result.numbers.loss_max, gradients


def test_the_sum_of_weights_is_exact_where_float32_is_not():
    total = sum_of_weights(torch.tensor([0, 1, -100]), torch.tensor([2.0**24, 1.0]))
    assert total.item() == 2**24 + 1


def test_the_largest_mean_loss_is_the_weighted_mean_of_that_rank_s_own_labels():
    _, largest, _ = run_on_ranks(2, by_the_step, {"local_batch_size": 4})[0]
    assert largest == pytest.approx(run_on_ranks(1, largest_of_halves)[0], abs=1e-6)


def largest_of_halves(rank, world_size):
    config, model, _ = make(Setup(), 1)
    (batch,) = batches_of(1, 0, 1, config, padded=True)
    logits = model(batch.inputs).detach()
    halves = zip(logits.chunk(2), batch.labels.chunk(2), strict=True)
    return max(
        F.cross_entropy(out.flatten(0, 1), labels.flatten(), weight=WEIGHTS).item() for out, labels in halves
    )


def test_the_key_of_a_run_weighs_its_loss_and_leaves_val_loss_unweighted(tmp_path, monkeypatch):
    weights = np.random.default_rng(0).uniform(0, 3, 258)
    np.save(tmp_path / "weights.npy", weights)
    expected, found, step = [], [], TrainStep.__call__

    def recorded(self, number, batches, tokens_seen):
        (batch,) = batches
        with torch.no_grad():
            logits = self.model(batch.inputs, batch.document_ids).flatten(0, 1)
        weight = F.pad(torch.tensor(weights, dtype=torch.float32), (0, logits.shape[1] - 258))
        expected.append(F.cross_entropy(logits, batch.labels.flatten(), weight=weight).item())
        result = step(self, number, batches, tokens_seen)
        found.append(result.loss)
        return result

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    val_losses = []
    for keys in ({}, {"training.token_weights": str(tmp_path / "weights.npy")}):
        folder = tmp_path / f"run {len(keys)}"
        Trainer(load(arguments(folder, **keys), ALONE), ALONE).run()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        val_losses += [row["val_loss"] for row in rows if "val_loss" in row]
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    assert abs(found[1] - found[0]) > 1e-4, "the weights have no effect"
    assert val_losses[0] == pytest.approx(val_losses[1], abs=1e-9), "val_loss is weighted"


def arguments(folder, **keys):
    keys = {
        "training.dataset": "pydoc-train",
        "training.seq_len": 32,
        "training.local_batch_size": 2,
        "training.steps": 1,
        "training.mixed_precision_param": "float32",
        "optimizer.lr": 1e-30,
        "validation.enable": "true",
        "validation.dataset": "pydoc-validation",
        "validation.sequences": 2,
        "model.overrides": json.dumps({"dim": 32, "n_layers": 1}),
        "model.vocab_padding_multiple": 16,
        "comm.heartbeat_seconds": 0,
        "job.dump_folder": str(folder),
        **keys,
    }
    return [f"--{key}={value}" for key, value in keys.items()]


def test_a_file_of_each_format_gives_the_same_weights_with_zeros_for_padding(tmp_path):
    values = np.array([0.5, 0, 2.25])
    np.save(tmp_path / "w.npy", values.astype(np.float32))
    np.savez(tmp_path / "w.npz", weights=values)
    np.savetxt(tmp_path / "w.txt", values)
    torch.save(torch.tensor(values), tmp_path / "w.pt")
    for suffix in ("npy", "npz", "txt", "pt"):
        found = load_token_weights(str(tmp_path / f"w.{suffix}"), 3, 4)
        assert found.tolist() == [0.5, 0, 2.25, 0] and found.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], r"holds 2 numbers, but the vocabulary has 3 ids"),
        ([[1, 2, 3]], r"holds 1 x 3 numbers"),
        ([1, -2, 3], r"gives id 1 the weight -2.0"),
        ([1, 2, np.nan], r"gives id 2 the weight nan"),
        ([np.inf, 2, 1], r"gives id 0 the weight inf"),
        ([0, 0, 0], r"gives every id the weight 0"),
        (["a", "b", "c"], r"cannot be read: could not convert string"),
    ],
)
def test_weights_that_make_no_mean_are_refused(values, message, tmp_path):
    np.save(tmp_path / "w.npy", np.array(values))
    with pytest.raises(ConfigError, match=r"training\.token_weights = '.*w\.npy' " + message):
        load_token_weights(str(tmp_path / "w.npy"), 3, 3)


def test_a_plan_refuses_wrong_weights_beside_other_mistakes(tmp_path, capfd):
    (tmp_path / "w.txt").write_text("1\n2\n")
    wrong = {"training.token_weights": str(tmp_path / "w.txt"), "training.global_batch_size": 3}
    with pytest.raises(ConfigError) as error:
        Trainer(load(arguments(tmp_path / "run", **wrong), ALONE), ALONE)
    assert "the vocabulary has 258 ids" in str(error.value) and "global_batch_size" in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"cannot be read: expected a file \.npy"):
        load_token_weights("weights.csv", 3, 3)
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        load_token_weights(str(tmp_path / "none.npy"), 3, 3)
