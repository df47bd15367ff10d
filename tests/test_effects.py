"""Keys that decide where and how a step computes, by what they change in it:
numbers computed by hand beside each.
"""

import gc
import logging
import math
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo import register_backend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks import collectives
from tests.launch import rows
from tests.models.raven.tiny import tiny_config
from tests.ranks import run_on_ranks
from tests.small_run import GLOBAL_BATCH, SEQ_LEN, VOCAB, Setup, batches_of, config_of, make
from tests.test_trainer import ALONE, SMALL, trainer
from tests.watching import Watch
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import load
from torchtitan_rd.data import Batch
from torchtitan_rd.model_spec import SINGLE_READ_OUT, ForwardInputs
from torchtitan_rd.models import get_spec
from torchtitan_rd.optimizer import build_optimizer, optimizer_state
from torchtitan_rd.optimizer.groups import parameter_groups
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep
from torchtitan_rd.validation import validate

CPU = torch.device("cpu")
BYTES = 4  # of a float32

# Of tests/small_run.py's model: width, that of keys and values, of the feed-forward; query heads.
E, KV, F, H = 32, 16, 48, 4
MATRICES = {"wq": E * E, "wk": E * KV, "wv": E * KV, "wo": E * E, "w1": E * F, "w3": E * F, "w2": F * E}

# Numbers a token that a block holds from forward to backward. Kept as it computes: of each of two norms the
# normed input, its scale and the output, which is what the matrices behind it need; queries, keys and values,
# what attention gives and its log-sum-exp a head; gate, its SiLU, up, and their product.
BLOCK = 2 * (2 * E + 1) + (E + 2 * KV) + (E + H) + 4 * F
# What is recomputed holds its input; by op also attention's results and every second product:
# wq, wv, w1 and w2.
BY_OP = E + (E + H) + (E + KV + F + E)

MODES = {
    # keys, numbers held by two blocks, matrices of two blocks that are multiplied again, attentions of two
    # blocks. The last product of a block is not repeated: nothing in backward needs what it gives.
    "none": ({"mode": "none"}, 2 * BLOCK, [], 2),
    "full": ({"mode": "full"}, 2 * E, 2 * ["wq", "wk", "wv", "wo", "w1", "w3"], 4),
    "every second block": (
        {"mode": "selective", "selective_ac_option": "2"},
        BLOCK + E,
        ["wq", "wk", "wv", "wo", "w1", "w3"],
        3,
    ),
    "full but attention": (
        {"mode": "full", "keep": "attention"},
        2 * (E + E + H),
        2 * ["wq", "wk", "wv", "wo", "w1", "w3"],
        2,
    ),
    "full but every second attention": (
        {"mode": "full", "keep": "attention", "keep_every": 2},
        2 * E + E + H,
        2 * ["wq", "wk", "wv", "wo", "w1", "w3"],
        3,
    ),
    "by op": ({"mode": "selective", "selective_ac_option": "op"}, 2 * BY_OP, 2 * ["wk", "wo", "w3"], 2),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_saves_and_recomputes_what_its_mode_says(mode, world_size):
    """Of two blocks, as the difference between steps of four and of two: all else is the same in both."""
    keys, held, again, attentions = MODES[mode]
    by_layers = {}
    for layers in (2, 4):
        setup = Setup(sections={"activation_checkpoint": keys}, overrides={"n_layers": layers})
        by_layers[layers] = run_on_ranks(world_size, watched_step, setup)
    tokens = GLOBAL_BATCH * SEQ_LEN // world_size
    flops = 2 * tokens * (3 * 2 * sum(MATRICES.values()) + sum(MATRICES[name] for name in again))
    for two, four in zip(by_layers[2], by_layers[4], strict=True):
        assert four["held"] - two["held"] == BYTES * tokens * held
        assert four["flops"] - two["flops"] == flops
        assert four["attention"] - two["attention"] == attentions


def watched_step(rank, world_size, setup):
    """The second of two steps, in which nothing is made for the first time any more."""
    config, model, step = make(setup, world_size)
    step(1, batches_of(1, rank, world_size, config, padded=False))
    with Watch(model) as watch:
        step(2, batches_of(2, rank, world_size, config, padded=False))
    return {
        "held": watch.held,
        "flops": watch.matmul_flops,
        "attention": watch.operations["_scaled_dot_product_flash_attention_for_cpu"],
        "operations": watch.operations,
        "types": watch.collective_types,
        "parameters": len(list(model.parameters())),
    }


# tests/models/raven/tiny.py: two core blocks, and an adapter that takes state and embedded
# input side by side.
REGIONS = {"iteration": E, "block": 2 * E + 2 * E}


@pytest.mark.parametrize("region", REGIONS)
def test_the_recurrent_region_is_what_an_iteration_holds_and_repeats(region):
    """An iteration with gradient holds the state it starts from, or its adapter's and its blocks' inputs.

    Four iterations against two. The blocks are repeated whole,
    as their last norm needs all that stands before it.
    """
    two, four = (run_on_ranks(1, recurrent_step, region, k)[0] for k in (2, 4))
    tokens = GLOBAL_BATCH * SEQ_LEN
    assert four["held"] - two["held"] == 2 * BYTES * tokens * REGIONS[region]
    adapter, block = 2 * E * E, E * 3 * E + E * E + E * 2 * F + F * E
    repeated = 2 * block + (adapter if region == "iteration" else 0)
    assert four["flops"] - two["flops"] == 2 * 2 * tokens * (3 * (adapter + 2 * block) + repeated)


def recurrent_step(rank, world_size, region, k):
    config, model = recurrent(
        world_size, {"activation_checkpoint": {"mode": "full", "recurrent_region": region}}
    )
    step = TrainStep(
        model, build_optimizer(model, config.optimizer), config.training, CPU, forward_inputs=depth_of(k)
    )
    batches = batches_of(1, rank, world_size, config, padded=False)
    step(1, batches)
    with Watch(model) as watch:
        step(2, batches)
    return {"held": watch.held, "flops": watch.matmul_flops}


def recurrent(world_size, sections):
    config = config_of(Setup(sections=sections), world_size)
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh("cpu")
    return config, build_model(config, get_spec("raven"), tiny_config(vocab_size=VOCAB), mesh, CPU)


def depth_of(k):
    def inputs(step, number, batch):
        state = torch.zeros(*batch.inputs.shape, E)
        return ForwardInputs({"num_steps": (1, k), "initial_state": state}, (1, k))

    return inputs


# Units with parameters: Llama's 8 blocks, embedding, and norm with head; raven's 2 + 2 blocks,
# its loop, and its root.
UNITS = {"llama3": (collectives.LLAMA, 8 + 2, None), "raven": (collectives.RAVEN, 2 + 2 + 1 + 1, (4, 4))}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("policy", ["always", "never"])
def test_units_are_gathered_by_policy_once_or_twice_in_a_step(name, policy):
    """always: for forward and again for backward, without exception. never: once.
    Gradients are reduced once a unit.
    """
    shape, units, draw = UNITS[name]
    with collectives.fake_ranks():
        config, model = collectives.build(name, shape, "FSDP", reshard=policy)
        found = collectives.count(config, model, 1, draw)
    assert found == {
        "all-gather": units * (2 if policy == "always" else 1),
        "reduce-scatter": units,
        "all-reduce": 0,
        "of the step": 2,
    }


@pytest.mark.parametrize("param", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_types_at_the_collectives_are_those_of_the_precision_keys(param, reduce):
    """Parameters are gathered in the one, gradients reduced in the other;
    sums of the step are of float32 and int64.
    """
    keys = {"mixed_precision_param": param, "mixed_precision_reduce": reduce}
    for result in run_on_ranks(2, watched_step, Setup(sections={"training": keys})):
        types = {}
        for collective, dtype in result["types"]:
            types.setdefault(collective, set()).add(dtype)
        assert types == {
            "allgather_base": {getattr(torch, param)},
            "reduce_scatter_base": {getattr(torch, reduce)},
            "allreduce": {torch.float32, torch.int64},
        }


LOOP_BLOCKS = 2


@pytest.mark.parametrize(("name", "calls"), [("llama3", 4), ("raven", 1 + (1 + 3) * LOOP_BLOCKS + 1)])
@pytest.mark.parametrize("enable", [True, False])
def test_every_block_is_compiled_by_the_backend_of_the_key_and_called_so(name, calls, enable):
    """A step calls compiled code once for each block, in each iteration of a loop. Without the key, never."""
    assert run_on_ranks(1, compiled_calls, name, enable) == [calls if enable else 0]


def compiled_calls(rank, world_size, name, enable):
    torch._dynamo.reset()
    calls = Counter()

    def counting(graph, example_inputs):
        def run(*inputs):
            calls["compiled"] += 1
            return graph.forward(*inputs)

        return run

    register_backend(counting, name="counting_calls")
    sections = {"compile": {"enable": enable, "backend": "counting_calls" if enable else "inductor"}}
    if name == "llama3":
        config, _, step = make(Setup(sections=sections), world_size)
    else:
        config, model = recurrent(world_size, sections)
        step = TrainStep(
            model, build_optimizer(model, config.optimizer), config.training, CPU, forward_inputs=depth_of(3)
        )
    step(1, batches_of(1, rank, world_size, config, padded=False))
    del torch._dynamo.backends.registry._COMPILER_FNS["counting_calls"]
    return calls["compiled"]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_the_implementation_of_the_key_is_the_one_that_runs(name, implementation):
    """One kernel a group, or one operation for all of a group, or one for each parameter."""
    optimizer = {"name": name, "implementation": implementation, "weight_decay": 0.0}
    (result,) = run_on_ranks(1, watched_step, Setup(sections={"optimizer": optimizer}))
    groups, parameters = 3, result["parameters"]
    kernels = {"fused": f"_fused_{name.lower()}_", "foreach": "_foreach_lerp_", "for-loop": "lerp_"}
    expected = dict.fromkeys(kernels.values(), 0)
    expected[kernels[implementation]] = parameters if implementation == "for-loop" else groups
    assert {kernel: result["operations"][kernel] for kernel in expected} == expected


def test_a_kind_of_parameters_of_which_some_are_sharded_and_some_whole_is_two_groups():
    """torch's kernels for many tensors take one sort; today's models have one sort of each kind."""
    assert run_on_ranks(1, groups_of_two_norms) == [[["first.weight"], ["second.weight"]]]


def groups_of_two_norms(rank, world_size):
    model = nn.ModuleDict({"first": nn.RMSNorm(4), "second": nn.RMSNorm(4)})
    fully_shard(model["first"], mesh=init_device_mesh("cpu", (1,)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(nn.ModuleDict({"norms": model}), 0.1, 0.0, False)
    return [[names[parameter] for parameter in group["params"]] for group in groups]


LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.8, 0.7, 1e-3, 0.3
OPTIMIZERS = {
    "AdamW": {"weight_decay": DECAY},
    "Adam": {"weight_decay": 0.0},
    "ELLISAdam": {"weight_decay": DECAY, "decouple_wd": False},
    "Muon": {"weight_decay": DECAY},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rate_betas_eps_and_decay_reach_every_optimizer(name):
    """Two updates, against Adam's formula in float64 on the gradients of these steps;
    Muon's for all but matrices.
    """
    keys = {"name": name, "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, **OPTIMIZERS[name]}
    training = {"max_norm": 1e6}
    ((before, gradients, after),) = run_on_ranks(
        1, two_updates, Setup(sections={"optimizer": keys, "training": training})
    )
    checked = 0
    for parameter, weight in before.items():
        if name == "Muon" and re.search(r"layers\..*w[qkvo123]", parameter):
            continue
        checked += 1
        expected = adamw(
            weight.double(), [g[parameter].double() for g in gradients], OPTIMIZERS[name]["weight_decay"]
        )
        torch.testing.assert_close(after[parameter].double(), expected, atol=1e-6, rtol=1e-5, msg=parameter)
    # Two norms a block; embedding, norm and head.
    assert checked == (len(before) if name != "Muon" else 4 * 2 + 3)


def two_updates(rank, world_size, setup):
    config, model, step = make(setup, world_size)
    whole = [{n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}]
    gradients = []
    for number in (1, 2):
        step(number, batches_of(number, rank, world_size, config, padded=False))
        gradients.append({n: p.grad.full_tensor().clone() for n, p in model.named_parameters()})
    whole.append({n: p.detach().full_tensor().clone() for n, p in model.named_parameters()})
    return whole[0], gradients, whole[1]


def adamw(weight, gradients, decay):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    first = second = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        corrected = first / (1 - BETA1**t), second / (1 - BETA2**t)
        weight = weight * (1 - LR * decay) - LR * corrected[0] / (corrected[1].sqrt() + EPS)
    return weight


@pytest.mark.parametrize(("world_size", "copies"), [(1, 1), (2, 1), (2, 2)])
def test_gradients_are_scaled_to_max_norm_and_left_alone_below_it(world_size, copies):
    """The norm is that of the whole gradients, over shards and not over copies of the model."""
    found = {}
    for max_norm in (1e6, 0.01):
        keys = {"training": {"max_norm": max_norm}, "parallelism": {"data_parallel_replicate_degree": copies}}
        found[max_norm] = run_on_ranks(world_size, gradients_of_a_step, Setup(sections=keys))[0]
    (norm, whole), (same_norm, scaled) = found[1e6], found[0.01]
    assert norm == pytest.approx(same_norm) == pytest.approx(float(torch.cat(whole).norm()), rel=1e-5)
    torch.testing.assert_close(torch.cat(scaled), torch.cat(whole) * 0.01 / norm, atol=1e-9, rtol=1e-4)


def gradients_of_a_step(rank, world_size, setup):
    """-> the norm that the step reports, and its whole gradients, flat."""
    config, model, step = make(setup, world_size)
    norm = step(1, batches_of(1, rank, world_size, config, padded=True)).grad_norm
    return norm, [p.grad.full_tensor().flatten() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_documents_of_a_row_train_and_validate_as_rows_of_their_own(world_size):
    """Each row holds two documents of half its length; positions count by their distance alone."""
    for packed, apart, joined in run_on_ranks(world_size, packed_and_apart):
        for key, value in apart.items():
            torch.testing.assert_close(packed[key], value, atol=1e-6, rtol=1e-4, msg=key)
            assert not torch.allclose(packed[key], joined[key], atol=1e-6, rtol=1e-4), (
                f"{key}: the mask has no effect"
            )


def packed_and_apart(rank, world_size):
    half = SEQ_LEN // 2
    config = config_of(Setup(), world_size)
    (batch,) = batches_of(1, rank, world_size, config, padded=False)
    documents = (torch.arange(SEQ_LEN) // half).int().expand_as(batch.inputs)
    packed = Batch(batch.inputs, batch.labels, documents)
    apart = Batch(batch.inputs.reshape(-1, half), batch.labels.reshape(-1, half), None)
    return [trained_and_validated(world_size, each) for each in (packed, apart, batch)]


def trained_and_validated(world_size, batch):
    _, model, step = make(Setup(), world_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.w" in name:  # as they start, attention adds next to nothing
                parameter.to_local().mul_(8)
    validated = validate(model, [batch], CPU, SINGLE_READ_OUT)["val_loss"]
    loss = step(1, [batch]).loss
    gradient = model.get_parameter("layers.0.attention.wq.weight").grad.full_tensor()
    return {"val_loss": torch.tensor(validated), "loss": torch.tensor(loss), "gradient": gradient}


def test_after_a_validation_every_parameter_is_sharded_again():
    """A checkpoint follows: what stayed gathered would not be found among the optimizer's parameters."""
    for names, state in run_on_ranks(2, sharded_after_validation):
        assert len(names) == 4 * 9 + 3 and state == set(names)


def sharded_after_validation(rank, world_size):
    config, model, step = make(Setup(), world_size)
    batches = batches_of(1, rank, world_size, config, padded=False)
    step(1, batches)
    validate(model, batches, CPU, SINGLE_READ_OUT)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    state = optimizer_state(model, step.optimizer)
    return sharded, {key.rpartition(".")[0] for key in state}


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_repeat_bit_for_bit_if_the_key_says_so(deterministic, tmp_path, monkeypatch):
    seen = []
    plain = TrainStep.__call__

    def noting(self, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", noting)
    try:
        trainer(tmp_path, *(["--training.deterministic"] if deterministic else [])).run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [deterministic] * 6


def test_the_rate_of_the_schedule_is_the_one_that_each_update_has(tmp_path, monkeypatch):
    """In the rows, and in the optimizer when it steps."""
    stepped = []
    plain = torch.optim.AdamW.step

    def noting(self, *arguments, **options):
        stepped.append({group["lr"] for group in self.param_groups})
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    schedule = [
        "--lr_scheduler.schedule=cosine",
        "--lr_scheduler.warmup_steps=2",
        "--lr_scheduler.min_lr_factor=0.1",
    ]
    trainer(tmp_path, *schedule, "--optimizer.lr=0.5", "--metrics.log_freq=1").run()
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * quarter / 4)) / 2 for quarter in range(4)]
    expected = pytest.approx([0.5 * factor for factor in (1 / 3, 2 / 3, *decay)], rel=1e-12)
    assert [row["lr"] for row in rows(tmp_path)] == expected
    assert all(len(rates) == 1 for rates in stepped)
    assert [rates.pop() for rates in stepped[-6:]] == expected  # before them one with rate 0 makes the state


@pytest.mark.parametrize("frequency", [1, 2, 50])
def test_garbage_is_collected_every_gc_freq_steps_and_never_in_between(frequency, tmp_path, monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
    run = trainer(tmp_path, f"--training.gc_freq={frequency}")
    try:
        run.run()
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert collected == [1] * (1 + 6 // frequency)


def test_the_share_of_draws_that_a_cap_shortens_is_logged(tmp_path, caplog):
    """`simple` draws n evenly from 0 to 2 t - 1, here 0 to 31: a cap of 7 shortens 24 of 32."""
    keys = ["--model.name=raven", "--model.flavor=debug-demo", "--recurrence.sampling_scheme=simple"]
    keys += ["--model.overrides.mean_recurrence=20", "--model.overrides.mean_backprop_depth=4"]
    small = [key for key in SMALL if "n_layers" not in key]
    arguments = [*small, *keys, "--recurrence.max_steps_no_grad=7", f"--job.dump_folder={tmp_path}"]
    with caplog.at_level(logging.INFO):
        Trainer(load(arguments, ALONE), ALONE)
    (share,) = re.findall(r"max_steps_no_grad = 7 cuts ([0-9.]+)% of the draws", caplog.text)
    assert float(share) == pytest.approx(75, abs=1.5)
