"""training.mlp_tile_tokens: the same feed-forward in a part of its memory."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import register_backend

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make, train
from tests.test_chunked_loss import assert_same
from tests.test_precision import sections
from tests.test_precision import train as train_raven
from torchtitan_rd.parallelism.tiled_mlp import backward_in_tiles, swiglu

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peak_memory

MATRICES = {"two": [(12, 8), (12, 8)], "in one": [(24, 8)]}


def example(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(11, 8), *MATRICES[kind], (8, 12)]
    x, *gate_up, down = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    return x, gate_up, down


def plain(x, gate_up, down):
    gate, up = (x @ torch.cat(gate_up).T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


@pytest.mark.parametrize("tile", [1, 4, 11, 100])
@pytest.mark.parametrize("kind", MATRICES)
def test_outputs_and_gradients_are_those_of_all_tokens_at_once(kind, tile):
    x, gate_up, down = example(kind)
    dy = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    expected, found = plain(x, gate_up, down), swiglu(x, gate_up, down, tile)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    inputs = (x, *gate_up, down)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        atol=1e-5,
        rtol=1e-5,
    )


def test_gradients_of_bfloat16_matrices_are_summed_in_float32():
    x, gate_up, down = example("two", torch.bfloat16)
    dy = torch.ones(11, 8, dtype=torch.bfloat16)
    found = torch.autograd.grad(swiglu(x, gate_up, down, 1), down, dy)[0]
    with torch.no_grad():
        shares = [
            backward_in_tiles(g[None], t[None], gate_up, down, 1)[2] for g, t in zip(dy, x, strict=True)
        ]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack(shares).sum(0).bfloat16())


def test_the_operation_keeps_torch_s_contract():
    """Its types, its fake, and its gradients by finite differences."""
    for kind in MATRICES:
        inputs = [*example(kind, torch.float64), 3]
        torch.library.opcheck(swiglu, inputs, test_utils=("test_schema", "test_faketensor"))


def test_the_feed_forward_of_131072_tokens_takes_less_than_0_15_of_the_plain_one():
    assert peak_memory.feed_forward(2048) < 0.15 * peak_memory.feed_forward(None)


def test_compiled_blocks_share_one_graph_with_the_operation_in_it():
    graphs, result = run_on_ranks(1, compiled)[0]
    assert graphs == ["torchtitan_rd.tiled_swiglu"]
    assert_same(result, run_on_ranks(1, train, Setup())[0])


def compiled(rank, world_size):
    """-> the tiled operations of each graph that was compiled, and what the run gave."""
    torch._dynamo.reset()
    graphs = []

    def noting(graph, example_inputs):
        graphs.extend(str(node.target) for node in graph.graph.nodes if "tiled" in str(node.target))
        return graph.forward

    register_backend(noting, name="noting")
    keys = {"training": {"mlp_tile_tokens": 6}, "compile": {"enable": True, "backend": "noting"}}
    result = train(rank, world_size, Setup(keys))
    del torch._dynamo.backends.registry._COMPILER_FNS["noting"]
    return [name.removesuffix(".default") for name in graphs], result


TILES = {"mlp_tile_tokens": 6, "local_batch_size": 2}  # a microbatch has 32 tokens


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_llama_trains_on_the_same_losses_and_gradients(mode, world_size):
    def setup(training):
        return Setup({"training": training, "activation_checkpoint": {"mode": mode}}, padded=True)

    expected = run_on_ranks(1, train, setup({"local_batch_size": 2}))[0]
    for result in run_on_ranks(world_size, train, setup(TILES)):
        assert_same(result, expected)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("core_grad_dtype", ["as_param", "float32"])
def test_a_raven_trains_on_the_same_losses_and_gradients(core_grad_dtype, world_size):
    def setup(training):
        recurrence = {"core_grad_dtype": core_grad_dtype}
        return Setup(sections("float32", training=training, recurrence=recurrence), steps=3)

    expected = run_on_ranks(1, train_raven, setup({"local_batch_size": 2}))[0]
    for result in run_on_ranks(world_size, train_raven, setup(TILES)):
        assert_same(result, expected)


def test_a_raven_in_bfloat16_trains_with_every_key_of_memory_as_without():
    """Its residual stream is of another type than its matrices. A bfloat16 has 8 bits."""
    memory = {"mode": "full", "keep": "attention", "keep_every": 2, "offload": True}

    def setup(activation_checkpoint, **training):
        others = {
            "training": {"local_batch_size": 2, **training},
            "activation_checkpoint": activation_checkpoint,
        }
        return Setup(sections("bfloat16", **others), steps=2)

    expected = run_on_ranks(2, train_raven, setup({"mode": "none"}))[0]
    keys = {"mlp_tile_tokens": 6, "loss_chunk_tokens": 7}
    for result in run_on_ranks(2, train_raven, setup(memory, **keys)):
        assert result["losses"] == pytest.approx(expected["losses"], abs=2e-3)
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert (result["gradients"][name] - gradient).norm() < 0.02 * gradient.norm(), name


@pytest.mark.parametrize(("tile", "seen"), [(None, set()), (6, {6, 2})])
def test_every_block_of_a_step_computes_so_many_tokens_at_a_time(tile, seen):
    assert run_on_ranks(1, tiles_of_a_step, tile)[0] == seen


def tiles_of_a_step(rank, world_size, tile):
    """The numbers of tokens that silu was given within tiles: 32 are 5 tiles of 6 and one of 2."""
    keys = {"training": {"mlp_tile_tokens": tile, "local_batch_size": 2}}
    config, _, step = make(Setup(keys), world_size)
    with pytest.MonkeyPatch.context() as patch:
        numbers, original = set(), F.silu

        def noting(x):
            if x.dim() == 2:
                numbers.add(len(x))
            return original(x)

        patch.setattr(F, "silu", noting)
        step(1, batches_of(1, rank, world_size, config, padded=False))
    return numbers
