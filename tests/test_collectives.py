"""The collectives of one whole step, as benchmarks/collectives.py counts them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import collectives

LAYERS = 8
SMALL = 2  # valid tokens before backward, everything else after it


@pytest.fixture(autouse=True)
def ranks():
    assert not dist.is_initialized()
    with collectives.fake_ranks():
        yield


def expected(gathers: int, units: int, layout: str, accumulation: int) -> dict[str, int]:
    """Parameters and gradients move with every microbatch; between copies of the model only once a step."""
    return {
        "all-gather": gathers * accumulation,
        "reduce-scatter": units * accumulation,
        "all-reduce": units if layout == "HSDP" else 0,
        "of the step": SMALL,
    }


@pytest.mark.parametrize("layout", collectives.LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_has_a_unit_a_layer_and_two_more_or_its_root_where_the_head_is_tied(layout, tied):
    config, model = collectives.build("llama3", replace(collectives.LLAMA, tie_word_embeddings=tied), layout)
    named = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    # Norm and output are one unit; an untied root has no parameters.
    outer = ["", "norm", "output", "tok_embeddings"]
    assert sorted(named) == sorted([*([""] if tied else outer), *(f"layers.{i}" for i in range(LAYERS))])
    # Each unit twice, but for the one that backward begins with.
    gathers, units = (2 * LAYERS + 1, LAYERS + 1) if tied else (2 * LAYERS + 3, LAYERS + 2)
    for accumulation in (1, 4):
        assert collectives.count(config, model, accumulation) == expected(
            gathers, units, layout, accumulation
        )


FIRST, *BETWEEN, LAST = collectives.DRAWS


@pytest.mark.parametrize("layout", collectives.LAYOUTS)
@pytest.mark.parametrize("draw", [FIRST, *(pytest.param(d, marks=pytest.mark.slow) for d in BETWEEN), LAST])
def test_a_raven_s_collectives_do_not_depend_on_the_draw(layout, draw):
    config, model = collectives.build("raven", collectives.RAVEN, layout)
    # Root (ln_f, tied embedding and head) and loop are gathered once, 2 prelude and 2 coda blocks twice.
    for accumulation in (1, 4):
        assert collectives.count(config, model, accumulation, draw) == expected(10, 6, layout, accumulation)
