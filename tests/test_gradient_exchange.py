"""[parallelism] reduce_each_microbatch and all_reduce_chunk_mb: other collectives at other times,
the same numbers.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.raven.test_sharding import Case, assert_close, backward, own_rows, reference
from tests.models.raven.test_sharding import build as build_raven
from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make, train
from tests.test_precision import sections
from tests.test_precision import train as train_raven
from tests.test_token_weights import ALONE, arguments
from torchtitan_rd.config import load
from torchtitan_rd.parallelism import GradientExchange, ParallelismConfig, gradient_exchange
from torchtitan_rd.parallelism.gradient_exchange import chunks
from torchtitan_rd.train import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import collectives

LAYERS = 8  # of collectives.LLAMA
ONCE = {"reduce_each_microbatch": False}
COPIES = {"data_parallel_replicate_degree": 2}
GATHERED = {"fsdp_reshard_after_forward": "never"}
SMALL_CHUNKS = 1000  # bytes that stand for a MiB of all_reduce_chunk_mb


def setup_of(parallelism, *, dtype="float32", **training):
    return Setup(
        {"parallelism": parallelism, "training": {"local_batch_size": 1, **training}},
        padded=True,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def plain():
    return run_on_ranks(1, train, setup_of({}))[0]


@pytest.fixture(scope="module")
def plain_raven():
    return run_on_ranks(1, train_raven, of_raven({}))[0]


def of_raven(parallelism):
    keys = {"parallelism": parallelism, "training": {"local_batch_size": 1}}
    return Setup(sections("float32", **keys), steps=3, padded=True)


def assert_same(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], abs=1e-5)
    assert_close(result["gradients"], expected["gradients"], "the last step")


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [(2, ONCE), (2, ONCE | GATHERED), pytest.param(4, ONCE | COPIES, marks=pytest.mark.slow)],
)
def test_gradients_that_are_summed_once_a_step_train_a_llama_and_a_raven_alike(
    world_size, keys, plain, plain_raven
):
    for result in run_on_ranks(world_size, train, setup_of(keys)):
        assert_same(result, plain)
    for result in run_on_ranks(world_size, train_raven, of_raven(keys)):
        assert_same(result, plain_raven)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_one_rank_the_sum_over_microbatches_is_the_same_to_the_bit(dtype):
    """In the type of the reduction, float32, whatever the gradients are computed in."""
    found = [run_on_ranks(1, train, setup_of(keys, dtype=dtype))[0]["after"] for keys in ({}, ONCE)]
    assert found[0] == found[1]


def test_a_batch_that_grows_is_summed_once_a_step_at_each_size():
    growing = [run_on_ranks(2, grow, keys)[0] for keys in ({}, ONCE)]
    assert growing[1] == pytest.approx(growing[0], abs=1e-6)


def grow(rank, world_size, keys):
    """Losses of steps of one, two and four microbatches."""
    config, _model, step = make(setup_of(keys), world_size)
    microbatches = [batches_of(1 + n, rank, world_size, config, padded=False)[: 2**n] for n in range(3)]
    return [step(1 + n, batches).loss for n, batches in enumerate(microbatches)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_unit_without_a_gradient_in_the_last_microbatch_keeps_that_of_those_before(world_size):
    """The core of a raven, of a draw without gradient."""
    draws = [(3, 2), (3, 0)]
    expected = reference({}, [(draw, slice(None)) for draw in draws])
    for first, second in run_on_ranks(world_size, without_core_at_last, draws):
        assert_close(first, expected, "the first step")
        assert_close(second, expected, "a step after it")


def without_core_at_last(rank, world_size, draws):
    model = build_raven(world_size, Case())
    exchange = GradientExchange(model, ParallelismConfig(**ONCE))
    found = []
    for _step in range(2):
        model.zero_grad()
        for draw in draws:
            exchange.before_microbatch(is_last=draw == draws[-1])
            backward(model, draw, own_rows(rank, world_size))
        found.append({name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("layout", collectives.LAYOUTS)
@pytest.mark.parametrize("name", ["llama3", "raven"])
def test_a_step_has_a_reduce_scatter_a_unit_however_many_microbatches(name, layout):
    shape, units, gathers, draw = {
        "llama3": (collectives.LLAMA, LAYERS + 2, 2 * LAYERS + 3, None),
        "raven": (collectives.RAVEN, 6, 10, (4, 4)),
    }[name]
    with collectives.fake_ranks():
        for reshard, gathers_of_4 in (("default", 4 * gathers), ("never", units)):
            config, model = collectives.build(name, shape, layout, reshard, **ONCE)
            assert collectives.count(config, model, 4, draw) == {
                "all-gather": gathers_of_4,
                "reduce-scatter": units,
                "all-reduce": units if layout == "HSDP" else 0,
                "of the step": 2,
            }


def test_tensors_are_cut_into_chunks_across_their_boundaries():
    tensors = [torch.arange(5), torch.arange(5, 5), torch.arange(5, 6), torch.arange(6, 12)]
    found = [[part.tolist() for part in parts] for parts in chunks(tensors, 4)]
    assert found == [[[0, 1, 2, 3]], [[4], [5], [6, 7]], [[8, 9, 10, 11]]]
    assert list(chunks([], 4)) == []


@pytest.mark.parametrize("shard", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_copies_that_exchange_gradients_in_chunks_train_to_the_same_bit(shard):
    """Of 2 copies: a sum of two numbers has one order."""
    for keys in (COPIES, COPIES | ONCE):
        whole = run_on_ranks(2 * shard, in_chunks, setup_of(keys))
        cut = run_on_ranks(2 * shard, in_chunks, setup_of({**keys, "all_reduce_chunk_mb": 2}))
        for (expected, _), (result, sizes) in zip(whole, cut, strict=True):
            assert (result["losses"], result["after"]) == (expected["losses"], expected["after"])
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6)
            assert set(sizes[:-1]) == {2 * SMALL_CHUNKS // 4} and 0 < sizes[-1] <= 2 * SMALL_CHUNKS // 4


def in_chunks(rank, world_size, setup):
    """`train`, and how many elements a message between the copies has in its last step."""
    gradient_exchange.MIB = SMALL_CHUNKS
    real, sizes = gradient_exchange.chunks, []

    def noted(flat, size):
        cut = list(real(flat, size))
        sizes[:] = [sum(part.numel() for part in parts) for parts in cut]
        return cut

    gradient_exchange.chunks = noted
    try:
        return train(rank, world_size, setup), sizes
    finally:
        gradient_exchange.chunks, gradient_exchange.MIB = real, 2**20


@pytest.mark.parametrize("accumulation", [1, 4])
def test_chunks_are_counted_once_a_step_and_there_is_no_other_exchange_between_copies(
    accumulation, monkeypatch
):
    monkeypatch.setattr(gradient_exchange, "MIB", 4096)  # 1024 elements
    with collectives.fake_ranks():
        config, model = collectives.build("llama3", collectives.LLAMA, "HSDP", all_reduce_chunk_mb=3)
        elements = sum(p.to_local().numel() for p in model.parameters())
        counts = collectives.count(config, model, accumulation)
    assert counts["all-reduce"] == -(-elements // (3 * 1024)) > 3
    assert counts["reduce-scatter"] == accumulation * (LAYERS + 2)


def test_chunks_are_summed_in_the_type_of_the_reduction():
    keys = {**COPIES, "all_reduce_chunk_mb": 1}
    setup = setup_of(keys, dtype="bfloat16", mixed_precision_reduce="bfloat16", max_norm=1e6)
    for result in run_on_ranks(2, train, replace(setup, steps=1)):
        assert all(torch.equal(g, g.bfloat16().float()) for g in result["gradients"].values())


def test_a_run_gives_its_keys_to_the_step(tmp_path, monkeypatch):
    seen, before = [], GradientExchange.before_microbatch

    def noting(self, *, is_last):
        seen.append((self.each_microbatch, self.chunk_bytes, is_last))
        before(self, is_last=is_last)

    monkeypatch.setattr(GradientExchange, "before_microbatch", noting)
    keys = {"parallelism.reduce_each_microbatch": "false", "parallelism.all_reduce_chunk_mb": 3}
    Trainer(load(arguments(tmp_path / "run", **keys), ALONE), ALONE).run()
    assert {(each, size) for each, size, _ in seen} == {(False, 3 * 2**20)}
    assert seen[-1][-1]
