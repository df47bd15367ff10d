"""What a traced step counts, against numbers that follow from the model's sizes."""

from dataclasses import replace

import pytest

from tests.planning.common import LLAMA, RAVEN, config_of, plan_of, planned
from torchtitan_rd.planning.compute import executed, model_flops
from torchtitan_rd.planning.draws import Depth, depths_of
from torchtitan_rd.planning.memory import estimate, measure
from torchtitan_rd.planning.trace import TracedRun
from torchtitan_rd.planning.tracker import Collective

FULL, ATTENTION = {"mode": "full"}, {"mode": "full", "keep": "attention"}
OFFLOADED = {"mode": "full", "offload": True}
BFLOAT16 = {"mixed_precision_param": "bfloat16"}
TOKENS, DIM, HEADS = 2 * 256, 64, 4


def layers(number: int) -> dict:
    return {**LLAMA, "overrides": {**LLAMA["overrides"], "n_layers": number}}


def left_by_forward(recompute: dict, number: int) -> tuple[int, int]:
    """Bytes that forward leaves, and those of them in host memory."""
    config = config_of(layers(number), activation_checkpoint=recompute, training=BFLOAT16)
    need = planned(config, 1, on_gpu=True).worst
    return need.saved, need.saved_on_host


@pytest.mark.parametrize(
    ("recompute", "of_a_block"),
    [
        (FULL, TOKENS * DIM * 2),
        (ATTENTION, TOKENS * (DIM * 2 * 2 + HEADS * 4)),  # and log-sum-exps in float32
    ],
)
def test_a_recomputed_block_leaves_what_the_page_on_memory_says(recompute, of_a_block):
    of_two_blocks = left_by_forward(recompute, 4)[0] - left_by_forward(recompute, 2)[0]
    assert of_two_blocks == pytest.approx(2 * of_a_block, abs=64)  # a kernel's two seeds


def test_offloaded_inputs_are_in_host_memory():
    left, on_host = left_by_forward(OFFLOADED, 4)
    assert on_host == 4 * TOKENS * DIM * 2
    assert left == left_by_forward(FULL, 4)[0]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cpu_offload_leaves_no_shard_of_a_layer_on_the_device(world_size):
    def peak(number: int) -> int:
        training = {**BFLOAT16, "enable_cpu_offload": True}
        config = config_of(layers(number), activation_checkpoint=FULL, training=training)
        return planned(config, world_size, on_gpu=True).worst.peak

    of_a_block = TOKENS * DIM * 2  # its input, which forward leaves
    assert peak(12) - peak(6) == pytest.approx(6 * of_a_block, abs=4096)


def test_a_run_with_muon_is_planned_with_one_moment_for_matrices_and_two_for_the_rest():
    config = config_of(layers(2), optimizer={"name": "Muon"})
    shape = plan_of(config, 2).shape
    rest = 2 * shape.vocab_size * DIM + (2 * 2 + 1) * DIM  # embedding, head, norms
    with TracedRun(config, plan_of(config, 2), on_gpu=True) as run:
        counts = run.optimizer - (run.parameters + rest * 4 // 2)
        depth = depths_of(plan_of(config, 2), 10).chosen[0]
        gathers = run.step(depth.inputs, depth.traced).collectives
    assert counts == (2 + 2 * 2 + 1) * 4, "a count of updates for each tensor of AdamW's"
    plain = planned(config_of(layers(2)), 2, on_gpu=True).depths[0].collectives
    # Each matrix of a block, whole, once.
    of_muon = {name: gathers[name].bytes - plain.get(name, Collective(0, 0)).bytes for name in gathers}
    matrices = run.parameters * 2 - rest * 4
    assert sum(of_muon.values()) == matrices


def test_messages_between_ranks_that_share_matrices_are_counted_whole_and_once():
    number = 6
    config = config_of(layers(number), parallelism={"tensor_parallel_degree": 2})
    collectives = planned(config, 2).depths[0].collectives
    assert not any(name.startswith("wait") for name in collectives)
    # Attention and feed-forward of each block, and the head gathers (backward scatters); the embedding
    # scatters (backward gathers).
    times = 2 * (2 * number) + 2
    whole = Collective(times, times * TOKENS * DIM * 4)
    assert collectives["all_gather_into_tensor"] == whole
    assert collectives["reduce_scatter_tensor"] == whole


def test_attention_holds_no_matrix_of_all_pairs_on_a_gpu():
    length = 16384
    training = {**BFLOAT16, "seq_len": length, "local_batch_size": 1}
    config = config_of(layers(2), activation_checkpoint=FULL, training=training)
    assert planned(config, 1, on_gpu=True).worst.peak < length * length


def test_the_norms_of_a_block_keep_no_tokens_of_their_own_on_a_gpu():
    """A CPU's norm keeps what it has normalized beside its input; a GPU's, fused, a number a token."""

    def left_by_a_block(on_gpu: bool) -> int:
        plans = [planned(config_of(layers(n), training=BFLOAT16), 1, on_gpu=on_gpu) for n in (2, 3)]
        return plans[1].worst.saved - plans[0].worst.saved

    of_two_norms = 2 * TOKENS * DIM * 2
    assert left_by_a_block(False) - left_by_a_block(True) == pytest.approx(of_two_norms, abs=64)


@pytest.mark.parametrize("model", [LLAMA, RAVEN], ids=["llama", "raven"])
def test_flops_are_those_of_the_model(model):
    config = config_of(model)
    plan = plan_of(config, 2)
    depths = depths_of(plan, 10)
    passes = executed(measure(config, plan, depths.chosen).depths[0].flops, plan.seq_len)
    assert "recompute" not in passes
    assert sum(passes.values()) * 2 == pytest.approx(model_flops(plan, depths))
    assert ("without gradient" in passes) == (model is RAVEN)


def test_what_muon_computes_is_the_update_s_and_is_done_once_a_step():
    """Newton-Schulz on whole matrices, s the shorter side: two products of s x l x s, one of s x s x s."""
    accumulating = {"training": {"global_batch_size": 16}}  # 4 microbatches
    plain, muon = (
        planned(config_of(LLAMA, **accumulating, optimizer=optimizer), 2)
        for optimizer in ({}, {"name": "Muon", "muon_ns_steps": 3})
    )
    matrices = [(DIM, DIM)] * 2 + [(DIM // 2, DIM)] * 2 + [(DIM, 160)] * 3
    update = sum(4 * short**2 * long + 2 * short**3 for short, long in matrices) * 3 * 4  # steps, layers
    assert muon.depths[0].flops == {**plain.depths[0].flops, ("update", "matmul"): update}

    of_matrices = (
        4 * 4 * sum(short * long for short, long in matrices) // 2
    )  # one moment, and half of it here
    assert plain.optimizer - muon.optimizer == pytest.approx(of_matrices, rel=0.01)


@pytest.mark.parametrize("implementation", ["foreach", "for-loop"])
def test_an_update_that_takes_no_flag_is_planned_too(implementation):
    plain, planned_here = (
        planned(config_of(layers(1), optimizer=optimizer), 1, on_gpu=True)
        for optimizer in ({}, {"implementation": implementation})
    )
    assert planned_here.optimizer == plain.optimizer
    assert planned_here.worst.saved == plain.worst.saved


def test_recomputation_repeats_the_blocks_and_attention_alone_if_it_is_not_kept():
    def recomputed(recompute: dict) -> dict:
        return planned(config_of(LLAMA, activation_checkpoint=recompute), 1).depths[0].flops

    assert recomputed(FULL)["recompute", "attention"] == recomputed(FULL)["forward", "attention"]
    assert ("recompute", "attention") not in recomputed(ATTENTION)


@pytest.mark.slow
def test_memory_does_not_grow_with_iterations_without_gradient():
    config = config_of(RAVEN)
    plan = plan_of(config, 1)
    depth = depths_of(plan, 10).chosen[0]

    class AsDrawn(Depth):
        traced = property(lambda self: self.num_steps)

    one, five = measure(
        config, plan, [AsDrawn("mean", (n, 3), depth.inputs) for n in (1, 5)], on_gpu=True
    ).depths
    assert five.need.peak == pytest.approx(one.need.peak, rel=1e-3)
    by_hand = measure(config, plan, [replace(depth, num_steps=(5, 3))], on_gpu=True).depths[0]
    assert by_hand.flops == five.flops


@pytest.mark.parametrize(
    ("model", "recompute"),
    [
        pytest.param(layers(8), {"mode": "selective"}, id="llama"),
        pytest.param(layers(8), FULL, id="gradients in flight"),
        pytest.param(RAVEN, FULL, id="raven", marks=pytest.mark.slow),
    ],
)
def test_a_few_layers_or_iterations_tell_the_whole(model, recompute):
    if model is RAVEN:
        deeper = {"mean_recurrence": 9, "mean_backprop_depth": 6}
        model = {**RAVEN, "overrides": {**RAVEN["overrides"], **deeper}}
    config = config_of(model, activation_checkpoint=recompute)
    plan = plan_of(config, 2)
    depth = depths_of(plan, 10).chosen[0]
    whole, told = measure(config, plan, [depth]).depths[0], estimate(config, plan, depth)
    assert told.need.peak == pytest.approx(whole.need.peak, rel=0.01)
    assert told.need.saved == whole.need.saved
    assert told.flops == pytest.approx(whole.flops)
    assert told.collectives == whole.collectives


def test_ranks_that_share_a_sequence_hold_a_part_of_its_activations():
    def left(**degrees: int) -> int:
        config = config_of(LLAMA, activation_checkpoint=FULL, parallelism=degrees, training=BFLOAT16)
        return planned(config, 4, on_gpu=True).worst.saved

    shared = left(context_parallel_degree=2, data_parallel_shard_degree=2)
    assert shared == pytest.approx(left() / 2, rel=0.15)
