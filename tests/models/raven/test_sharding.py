"""The recurrence under FSDP: exact gradients, collectives that do not depend on depth,
ranks that may differ in it.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.raven.tiny import RETROFITTED, some_state, some_tokens, tiny_config
from tests.ranks import TWO_FIRST, run_on_ranks
from torchtitan_rd.models.raven.init import inits
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.plan import wrap_plan
from torchtitan_rd.parallelism import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
    ShardingKeys,
    TilingKeys,
    fsdp,
    init_weights,
    parallelize,
)
from torchtitan_rd.parallelism.activation_checkpoint import checkpoint_regions

BATCH = 4
DRAWS = [(0, 1), (3, 2), (4, 4), (3, 0), (0, 0)]
AC = {
    "none": {"mode": "none"},
    "iteration": {"mode": "full"},
    "block": {"mode": "full", "recurrent_region": "block"},
    "by op": {"mode": "selective", "selective_ac_option": "op"},
}


@dataclass(frozen=True)
class Case:
    ac: str = "none"
    compile: bool = False
    reshard: str = "default"
    fields: dict = field(default_factory=dict)


def build(world_size: int, case: Case) -> Raven:
    """A tiny raven as training wraps it, with the weights of `reference`'s."""
    with torch.device("meta"):
        model = Raven(tiny_config(**case.fields))
    fills = inits(model)
    parallelize(
        model,
        wrap_plan(model),
        init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",)),
        parallelism=ParallelismConfig(fsdp_reshard_after_forward=case.reshard),
        activation_checkpoint=ActivationCheckpointConfig(**AC[case.ac]),
        compile=CompileConfig(enable=case.compile, backend="eager"),
        sharding=ShardingKeys(mixed_precision_param="float32"),
        tiling=TilingKeys(),
    )
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    init_weights(model, fills, seed=0)
    return model


def backward(model: Raven, draw: tuple[int, int], rows: slice) -> None:
    """Adds the gradient of these rows' share of the mean loss over BATCH rows."""
    tokens, state = some_tokens(BATCH)[rows], some_state(BATCH)[rows]
    logits = model(tokens, num_steps=draw, initial_state=state)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    (loss / (BATCH * tokens.shape[1])).backward()


def own_rows(rank: int, world_size: int) -> slice:
    share = BATCH // world_size
    return slice(rank * share, (rank + 1) * share)


def gradients(rank: int, world_size: int, case: Case) -> dict:
    """Full gradients for each of DRAWS; each draw follows another one on the same model."""
    torch._dynamo.reset()
    model, found = build(world_size, case), {}
    for draw in DRAWS:
        model.zero_grad()
        backward(model, draw, own_rows(rank, world_size))
        found[draw] = {
            name: None if p.grad is None else p.grad.full_tensor().clone()
            for name, p in model.named_parameters()
        }
    return found


def reference(fields: dict, draws: list[tuple[tuple[int, int], slice]]) -> dict:
    """Gradients of an unsharded model, summed over (draw, rows)."""
    model = Raven(tiny_config(**fields))
    init_weights(model, inits(model), seed=0)
    for draw, rows in draws:
        backward(model, draw, rows)
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(found: dict, expected: dict, where: object) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), f"{name} at {where}"
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{name} at {where}")


CASES = {
    **{f"checkpointing {ac}": Case(ac=ac) for ac in AC},
    "never resharded": Case(reshard="never"),
    "always resharded": Case(reshard="always", ac="iteration"),
    "compiled": Case(compile=True),
    "compiled and checkpointed": Case(compile=True, ac="iteration"),
    "untied": Case(fields={"tie_word_embeddings": False}),
    "post-norm, add": Case(fields={"block": "post", "injection": "add", "init_strategy": "scaled"}),
    "pre-norm, every option": Case(
        ac="iteration", fields={"block": "pre", "n_kv_heads": 2, "qk_norm": True, "clip_qkv": 0.1}
    ),
    "retrofitted": Case(ac="block", fields=RETROFITTED),
    "no injection": Case(fields={"injection": "none"}),
    "no prelude, no coda": Case(ac="iteration", fields={"n_layers_prelude": 0, "n_layers_coda": 0}),
}


@pytest.mark.parametrize("world_size", TWO_FIRST)
@pytest.mark.parametrize("name", CASES)
def test_sharded_gradients_equal_those_of_one_unsharded_process(name, world_size):
    case = CASES[name]
    expected = {draw: reference(case.fields, [(draw, slice(None))]) for draw in DRAWS}
    for found in run_on_ranks(world_size, gradients, case):
        for draw in DRAWS:
            assert_close(found[draw], expected[draw], draw)


@pytest.mark.parametrize("ac", ["none", "iteration"])
def test_ranks_that_draw_different_depths_finish_and_match_a_reference(ac):
    draws = [((0, 1), own_rows(0, 2)), ((7, 4), own_rows(1, 2))]
    for found in run_on_ranks(2, unequal, Case(ac=ac)):
        assert_close(found, reference({}, draws), "unequal depths")


def unequal(rank, world_size, case):
    model = build(world_size, case)
    backward(model, [(0, 1), (7, 4)][rank], own_rows(rank, world_size))
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.__name__ or "reduce_scatter" in func.__name__:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reshard", ["default", "never"])
@pytest.mark.parametrize("ac", ["none", "iteration"])
def test_the_number_of_collectives_does_not_depend_on_the_depth(ac, reshard):
    for counts in run_on_ranks(2, collectives, Case(ac=ac, reshard=reshard)):
        assert counts[0] == counts[1] == counts[2] == counts[3]
        gathered, reduced = (
            sum(n for name, n in counts[0].items() if kind in name) for kind in ("gather", "reduce")
        )
        assert reduced == 4  # root, prelude, loop, coda
        assert gathered == (6 if reshard == "default" else 4)  # prelude and coda twice; root and loop once


def collectives(rank, world_size, case):
    model, counts = build(world_size, case), []
    for draw in [(0, 1), (4, 4), (24, 8), (56, 8)]:
        model.zero_grad()
        with CountCollectives() as counter:
            backward(model, draw, own_rows(rank, world_size))
        counts.append(counter.counts)
    return counts


@pytest.mark.parametrize(
    ("reshard", "tied", "gathers"),
    # Units: prelude, loop, coda and root; where the head is not tied, embedding and head too.
    # By default backward gathers all of them again but for loop, head and root; with `always` those too.
    [
        *(("default", True, 6), ("always", True, 8), ("never", True, 4)),
        *(("default", False, 9), ("always", False, 12), ("never", False, 6)),
    ],
)
def test_how_often_units_are_gathered_follows_the_key(reshard, tied, gathers):
    case = Case(reshard=reshard, fields={"tie_word_embeddings": tied})
    for counts in run_on_ranks(2, collectives, case):
        assert sum(n for name, n in counts[0].items() if "gather" in name) == gathers


@pytest.mark.parametrize("ac", ["none", "iteration", "block"])
def test_one_set_of_graphs_serves_sixteen_draws(ac):
    """Blocks are compiled, not the loop: a new depth must not compile anything."""
    first, last = run_on_ranks(1, graphs, Case(compile=True, ac=ac))[0]
    assert 0 < first == last <= 6


def graphs(rank, world_size, case):
    torch._dynamo.reset()
    counters.clear()
    model, seen = build(world_size, case), []
    for draw in [(1, 1), *((n, 1 + n % 4) for n in range(15))]:
        backward(model, draw, slice(None))
        seen.append(counters["stats"]["unique_graphs"])
    return seen[0], seen[-1]


def test_evaluation_between_steps_leaves_training_as_it_was():
    for before, after in run_on_ranks(2, evaluated, Case(ac="iteration")):
        assert_close(after, before, "after an evaluation")


def evaluated(rank, world_size, case):
    model, found = build(world_size, case), []
    # As an optimizer holds them: after an evaluation the root shows its gathered parameters instead.
    parameters = list(model.parameters())
    for depth in (0, 9):
        if depth:
            with torch.no_grad():
                model(some_tokens(BATCH), num_steps=(depth, 0), initial_state=some_state(BATCH))
        for parameter in parameters:
            parameter.grad = None
        backward(model, (2, 2), own_rows(rank, world_size))
        found.append({name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
    dist.barrier()
    return found


def test_regions_are_whole_iterations_or_blocks():
    plan = wrap_plan(Raven(tiny_config()))
    core = "transformer.recurrence.iteration"
    outer = ["transformer.prelude.0", "transformer.coda.0"]
    blocks = [outer[0], f"{core}.core_block.0", f"{core}.core_block.1", outer[1]]
    assert checkpoint_regions(plan, ActivationCheckpointConfig(**AC["iteration"])) == [*outer, core]
    for other in ("block", "by op"):
        assert checkpoint_regions(plan, ActivationCheckpointConfig(**AC[other])) == blocks
    assert plan.loops == (("transformer.recurrence", core),)


@pytest.mark.parametrize("ac", ["none", "iteration", "block"])
def test_checkpointing_keeps_parameter_names(ac):
    names = run_on_ranks(1, state_names, Case(ac=ac, compile=True))[0]
    assert names == sorted(Raven(tiny_config()).state_dict())


def state_names(rank, world_size, case):
    return sorted(build(world_size, case).state_dict())


def test_the_loop_is_gathered_again_where_its_parameters_are_too_large_to_hold_or_the_user_says_so():
    assert (
        run_on_ranks(2, gathers_of_the_loop)
        == [{"default": 1, "too large": 2, "always": 2, "never": 1, "never, too large": 1}] * 2
    )


def gathers_of_the_loop(rank, world_size):
    found, bound = {}, fsdp.KEPT_LOOP_BYTES
    reshards = {"default": "default", "too large": "default", "always": "always"}
    for name, reshard in {**reshards, "never": "never", "never, too large": "never"}.items():
        size = fsdp.gathered_bytes(Raven(tiny_config()).transformer.recurrence, torch.float32)
        fsdp.KEPT_LOOP_BYTES = size - ("too large" in name)
        model = build(world_size, Case(reshard=reshard))
        fsdp.KEPT_LOOP_BYTES = bound
        with Order() as order:
            backward(model, (2, 2), own_rows(rank, world_size))
        # Padded, as each parameter is split by rows.
        found[name] = sum(op.startswith("gather") and int(op.split()[1]) * 4 >= size for op in order.ops)
    return found


class Order(TorchDispatchMode):
    """The gathers ("gather <elements>"), and the matrix products, in their order."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.__name__:
            self.ops.append(f"gather {args[0].numel()}")
        elif func.__name__.startswith(("mm", "addmm", "linear", "_scaled_dot_product")):
            self.ops.append("compute")
        return func(*args, **(kwargs or {}))


def test_the_gather_of_the_loop_is_under_way_before_the_prelude_computes():
    for ops in run_on_ranks(2, order_of_a_forward):
        before = ops[: ops.index("compute")]
        largest = max(int(op.split()[1]) for op in ops if op != "compute")
        # root (tied embedding, ln_f), prelude, loop.
        assert f"gather {largest}" == before[-1] and len(before) == 3


def order_of_a_forward(rank, world_size):
    model = build(world_size, Case())
    with Order() as order:
        model(some_tokens(BATCH), num_steps=(1, 1), initial_state=some_state(BATCH))
    return order.ops


@pytest.mark.parametrize("world_size", TWO_FIRST)
@pytest.mark.parametrize("name", ["checkpointing none", "checkpointing iteration", "never resharded"])
def test_several_updates_equal_those_of_one_unsharded_process(name, world_size):
    """A unit that stays gathered too long would go on with the weights of an earlier step,
    without an error.
    """
    model = Raven(tiny_config())
    init_weights(model, inits(model), seed=0)
    expected = updated(model, slice(None))
    for found in run_on_ranks(world_size, updates, CASES[name]):
        for step, parameters in enumerate(expected):
            assert_close(found[step], parameters, f"step {step + 1}")


def updates(rank, world_size, case):
    return updated(build(world_size, case), own_rows(rank, world_size))


def updated(model, rows) -> list[dict]:
    """The full parameters after each of some updates, large enough to see;
    one has two microbatches, one no loop.
    """
    # Held from here on: to ask the model for them, or for its state, would free what is gathered.
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    found = []
    for number, draw in enumerate([(3, 2), (4, 4), (3, 0), (0, 1)]):
        optimizer.zero_grad()
        backward(model, draw, rows)
        if number == 1:  # two microbatches
            backward(model, draw, rows)
        optimizer.step()
        found.append(
            {
                name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for name, p in parameters.items()
            }
        )
    return found
