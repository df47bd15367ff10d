"""A raven in bfloat16 through the step that a user runs: what computes in which type,
on any number of ranks.
"""

from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.checkpoint.common import checkpointer, digest
from tests.ranks import run_on_ranks
from tests.small_run import SEQ_LEN, VOCAB, Setup, all_equal, batches_of, config_of
from torchtitan_rd.build_model import build_model
from torchtitan_rd.checkpoint.manifest import verify
from torchtitan_rd.data import BatchDims
from torchtitan_rd.draws import Draws
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import build_optimizer, optimizer_state
from torchtitan_rd.parallelism import GradientExchange, ParallelDims, allocate
from torchtitan_rd.train_step import TrainStep

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
SHAPE = {"dim": 32, "n_heads": 2, "ffn_dim": 48, "n_layers_prelude": 1, "n_layers_coda": 1}
STEPS = 4


def sections(precision: str = "bfloat16", **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    training = {"mixed_precision_param": precision, **others.pop("training", {})}
    return {"optimizer": {"lr": 1e-3}, "training": training, **others}


def build(setup: Setup, world_size: int) -> tuple:
    config = config_of(setup, world_size)
    spec = get_spec("raven")
    shape = replace(get_flavor(spec, "debug-demo", {**SHAPE, **setup.overrides}), vocab_size=VOCAB)
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh("cpu")
    return config, spec, shape, build_model(config, spec, shape, mesh, CPU)


def train(rank: int, world_size: int, setup: Setup) -> dict[str, Any]:
    """Runs `setup`; returns losses, norms, the last step's whole gradients, and the types that were seen."""
    torch._dynamo.reset()
    config, spec, shape, model = build(setup, world_size)
    optimizer = build_optimizer(model, config.optimizer)
    draws = Draws(
        spec,
        shape,
        config.recurrence,
        BatchDims.resolve(config.training, rank, world_size),
        seed=0,
        total_steps=setup.steps,
        seq_len=SEQ_LEN,
        device=CPU,
        dtype=getattr(torch, config.training.mixed_precision_param),
    )
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh("cpu")
    exchange = GradientExchange(model, config.parallelism, config.training, mesh)
    options = {"forward_inputs": draws.training, "exchange": exchange}
    step_function = TrainStep(model, optimizer, config.training, CPU, **options)
    types = types_in(model) if not config.compile.enable else {}
    results = [
        step_function(step, batches_of(step, rank, world_size, config, padded=True))
        for step in range(1, setup.steps + 1)
    ]
    parameters = dict(model.named_parameters())
    whole = {name: p for name, p in parameters.items() if not isinstance(p, DTensor)}
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "gradients": {name: full(p.grad) for name, p in parameters.items() if p.grad is not None},
        "types": dict(types),
        "whole": sorted(whole),
        "stored": {p.dtype for p in parameters.values()},
        "alike": all_equal([p.detach().numpy().tobytes() for p in whole.values()]),
        "state": {key: type(t).__name__ for key, t in optimizer_state(model, optimizer).items()},
    }


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def types_in(model: torch.nn.Module) -> defaultdict[str, set]:
    """Fills up with the types of what norms, matrices, blocks, iterations and attention take and give."""
    seen: defaultdict[str, set] = defaultdict(set)

    def look(kind: str):
        def hook(module, inputs, output):
            if kind in ("norm", "matmul"):
                seen[f"{kind} weight"].add(module.weight.dtype)
            # The loop gives a state a read-out, and a head the loss that is fused with it.
            for tensor in output if isinstance(output, list | tuple) else [output]:
                seen[f"{kind} output"].add(tensor.dtype)

        return hook

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        for kind, names in KINDS.items():
            if last.startswith(names):
                module.register_forward_hook(look(kind))
    return seen


KINDS = {
    "norm": ("norm_", "ln_f"),
    "matmul": ("Wqkv", "proj", "fc", "adapter"),
    "state": ("iteration", "recurrence"),
    "embedding": ("wte",),
    "head": ("lm_head",),
}
WHOLE = {"norm_1.weight", "norm_2.weight", "norm_3.weight", "norm_4.weight", "ln_f.weight", "attn.qk_bias"}
HSDP = {"parallelism": {"data_parallel_replicate_degree": 2}}
VARIANTS = {
    "one rank": (1, {}),
    "two ranks": (2, {}),
    "two shards, two replicas": (4, HSDP),
    "accumulation": (2, {"training": {"local_batch_size": 1}}),
    "checkpointed iterations": (2, {"activation_checkpoint": {"mode": "full"}}),
    "compiled and checkpointed": (
        2,
        {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "full"}},
    ),
    "ELLISAdam": (2, {"optimizer": {"name": "ELLISAdam", "lr": 1e-3, "update_clipping": True}}),
    "Muon": (2, {"optimizer": {"name": "Muon", "lr": 1e-3}}),
    "float32 sums over the iterations": (2, {"recurrence": {"core_grad_dtype": "float32"}}),
}


@pytest.fixture(scope="module")
def exact():
    """By optimizer: one rank in float32."""
    found = {}

    def of(keys: dict) -> dict:
        optimizer = {"optimizer": keys["optimizer"]} if "optimizer" in keys else {}
        name = optimizer.get("optimizer", {}).get("name")
        if name not in found:
            found[name] = run_on_ranks(
                1, train, Setup(sections=sections("float32", **optimizer), steps=STEPS)
            )[0]
        return found[name]

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_raven_in_bfloat16_trains_as_in_float32_with_norms_and_state_in_float32(variant, exact):
    world_size, keys = VARIANTS[variant]
    expected = exact(keys)
    for result in run_on_ranks(world_size, train, Setup(sections=sections(**keys), steps=STEPS)):
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-3)
        assert result["losses"] != expected["losses"]
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.02)
        assert result["alike"] and result["stored"] == {FP32}
        assert {".".join(name.split(".")[-2:]) for name in result["whole"]} == WHOLE
        for name, gradient in expected["gradients"].items():
            error = (result["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 0.06, f"{name}: {error}"
        if "compile" not in keys:
            assert result["types"] == {
                "norm weight": {FP32},
                "norm output": {FP32},
                "state output": {FP32},
                "matmul weight": {BF16},
                "matmul output": {BF16},
                "embedding output": {FP32},
                "head output": {BF16},
            }


def test_the_gradient_norm_is_that_of_sharded_and_whole_gradients_together():
    for world_size in (1, 2):
        setup = Setup(sections=sections(training={"max_norm": 1e6}), steps=1)
        for result in run_on_ranks(world_size, train, setup):
            squares = [gradient.square().sum() for gradient in result["gradients"].values()]
            assert result["norms"][0] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


def test_clipping_scales_whole_gradients_as_it_does_sharded_ones():
    free, clipped = (
        run_on_ranks(2, train, Setup(sections=sections(training={"max_norm": limit}), steps=1))[1]
        for limit in (1e6, 0.01)
    )
    assert clipped["norms"] == free["norms"]
    for name, gradient in free["gradients"].items():
        torch.testing.assert_close(
            clipped["gradients"][name], gradient * 0.01 / free["norms"][0], atol=0, rtol=1e-4
        )


def test_a_state_of_the_type_of_the_parameters_is_bfloat16_throughout():
    setup = Setup(sections=sections(recurrence={"state_dtype": "as_param"}), steps=1)
    types = run_on_ranks(1, train, setup)[0]["types"]
    assert types["state output"] == types["norm output"] == types["matmul output"] == {BF16}
    assert types["norm weight"] == {FP32}


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_is_looked_up_in_float32_and_the_head_multiplies_in_bfloat16(tied):
    setup = Setup(sections=sections(), overrides={"tie_word_embeddings": tied}, steps=1)
    for result in run_on_ranks(2, train, setup):
        assert (result["types"]["embedding output"], result["types"]["head output"]) == ({FP32}, {BF16})


def test_without_injection_the_state_starts_at_a_float32_embedding():
    setup = Setup(sections=sections(), overrides={"injection": "none"}, steps=1)
    assert run_on_ranks(1, train, setup)[0]["types"]["state output"] == {FP32}


def test_in_float32_everything_is_sharded_and_the_state_key_changes_no_bit():
    float32, as_param = (
        run_on_ranks(2, train, Setup(sections=sections("float32", recurrence={"state_dtype": dtype})))[0]
        for dtype in ("float32", "as_param")
    )
    assert float32["whole"] == []
    assert float32["losses"] == as_param["losses"] and float32["norms"] == as_param["norms"]


@pytest.mark.parametrize("reshard", ["default", "never"])
def test_the_key_for_the_core_gradient_changes_that_of_the_cores_matrices_and_no_other(reshard):
    """Over several microbatches: FSDP uses its gathered parameters again."""
    found = {}
    for dtype in ("as_param", "float32"):
        keys = {
            "recurrence": {"core_grad_dtype": dtype},
            "training": {"local_batch_size": 2, "max_norm": 1e6},
        }
        parallelism = {"fsdp_reshard_after_forward": reshard}
        setup = Setup(
            sections=sections(**keys, parallelism=parallelism), overrides={"mean_backprop_depth": 8}, steps=1
        )
        found[dtype] = run_on_ranks(2, train, setup)[0]
    assert found["float32"]["losses"] == found["as_param"]["losses"]
    for name, gradient in found["float32"]["gradients"].items():
        summed = "recurrence" in name and gradient.ndim == 2
        assert torch.equal(gradient, found["as_param"]["gradients"][name]) is not summed, name


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_of_sharded_norms_loads_into_whole_ones_and_back(
    saved_by, loaded_by, world_size, tmp_path
):
    digests = run_on_ranks(2, save, tmp_path, saved_by)
    assert run_on_ranks(world_size, load, tmp_path, loaded_by) == digests[:world_size]
    assert verify(tmp_path / "checkpoint" / "step-1") == []


def save(rank: int, world_size: int, dump: Path, precision: str) -> str:
    """One step of training, saved: -> digest of all tensors."""
    tensors = tensors_after(1, rank, world_size, precision)
    with closing(checkpointer(dump)) as checkpoints:
        checkpoints.save(1, tensors, {"step": 1})
    return digest(tensors)


def load(rank: int, world_size: int, dump: Path, precision: str) -> str:
    tensors = tensors_after(0, rank, world_size, precision)
    with closing(checkpointer(dump)) as checkpoints:
        assert checkpoints.load(tensors) == {"step": 1}
    return digest(tensors)


def tensors_after(
    steps: int, rank: int, world_size: int, precision: str
) -> dict[str, dict[str, torch.Tensor]]:
    config, *_, model = build(Setup(sections=sections(precision)), world_size)
    optimizer = build_optimizer(model, config.optimizer)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        optimizer.step()
    return {"model": dict(model.state_dict()), "optimizer": optimizer_state(model, optimizer)}


def test_states_of_whole_parameters_are_whole():
    result = run_on_ranks(2, train, Setup(sections=sections(), steps=1))[0]
    for key, kind in result["state"].items():
        whole = key.endswith(".step") or key.rpartition(".")[0] in result["whole"]
        assert (kind == "DTensor") is not whole, key


def test_no_group_of_the_optimizer_mixes_whole_and_sharded_parameters():
    """torch's kernels for many tensors take one sort."""
    sorts = run_on_ranks(2, sorts_of_groups)[0]
    assert all(len(found) == 1 for found in sorts) and set().union(*sorts) == {True, False}


def sorts_of_groups(rank: int, world_size: int) -> list[set[bool]]:
    config, *_, model = build(Setup(sections=sections()), world_size)
    groups = build_optimizer(model, config.optimizer).param_groups
    return [{isinstance(parameter, DTensor) for parameter in group["params"]} for group in groups]


def test_under_offload_only_what_is_sharded_stands_in_host_memory():
    assert run_on_ranks(2, places) == [({"cpu"}, {"meta"})] * 2


def places(rank: int, world_size: int) -> tuple[set[str], set[str]]:
    """Of shards and of whole parameters; the meta device stands for a GPU."""
    _, _, _, model = build(Setup(sections=sections()), world_size)
    model.to_empty(device="meta")
    allocate(model, torch.device("meta"), offload=True)
    found = {True: set(), False: set()}
    for parameter in model.parameters():
        found[isinstance(parameter, DTensor)].add(parameter.device.type)
    return found[True], found[False]
