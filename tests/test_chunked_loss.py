"""training.loss_chunk_tokens: the same loss and gradients as of all logits, in a part of their memory."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make, train
from tests.test_precision import build, sections
from tests.test_precision import train as train_raven
from tests.test_token_weights import ALONE, arguments
from tests.watching import Watch
from torchtitan_rd.chunked_loss import ChunkedLoss
from torchtitan_rd.config import load
from torchtitan_rd.data import BatchDims
from torchtitan_rd.draws import Draws
from torchtitan_rd.loss import cross_entropy_sums
from torchtitan_rd.model_spec import SINGLE_READ_OUT
from torchtitan_rd.train import Trainer
from torchtitan_rd.validation import validate

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import collectives
import peak_memory
from peak_memory import GIB, Peak


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 11, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(13, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 13, (2, 11), generator=generator)
    labels[0, 3:7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 1000])
def test_loss_and_gradients_are_those_of_all_logits(chunk_tokens, z_loss_weight, weighted):
    hidden, weight, labels = example()
    token_weights = torch.linspace(0.0, 3.0, 13) if weighted else None
    plain = cross_entropy_sums(hidden @ weight.T, labels, z_loss_weight, token_weights)
    expected = torch.autograd.grad(plain.objective / 7, (hidden, weight))

    chunked = ChunkedLoss(labels, chunk_tokens, z_loss_weight, token_weights)(hidden, weight)
    found = torch.autograd.grad(chunked.objective / 7, (hidden, weight))
    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-6)
    assert not chunked.cross_entropy.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_gradients_of_a_bfloat16_head_are_summed_in_float32():
    hidden, weight, labels = example(torch.bfloat16)
    loss = ChunkedLoss(labels, 1)(hidden, weight).objective
    (found,) = torch.autograd.grad(loss, weight)
    # Each token's share is rounded to bfloat16, their sum once more at the end.
    shares = [
        torch.autograd.grad(ChunkedLoss(label.view(1, 1), 1)(h.view(1, 1, -1), weight).objective, weight)[0]
        for h, label in zip(hidden.flatten(0, 1), labels.flatten(), strict=True)
    ]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack(shares).float().sum(0).bfloat16())


def test_a_second_backward_is_refused():
    hidden, weight, labels = example()
    loss = ChunkedLoss(labels, 5)(hidden, weight).objective
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the loss in chunks has one backward"):
        loss.backward()


def test_without_gradients_none_are_made():
    hidden, weight, labels = example()
    with torch.no_grad(), Peak() as peak:
        ChunkedLoss(labels, 2)(hidden, weight)
    assert peak.bytes < weight.nbytes


def test_the_head_of_131072_tokens_takes_less_than_4_gib_beside_its_inputs_and_gradients():
    gradients = 2 * peak_memory.DIM * (peak_memory.TOKENS + peak_memory.VOCAB)
    assert peak_memory.head(1024) - gradients < 4 * GIB
    assert peak_memory.head(None) > 100 * GIB


CHUNKS = {"loss_chunk_tokens": 7, "z_loss_weight": 0.05, "local_batch_size": 2}  # a microbatch has 32 tokens


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_trains_on_the_same_losses_and_gradients(tied, world_size):
    found = run_on_ranks(world_size, train, of_llama(CHUNKS, tied))
    expected = run_on_ranks(1, train, of_llama({**CHUNKS, "loss_chunk_tokens": None}, tied))[0]
    for result in found:
        assert_same(result, expected)


def of_llama(training, tied):
    return Setup({"training": training}, {"tie_word_embeddings": tied}, padded=True)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_raven_trains_on_the_same_losses_and_gradients(tied, world_size):
    def setup(training):
        overrides = {"tie_word_embeddings": tied}
        return Setup(sections("float32", training=training), overrides, steps=3, padded=True)

    found = run_on_ranks(world_size, train_raven, setup(CHUNKS))
    expected = run_on_ranks(1, train_raven, setup({**CHUNKS, "loss_chunk_tokens": None}))[0]
    for result in found:
        assert_same(result, expected)


def assert_same(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("chunk", "times"), [(None, 0), (7, 20), (32, 4)])
def test_the_step_and_the_validation_take_the_loss_of_so_many_tokens_at_a_time(chunk, times):
    training, validation = run_on_ranks(1, operations, chunk)[0]
    assert training == times
    assert validation == times


def operations(rank, world_size, chunk):
    """Times that a logsumexp was taken in a step of four microbatches of 32 tokens, and in a validation."""
    setup = Setup({"training": {"loss_chunk_tokens": chunk, "local_batch_size": 2}})
    config, model, step = make(setup, world_size)
    batches = batches_of(1, rank, world_size, config, padded=False)
    with Watch(model) as training:
        step(1, batches)
    with Watch(model) as validation:
        validate(model, batches, torch.device("cpu"), SINGLE_READ_OUT, chunk_tokens=chunk)
    return training.operations["logsumexp"], validation.operations["logsumexp"]


def test_a_run_takes_so_many_tokens_at_a_time_in_training_and_in_validation(tmp_path, monkeypatch):
    seen, call = set(), ChunkedLoss.__call__

    def noting(self, hidden, weight):
        seen.add((torch.is_grad_enabled(), self.chunk_tokens))
        return call(self, hidden, weight)

    monkeypatch.setattr(ChunkedLoss, "__call__", noting)
    keys = arguments(tmp_path / "run", **{"training.loss_chunk_tokens": 5})
    Trainer(load(keys, ALONE), ALONE).run()
    assert seen == {(True, 5), (False, 5)}


def test_validation_of_several_depths_is_the_same():
    plain, chunked = run_on_ranks(1, depths, None)[0], run_on_ranks(1, depths, 5)[0]
    assert plain.keys() == {"val_loss", "val_loss_1", "val_loss_3"}
    assert chunked == pytest.approx(plain, abs=1e-6)


def depths(rank, world_size, chunk):
    config, spec, shape, model = build(Setup(sections("float32")), world_size)
    dims = BatchDims.resolve(config.training, rank, world_size)
    kinds = {"seq_len": 16, "device": torch.device("cpu"), "dtype": torch.float32}
    draws = Draws(spec, shape, config.recurrence, dims, seed=0, total_steps=1, **kinds)
    batches = batches_of(1, rank, world_size, config, padded=True)
    read_outs = draws.validation([1, 3], batches)
    return validate(model, batches, torch.device("cpu"), read_outs, chunk_tokens=chunk)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_gathered_once_for_all_chunks(tied):
    """On 8 ranks, as without chunks: tests/test_collectives.py."""
    counts = []
    for chunk in (None, 3):
        with collectives.fake_ranks():
            shape = replace(collectives.LLAMA, tie_word_embeddings=tied)
            config, model = collectives.build("llama3", shape, "FSDP")
            keys = config.training.model_copy(update={"loss_chunk_tokens": chunk})
            counts.append(collectives.count(config.model_copy(update={"training": keys}), model, 1))
    assert counts[0] == counts[1]
