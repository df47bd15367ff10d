"""Ranks that share the tokens of a row compute what one rank computes alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from tests.shared_rows_run import Case, assert_alike, assert_recurrent_alike, merged, on, train
from tests.small_run import GLOBAL_BATCH, SEQ_LEN
from torchtitan_rd.model_spec import WrapPlan
from torchtitan_rd.models.attention import attend
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.parallelism.context_parallel import apply_context_parallel, over_whole_sequences

SLOW = pytest.mark.slow
# A key head that ranks must share, and documents with borders on both sides of the cuts.
LLAMA = Case("llama3", overrides={"n_kv_heads": 1}, document_mask=True)
RAVEN = Case("raven")


class Moved(TorchDispatchMode):
    """Elements that this rank gives to each kind of collective."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.seen[function.overloadpacket.__name__] += sum(x.numel() for x in given)
        return function(*args, **(kwargs or {}))


def gathers_and_sums(result):
    moved = {
        name: number for name, number in result["watched"].items() if "gather" in name or "reduce" in name
    }
    assert len(moved) == 4, moved
    return moved


def test_a_llama_whose_ranks_share_rows_trains_as_one_rank_does_and_exchanges_heads_alone():
    alone = run_on_ranks(1, train, replace(LLAMA, sections=on(1, rows=GLOBAL_BATCH)))[0]
    sharded = run_on_ranks(2, train, replace(LLAMA, sections=on(1, rows=GLOBAL_BATCH // 2), watch=Moved))[0]
    for found in run_on_ranks(2, train, replace(LLAMA, sections=on(2, rows=GLOBAL_BATCH), watch=Moved)):
        assert_alike(found, alone)

        # q and out of 32 wide tokens, k and v of one head of 8, of which each rank gets a copy. A microbatch
        # and a layer exchange them once forward and once back.
        per_token = 32 * (1 + 1 + 2 * (2 / 4))
        layers, steps = 2, LLAMA.steps
        expected = 2 * layers * steps * GLOBAL_BATCH * (SEQ_LEN // 2) * per_token
        assert found["watched"]["all_to_all_single"] == expected
        # All else is what sharding over two ranks moves in any case.
        assert gathers_and_sums(found) == gathers_and_sums(sharded)


def test_a_raven_whose_ranks_share_rows_draws_the_same_state_and_trains_and_reports_as_one_rank_does():
    alone = run_on_ranks(1, train, replace(RAVEN, sections=on(1, rows=GLOBAL_BATCH)))[0]
    ranks = run_on_ranks(2, train, replace(RAVEN, sections=on(2, rows=GLOBAL_BATCH)))
    assert_recurrent_alike(ranks, alone)


LAYOUTS = {
    "2 of context": (2, on(2, rows=4)),
    "2 of context x 2 of rows": (4, on(2, rows=4)),
    "4 of context": (4, on(4, rows=4)),
    "2 copies x 2 of context": (4, on(2, replicate=2, rows=4)),
}


@SLOW
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [LLAMA, RAVEN], ids=["llama", "raven"])
def test_ten_steps_are_those_of_one_rank_on_any_layout(case, layout):
    ranks, sections = LAYOUTS[layout]
    alone = run_on_ranks(1, train, replace(case, steps=10, sections=on(1, rows=GLOBAL_BATCH)))[0]
    for found in run_on_ranks(ranks, train, replace(case, steps=10, sections=sections)):
        assert found["depths"][0][0] == alone["depths"][0][0]
        assert_alike(found, alone)


OTHERS = {
    "loss in chunks": {"training": {"loss_chunk_tokens": 3}},
    "tiled feed-forward": {"training": {"mlp_tile_tokens": 3}},
    "goldfish labels": {"training": {"goldfish_strategy": "static", "goldfish_k": 3}},
    "goldfish by context": {"training": {"goldfish_strategy": "hash-table", "goldfish_context_width": 5}},
    "z-loss": {"training": {"z_loss_weight": 1e-3}},
    "recomputed blocks": {"activation_checkpoint": {"mode": "full", "recurrent_region": "block"}},
    "recomputed iterations": {"activation_checkpoint": {"mode": "full"}},
    "by op": {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}},
    "attention kept": {"activation_checkpoint": {"mode": "full", "keep": "attention"}},
    "inputs in host memory": {"activation_checkpoint": {"mode": "full", "offload": True}},
    "never resharded": {"parallelism": {"fsdp_reshard_after_forward": "never"}},
    "compiled": {"compile": {"enable": True, "fail_on_recompile": True, "backend": "aot_eager"}},
    "compiled and recomputed": {
        "compile": {"enable": True, "fail_on_recompile": True, "backend": "aot_eager"},
        "activation_checkpoint": {"mode": "full", "keep": "attention"},
    },
}


@SLOW
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("case", [LLAMA, RAVEN], ids=["llama", "raven"])
def test_with_every_other_technique_rows_are_shared_without_a_trace(case, other):
    """Against one rank without the technique, but for those that change the labels or the objective."""
    changes = OTHERS[other]
    own_objective = {"goldfish labels", "goldfish by context", "z-loss"}
    alone = run_on_ranks(1, train, merged(case, on(1, rows=4), changes if other in own_objective else {}))[0]
    for found in run_on_ranks(2, train, merged(case, on(2, rows=4), changes), timeout=280):
        assert_alike(found, alone)


def exchanged(rank, world_size, heads, kv_heads):
    """This rank's tokens of attention over all, forward and backward, and the same cut from the whole."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    whole = [torch.randn(2, h, 8, 4, generator=generator, dtype=torch.float64) for h in sizes]
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)

    def run(function, tensors):
        *leaves, gradient = (t.clone().requires_grad_() for t in tensors)
        out = function(*leaves, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    seen = []

    def watched(q, k, v, mask):
        seen.append((q.shape, k.shape, v.shape))
        return attend(q, k, v, mask)

    found = run(over_whole_sequences(watched, dist.group.WORLD), [t[:, :, own] for t in whole])
    return found, [t[:, :, own] for t in run(attend, whole)], [tuple(shape) for shape in seen[0]]


@pytest.mark.parametrize(
    ("world_size", "heads", "kv_heads", "kernel"),
    [
        (2, 4, 4, (2, 2)),
        (2, 4, 1, (2, 1)),
        pytest.param(4, 12, 6, (3, 3), marks=SLOW),  # a key head for two of queries, three of queries a rank
        pytest.param(4, 8, 2, (2, 1), marks=SLOW),
    ],
)
def test_attention_over_ranks_is_attention_with_its_share_of_the_heads_in_the_kernel(
    world_size, heads, kv_heads, kernel
):
    for found, expected, (q, k, v) in run_on_ranks(world_size, exchanged, heads, kv_heads):
        assert q == (2, kernel[0], 8, 4) and k == v == (2, kernel[1], 8, 4)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_without_a_context_dimension_a_model_is_left_as_it_is():
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    model = torch.nn.Module()
    apply_context_parallel(model, WrapPlan(blocks=()), ParallelDims(1, 2).build_mesh("cpu"))
    assert not vars(model).get("attend")
