"""Every technique of memory and of distribution, alone and with each other one: ten steps of a whole run
see the same batches, losses and gradients as one plain process.
"""

from itertools import combinations
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.whole_run import FAMILIES, whole_run

FULL = {"activation_checkpoint.mode": "full"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "recomputation": FULL,
    "kept attention": {**FULL, "activation_checkpoint.keep": "attention"},
    "offloaded inputs": {**FULL, "activation_checkpoint.offload": True},
    "loss in chunks": {"training.loss_chunk_tokens": 7},
    "tiled feed-forward": {"training.mlp_tile_tokens": 5},
    "compiled": {"compile.enable": True, "compile.backend": "aot_eager"},
    "gathered throughout": {"parallelism.fsdp_reshard_after_forward": "never"},
    "gathered ahead": {"parallelism.fsdp_prefetch_units": 3},
    "gradients once": {"parallelism.reduce_each_microbatch": False},
    "copies": {"parallelism.data_parallel_replicate_degree": 2},
    "copies in chunks": {
        "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.all_reduce_chunk_mb": 1,
    },
    "context": {"parallelism.context_parallel_degree": 2},
    "tensor": {"parallelism.tensor_parallel_degree": 2},
}
DEGREES = ("data_parallel_replicate_degree", "context_parallel_degree", "tensor_parallel_degree")
# "copies in chunks" is "copies" already.
PAIRS = [pair for pair in combinations(TECHNIQUES, 2) if pair != ("copies", "copies in chunks")]


def fewest_ranks(keys: dict[str, Any]) -> int:
    return 2 ** sum(key.endswith(DEGREES) for key in keys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    found = {}

    def of(family):
        if family not in found:
            folder = tmp_path_factory.mktemp("plain")
            keys = {"training.local_batch_size": 8}
            found[family] = run_on_ranks(1, whole_run, folder, family, keys)[0]
        return found[family]

    return of


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "raven"])
def test_every_technique_that_one_run_can_have_together(family, plain, tmp_path):
    """One row of this file is not slow."""
    keys = {**TECHNIQUES["kept attention"], **TECHNIQUES["offloaded inputs"], **TECHNIQUES["gradients once"]}
    keys |= TECHNIQUES["loss in chunks"] | TECHNIQUES["tiled feed-forward"] | TECHNIQUES["gathered ahead"]
    assert_same(run_on_ranks(2, whole_run, tmp_path, family, keys), plain(family))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_technique_alone(family, name, world_size, plain, tmp_path):
    found = run_on_ranks(world_size, whole_run, tmp_path, family, TECHNIQUES[name], timeout=300)
    assert_same(found, plain(family))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_technique_with_another_one(family, names, world_size, plain, tmp_path):
    keys = TECHNIQUES[names[0]] | TECHNIQUES[names[1]]
    if world_size < fewest_ranks(keys):
        pytest.skip("two degrees of 2 need 4 ranks")
    found = run_on_ranks(world_size, whole_run, tmp_path, family, keys, timeout=300)
    assert_same(found, plain(family))


def assert_same(results, expected):
    """Losses and the last step's gradients, whose norm is at most 1, within 1e-5."""
    for result in results:
        assert result["status"] == "finished"
        assert result["batches"] == expected["batches"] and len(result["batches"]) == 10
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-5, rtol=0, msg=name)
