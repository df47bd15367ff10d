"""A checkpoint is the same whatever the degrees: saved by one layout of ranks, continued by another one,
exported from either.
"""

import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.whole_run import FAMILIES, whole_run
from torchtitan_rd.checkpoint.manifest import read_manifest, verify
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf

# Ranks, and how they are laid out.
LAYOUTS = {
    "1": (1, {}),
    "dp 2": (2, {}),
    "dp 4": (4, {}),
    "2 copies x dp 2": (4, {"parallelism.data_parallel_replicate_degree": 2}),
    "2 copies in chunks": (
        4,
        {"parallelism.data_parallel_replicate_degree": 2, "parallelism.all_reduce_chunk_mb": 1},
    ),
    "dp 2 x cp 2": (4, {"parallelism.context_parallel_degree": 2}),
    "tp 2 x dp 2": (4, {"parallelism.tensor_parallel_degree": 2}),
}
CHECKPOINTS = {
    "checkpoint.enable": True,
    "checkpoint.interval": 5,
    "checkpoint.async_mode": "disabled",
}


def run(layout: str, folder: Path, family: str) -> dict:
    """A run of ten steps, or what is left of it, that is saved at 5 and 10."""
    world_size, keys = LAYOUTS[layout]
    results = run_on_ranks(world_size, whole_run, folder, family, CHECKPOINTS | keys, timeout=300)
    assert {result["status"] for result in results} == {"finished"}
    return results[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(layout, family) -> (folder, what the run gave)."""
    found = {}

    def of(layout: str, family: str) -> tuple[Path, dict]:
        if (layout, family) not in found:
            folder = tmp_path_factory.mktemp("saved")
            found[layout, family] = folder, run(layout, folder, family)
        return found[layout, family]

    return of


def continued(first: str, second: str, family: str, saved, folder: Path) -> None:
    """Steps 6 to 10 of `second` after step 5 of `first`, compared with one rank that was never disturbed."""
    before, _ = saved(first, family)
    _, undisturbed = saved("1", family)
    # Without the rows of steps 1 to 5: a run that began anew would write them.
    shutil.copytree(before, folder, ignore=shutil.ignore_patterns(".lock", "step-10", "metrics.jsonl"))
    found = run(second, folder, family)
    assert read_manifest(folder / "checkpoint" / "step-10").world_size == LAYOUTS[second][0]
    assert sorted(found["losses"]) == [6, 7, 8, 9, 10]
    for step, loss in found["losses"].items():
        assert loss == pytest.approx(undisturbed["losses"][step], abs=1e-6)
        assert found["batches"][step] == undisturbed["batches"][step]
    for name, gradient in undisturbed["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_four_shards_are_continued_by_one_rank(saved, tmp_path):
    continued("dp 4", "1", "llama", saved, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), list(permutations(LAYOUTS, 2)))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_layout_saves_any_other_continues(family, first, second, saved, tmp_path):
    continued(first, second, family, saved, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_converters_see_no_difference_between_layouts(family, saved, tmp_path):
    """Names, shapes, types and values, the latter to the rounding of five updates."""
    exports = {}
    for layout in LAYOUTS:
        step = saved(layout, family)[0] / "checkpoint" / "step-5"
        assert verify(step) == []
        exports[layout] = open_dcp(step)
        told = to_hf(exports[layout], tmp_path / layout, verify=True)
        assert "verified" in told
        assert sorted(p.name for p in (tmp_path / layout).iterdir()) == sorted(
            p.name for p in (tmp_path / "1").iterdir()
        )
    of_one = exports["1"]
    for layout, weights in exports.items():
        assert weights.tensors == of_one.tensors, layout
        for name in of_one.tensors:
            found, expected = weights.read(name), of_one.read(name)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=f"{name} of {layout}")
