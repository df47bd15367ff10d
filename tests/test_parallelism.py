"""Sharding, activation checkpointing and compile change where and when things are computed, never what."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import some_tokens, tiny_llama
from tests.ranks import DEVICES, EACH_DEVICE, needs_gpus, run_on_ranks
from tests.small_run import GLOBAL_BATCH, Setup, train
from torchtitan_rd.config import load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.model_spec import AttentionShape
from torchtitan_rd.models import get_spec
from torchtitan_rd.parallelism import (
    ActivationCheckpointConfig,
    ParallelDims,
    ParallelismConfig,
    fsdp,
    groups_of,
    sharding_mesh,
)
from torchtitan_rd.parallelism.activation_checkpoint import _ATTENTION_OPS, apply_activation_checkpointing
from torchtitan_rd.parallelism.init import parameter_seed

CHECKPOINTING = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "every second block": {"mode": "selective", "selective_ac_option": "2"},
    "by op": {"mode": "selective", "selective_ac_option": "op"},
}


@pytest.fixture(scope="module")
def plain():
    """One rank, no activation checkpointing: what every other setup must reproduce."""
    return run_on_ranks(1, train, Setup())[0]


def like(numbers: list[float], device: str, on_cpu: float):
    """The numbers of the CPU, as they must be on `device`: to `on_cpu` there;
    a GPU's kernels sum in another order.
    """
    return pytest.approx(numbers, abs=on_cpu) if device == "cpu" else pytest.approx(numbers, rel=1e-3)


@EACH_DEVICE
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_activation_checkpointing_changes_neither_losses_nor_keys(mode, device, world_size, plain):
    setup = Setup(sections={"activation_checkpoint": CHECKPOINTING[mode]}, device=device)
    for result in run_on_ranks(world_size, train, setup, device=device):
        assert result["losses"] == like(plain["losses"], device, 1e-6)
        assert result["norms"] == like(plain["norms"], device, 1e-5)
        assert result["keys"] == plain["keys"] == result["names"]
        assert result["places"] == {device}
        if (device, world_size) == ("cpu", 1):
            assert result["after"] == plain["after"], "recomputation must be exact"


def test_initial_weights_do_not_depend_on_the_number_of_ranks(plain):
    for world_size in (2, 4):
        assert {result["before"] for result in run_on_ranks(world_size, train, Setup())} == {plain["before"]}


def test_another_seed_gives_other_weights(plain):
    other = run_on_ranks(1, train, Setup(sections={"training": {"seed": 1}}))[0]
    assert other["before"] != plain["before"]
    assert parameter_seed(0, "a") != parameter_seed(0, "b")


@pytest.mark.parametrize("device", DEVICES)
def test_hsdp_on_two_by_two_ranks_trains_as_one_rank_does(device, plain):
    """On as many GPUs as there are: two copies, each on half of them."""
    needs_gpus(2 if device == "cuda" else 0)
    world_size = 4 if device == "cpu" else min(torch.cuda.device_count() // 2 * 2, GLOBAL_BATCH)
    setup = Setup(sections={"parallelism": {"data_parallel_replicate_degree": 2}}, device=device)
    for result in run_on_ranks(world_size, train, setup, device=device):
        assert result["losses"] == like(plain["losses"], device, 1e-5)
        for name, gradient in plain["gradients"].items():
            atol, rtol = (1e-6, 1e-4) if device == "cpu" else (1e-4, 1e-2)
            torch.testing.assert_close(result["gradients"][name], gradient, atol=atol, rtol=rtol)


@pytest.mark.parametrize("shard", [1, 2])
def test_copies_of_the_model_exchange_gradients_once_a_step_however_many_microbatches(shard, plain):
    """Two copies of 1 or 2 ranks each: the numbers of one rank's single microbatch,
    and the all-reduces of it.
    """
    counts = []
    for local_batch_size in (4 // shard, 1):
        sections = {
            "parallelism": {"data_parallel_replicate_degree": 2},
            "training": {"local_batch_size": local_batch_size},
        }
        for result in run_on_ranks(2 * shard, counted, Setup(sections=sections)):
            assert result["losses"] == pytest.approx(plain["losses"], abs=1e-5)
            for name, gradient in plain["gradients"].items():
                torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
        counts.append(result["all-reduces"])
    assert counts[0] == counts[1] > 0


def counted(rank, world_size, setup):
    """`train`, and how often the copies exchanged gradients."""
    seen = []
    real = dist.all_reduce

    def all_reduce(tensor, *arguments, group=None, **options):
        seen.append(group is not None)  # FSDP's; the step's own sums are over all ranks
        return real(tensor, *arguments, group=group, **options)

    dist.all_reduce = all_reduce
    try:
        return train(rank, world_size, setup) | {"all-reduces": sum(seen)}
    finally:
        dist.all_reduce = real


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["always", "never"])
def test_resharding_policy_changes_nothing_but_memory(policy, device, plain):
    setup = Setup(sections={"parallelism": {"fsdp_reshard_after_forward": policy}}, device=device)
    for result in run_on_ranks(2, train, setup, device=device):
        assert result["losses"] == like(plain["losses"], device, 1e-6)


def test_a_tied_head_stays_tied_and_trains_alike_on_one_and_two_ranks():
    setup = Setup(overrides={"tie_word_embeddings": True})
    one = run_on_ranks(1, train, setup)[0]
    assert "output.weight" in one["keys"] and "output.weight" not in one["names"]
    for two in run_on_ranks(2, train, setup):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
        torch.testing.assert_close(
            two["gradients"]["tok_embeddings.weight"],
            one["gradients"]["tok_embeddings.weight"],
            atol=1e-6,
            rtol=1e-4,
        )


@EACH_DEVICE
def test_bfloat16_compute_keeps_float32_parameters_and_stays_close(device, world_size, plain):
    for result in run_on_ranks(world_size, train, Setup(device=device, dtype="bfloat16"), device=device):
        assert all(gradient.dtype == torch.float32 for gradient in result["gradients"].values())
        assert result["losses"] == pytest.approx(plain["losses"], rel=0.02)
        assert result["losses"] != plain["losses"]


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_gradients_are_summed_over_the_ranks_in_the_type_of_the_key(reduce):
    """A sum in bfloat16 is a number of bfloat16, whatever it is stored in."""
    training = {"mixed_precision_reduce": reduce, "max_norm": 1e6}
    for result in run_on_ranks(2, train, Setup(sections={"training": training}, steps=1)):
        rounded = [torch.equal(g, g.bfloat16().float()) for g in result["gradients"].values()]
        assert all(rounded) if reduce == "bfloat16" else not any(rounded)


@pytest.mark.parametrize("offload", [False, True])
def test_the_key_for_offload_reaches_every_unit(offload, monkeypatch):
    """What FSDP is asked for: it offloads from a GPU alone."""
    asked = []
    monkeypatch.setattr(
        fsdp, "fully_shard", lambda modules, **options: asked.append(options["offload_policy"])
    )
    model = tiny_llama()
    plan = get_spec("llama3").wrap_plan(model)
    fsdp.apply_fsdp(model, plan, None, fsdp.ShardingKeys(enable_cpu_offload=offload), "default")
    assert len(asked) == len(model.layers) + 3  # embedding, norm with head, root
    assert {isinstance(policy, CPUOffloadPolicy) for policy in asked} == {offload}


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("optimizer", [{}, {"name": "Muon"}, {"name": "ELLISAdam", "update_clipping": True}])
def test_a_model_in_host_memory_trains_on_the_gpu_as_any_other(optimizer, world_size):
    sections = {"optimizer": {"lr": 1e-2, **optimizer}}
    plain = run_on_ranks(1, train, Setup(sections=sections))[0]
    setup = Setup(sections={**sections, "training": {"enable_cpu_offload": True}}, device="cuda")
    for result in run_on_ranks(world_size, train, setup, device="cuda"):
        assert result["places"] == {"cpu"}
        assert result["losses"] == like(plain["losses"], "cuda", 0)
        assert result["norms"] == like(plain["norms"], "cuda", 0)


class CountForwards(TorchDispatchMode):
    """Attention and matrix products, those of backward's recomputation included."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts["attention"] += name == "_scaled_dot_product_flash_attention_for_cpu"
        self.counts["matmul"] += name == "mm"
        return function(*args, **(kwargs or {}))


# Each of 2 layers has 7 matrices; backward has 2 products for each of those and of the head.
PLAIN = (1 + 2) * (2 * 7 + 1)


@pytest.mark.parametrize(
    ("mode", "attention", "matmuls"),
    # The last product of a block is never recomputed: nothing in backward needs what it gives.
    [
        ("none", 2, PLAIN),
        ("full", 4, PLAIN + 2 * 6),
        ("by op", 2, PLAIN + 2 * 3),
        ("every second block", 3, PLAIN + 6),
    ],
)
def test_what_is_recomputed_in_backward_follows_the_mode(mode, attention, matmuls):
    model, tokens = tiny_llama(), some_tokens()
    apply_activation_checkpointing(list(model.layers), ActivationCheckpointConfig(**CHECKPOINTING[mode]))
    with CountForwards() as watch:
        model(tokens).square().mean().backward()
    assert (watch.counts["attention"], watch.counts["matmul"]) == (attention, matmuls)


def test_every_fused_attention_of_torch_is_kept_by_op():
    """Those of GPUs too, which a CPU cannot run."""
    names = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    fused = {
        name
        for name in names
        if name.startswith("_scaled_dot_product")
        and not name.endswith("_backward")
        # Neither is one kernel of CUDA or CPU.
        and not any(kind in name for kind in ("_math", "overrideable"))
    }
    assert len(fused) == 4
    assert {getattr(torch.ops.aten, name).default for name in fused} <= _ATTENTION_OPS


@EACH_DEVICE
@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_under_clean_names(device, world_size, plain):
    """By inductor: C++ on the CPU, Triton on a GPU."""
    compile = {"enable": True, "fail_on_recompile": True}
    setup = Setup(sections={"compile": compile, "activation_checkpoint": {"mode": "full"}}, device=device)
    for result in run_on_ranks(world_size, train, setup, device=device, timeout=280):
        assert result["losses"] == like(plain["losses"], device, 1e-5)
        assert result["keys"] == plain["keys"] == result["names"]


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "expected"),
    [
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (2, 4, 8, (2, 4)),
        (1, 1, 1, (1, 1)),
        (-1, 4, 8, (2, 4)),
        (-1, 8, 8, (1, 8)),
    ],
)
def test_minus_one_fills_the_ranks(replicate, shard, world_size, expected):
    config = ParallelismConfig(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    dims = ParallelDims.resolve(config, world_size)
    assert (dims.replicate, dims.shard) == expected and dims.data_degree == world_size


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size"),
    [(3, -1, 8), (1, 3, 2), (2, 2, 2), (1, 0, 2), (4, -1, 2), (-1, -1, 8), (-1, 3, 8), (-1, 16, 8)],
)
def test_degrees_that_do_not_multiply_to_the_ranks_are_refused_by_name(replicate, shard, world_size):
    config = ParallelismConfig(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    with pytest.raises(ConfigError, match="data_parallel_shard_degree"):
        ParallelDims.resolve(config, world_size)


def test_a_replicate_degree_of_0_is_refused_by_its_own_name():
    with pytest.raises(ConfigError, match="data_parallel_replicate_degree = 0: use -1"):
        ParallelDims.resolve(ParallelismConfig(data_parallel_replicate_degree=0), 2)


@pytest.mark.parametrize(("ranks", "replicas"), [(4096, 512), (2048, 256)])
def test_the_3_5b_recipe_shards_inside_two_nodes_for_any_number_of_nodes(ranks, replicas):
    path = "train_configs/raven_3.5b_4k.toml"
    environment = Environment(rank=0, local_rank=0, world_size=ranks, local_world_size=4, log_level="WARNING")
    config = load([f"--job.config_file={Path(__file__).parent.parent / path}"], environment).config
    dims = ParallelDims.resolve(config.parallelism, ranks)
    assert (dims.replicate, dims.shard, dims.data_degree) == (replicas, 8, ranks)


def dims_of(world_size: int, **degrees: int) -> ParallelDims:
    return ParallelDims.resolve(ParallelismConfig(**degrees), world_size)


def test_neighbouring_ranks_share_their_rows_and_all_others_read_their_own():
    dims = ParallelDims(replicate=2, shard=2, context=2, tensor=2)
    assert (dims.world_size, dims.data_degree, dims.ranks_per_row) == (16, 4, 4)
    assert [dims.data_rank(rank) for rank in range(16)] == [rank // 4 for rank in range(16)]
    assert dims.one_per_row(range(16)) == range(0, 16, 4)


@pytest.mark.parametrize(
    ("degrees", "world_size", "says"),
    [
        ({"data_parallel_shard_degree": 2, "context_parallel_degree": 2}, 2, "context_parallel_degree (2)"),
        ({"context_parallel_degree": 4}, 2, "context_parallel_degree (4) is 4, but 2 ranks were started"),
        ({"context_parallel_degree": 3}, 8, "context_parallel_degree (3) is 6, but 8 ranks were started"),
        ({"tensor_parallel_degree": 3}, 8, "tensor_parallel_degree (3) is 6, but 8 ranks were started"),
    ],
)
def test_a_degree_that_does_not_fit_the_ranks_is_refused_in_one_line(degrees, world_size, says):
    with pytest.raises(ConfigError) as error:
        dims_of(world_size, **degrees)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_sequence_or_heads_that_ranks_cannot_share_name_the_degrees_that_work():
    huginn = AttentionShape(n_heads=55, n_kv_heads=55, head_dim=96)
    ParallelDims(1, 1, context=5).check(huginn, 40)
    with pytest.raises(
        ConfigError, match=r"= 2 does not divide the 55 attention heads .*: use one of 1, 5, 11, 55$"
    ):
        ParallelDims(1, 1, context=2).check(huginn, 40)
    # One key head for all: each rank takes a copy.
    ParallelDims(1, 1, context=4).check(AttentionShape(8, 1, 8), 12)
    with pytest.raises(ConfigError, match=r"= 8 does not divide training\.seq_len = 12"):
        ParallelDims(1, 1, context=8).check(AttentionShape(8, 8, 8), 12)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (ParallelDims(2, 2), (32, 8)),
        (ParallelDims(1, 1, context=4), (8, 2)),
        (ParallelDims(1, 1, context=16), (2, 1)),  # each key head on two ranks
        (ParallelDims(1, 1, context=4, tensor=4), (2, 1)),
    ],
)
def test_the_kernel_is_probed_with_the_heads_that_a_rank_gives_it(dims, expected):
    assert dims.heads_in_kernel(AttentionShape(32, 8, 128)) == (*expected, 128)


def test_with_both_degrees_each_tensor_parallel_ranks_heads_are_shared():
    ParallelDims(1, 1, context=4, tensor=2).check(AttentionShape(8, 8, 8), 16)
    with pytest.raises(ConfigError, match=r"= 8 does not divide the 4 .* each tensor-parallel rank: use one"):
        ParallelDims(1, 1, context=8, tensor=2).check(AttentionShape(8, 8, 8), 16)


def test_the_mesh_has_a_dimension_for_each_degree_and_shards_over_tokens_too():
    dist.init_process_group("fake", store=FakeStore(), rank=13, world_size=16)
    mesh = ParallelDims(2, 2, context=2, tensor=2).build_mesh("cpu")
    assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard", "context", "tensor")
    assert mesh.get_coordinate() == (1, 1, 0, 1)
    sharding = sharding_mesh(mesh)
    assert (sharding.mesh_dim_names, tuple(sharding.shape)) == (("dp_replicate", "dp_shard_context"), (2, 4))
    assert sharding.mesh.tolist() == [[1, 3, 5, 7], [9, 11, 13, 15]] and sharding == sharding_mesh(mesh)
    sizes = {name: dist.get_world_size(group) for name, group in groups_of(mesh).items()}
    assert sizes == {"dp_replicate": 2, "dp_shard": 2, "context": 2, "tensor": 2, "dp_shard_context": 4}


@pytest.mark.parametrize(("dims", "names"), [((1, 4), ["dp_shard"]), ((2, 2), ["dp_replicate", "dp_shard"])])
def test_a_degree_of_1_has_no_group(dims, names):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = ParallelDims(*dims).build_mesh("cpu")
    assert list(groups_of(mesh)) == names and list(sharding_mesh(mesh).mesh_dim_names) == names
