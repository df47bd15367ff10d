"""Ranks that share matrices compute what one rank computes alone."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.checkpoint.common import checkpointer
from tests.launch import launch, rows
from tests.ranks import run_on_ranks, stop_workers
from tests.shared_rows_run import Case, assert_alike, assert_recurrent_alike, make, merged, on, train, whole
from tests.small_run import GLOBAL_BATCH, batches_of
from tests.test_ancestor_configs import NEURAL
from tests.test_context_parallel import OTHERS
from tests.test_run_plan import plan as plan_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.loss import cross_entropy_sums
from torchtitan_rd.models import get_spec
from torchtitan_rd.optimizer import optimizer_state
from torchtitan_rd.parallelism.row_order import RowOrder, Run

SLOW = pytest.mark.slow
# Two key heads for four of queries, embedding and head in one; rows of documents with borders at no cut.
LLAMA = Case("llama3", overrides={"n_kv_heads": 2, "tie_word_embeddings": True}, document_mask=True)
RAVEN = Case("raven")


@pytest.fixture(autouse=True)
def other_processes_for_other_layouts(request):
    """DTensor remembers, for the life of a process, the groups of the first of several equal meshes."""
    if request.node.get_closest_marker("slow"):
        stop_workers()
    yield
    if request.node.get_closest_marker("slow"):
        stop_workers()


def test_a_llama_whose_ranks_share_matrices_trains_as_one_rank_does():
    alone = run_on_ranks(1, train, replace(LLAMA, sections=on(rows=GLOBAL_BATCH)))[0]
    for found in run_on_ranks(2, train, replace(LLAMA, sections=on(tensor=2, rows=GLOBAL_BATCH))):
        assert_alike(found, alone)


def test_a_raven_whose_ranks_share_matrices_draws_the_same_state_and_trains_and_reports_as_one_rank_does():
    sections = {"training": {"loss_chunk_tokens": 5, "z_loss_weight": 1e-3}}
    alone = run_on_ranks(1, train, merged(RAVEN, on(rows=GLOBAL_BATCH), sections))[0]
    ranks = run_on_ranks(2, train, merged(RAVEN, on(tensor=2, rows=GLOBAL_BATCH), sections))
    assert_recurrent_alike(ranks, alone)


LAYOUTS = {
    "2 of matrices x 2 of rows": (4, on(tensor=2, rows=4)),
    "4 of matrices": (4, on(tensor=4, rows=4)),
    "2 copies x 2 of matrices": (4, on(tensor=2, replicate=2, rows=4)),
    "2 of tokens x 2 of matrices": (4, on(2, tensor=2, rows=4)),
}
MODELS = {
    "llama": replace(LLAMA, overrides={"n_kv_heads": 4, "tie_word_embeddings": True}),
    "llama, untied": replace(LLAMA, overrides={"n_kv_heads": 4}),
    "raven": RAVEN,
    "raven, grouped": Case("raven", overrides={"n_kv_heads": 4, "n_heads": 8, "tie_word_embeddings": False}),
}


@SLOW
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_ten_steps_are_those_of_one_rank_on_any_layout(model, layout):
    ranks, sections = LAYOUTS[layout]
    case = replace(MODELS[model], steps=10)
    alone = run_on_ranks(1, train, replace(case, sections=on(rows=GLOBAL_BATCH)))[0]
    for found in run_on_ranks(ranks, train, replace(case, sections=sections), timeout=280):
        assert_alike(found, alone)


@SLOW
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("case", [LLAMA, RAVEN], ids=["llama", "raven"])
def test_with_every_other_technique_matrices_are_shared_without_a_trace(case, other):
    """Against one rank without the technique, but for those that change the labels or the objective."""
    changes = OTHERS[other]
    own_objective = {"goldfish labels", "goldfish by context", "z-loss"}
    alone = run_on_ranks(1, train, merged(case, on(rows=4), changes if other in own_objective else {}))[0]
    for found in run_on_ranks(2, train, merged(case, on(tensor=2, rows=4), changes), timeout=280):
        assert_alike(found, alone)


@SLOW
@pytest.mark.parametrize(
    "keys",
    [
        {"name": "ELLISAdam", "update_clipping": True, "tensor_wise_gradient_normalization": True},
        {"name": "Muon"},
        {"name": "AdamW", "implementation": "foreach"},
    ],
    ids=lambda keys: keys["name"],
)
def test_every_optimizer_takes_the_steps_of_one_rank(keys):
    sections = {"optimizer": {"lr": 1e-3, **keys}}
    alone = run_on_ranks(1, train, merged(RAVEN, on(rows=4), sections))[0]
    for found in run_on_ranks(4, train, merged(RAVEN, on(tensor=2, rows=4), sections), timeout=280):
        # Muon orthogonalizes in bfloat16, where another order of rows rounds otherwise.
        assert found["losses"] == pytest.approx(alone["losses"], abs=3e-5 if keys["name"] == "Muon" else 1e-5)


def save(rank, world_size, case, folder):
    """Trains a step and saves; the whole state, in the order of the model."""
    made = make(rank, world_size, case)
    batches = batches_of(1, made.dims.data_rank(rank), made.dims.data_degree, made.config, padded=False)
    made.step_function(1, batches)
    tensors = {"model": made.model.state_dict(), "optimizer": optimizer_state(made.model, made.optimizer)}
    checkpoints = checkpointer(folder, row_orders=made.orders)
    checkpoints.save(1, tensors, {"step": 1})
    checkpoints.close()
    return whole_state(tensors, made.orders)


def load(rank, world_size, case, folder):
    made = make(rank, world_size, merged(case, case.sections, {"training": {"seed": 1}}))
    tensors = {"model": made.model.state_dict(), "optimizer": optimizer_state(made.model, made.optimizer)}
    checkpoints = checkpointer(folder, row_orders=made.orders)
    checkpoints.load(tensors)
    checkpoints.close()
    return whole_state(tensors, made.orders)


def whole_state(tensors, orders):
    found = {}
    for group, members in tensors.items():
        for name, tensor in members.items():
            parameter = name if group == "model" else name.rpartition(".")[0]
            found[f"{group}.{name}"] = whole(tensor, orders.get(parameter) if tensor.ndim else None)
    return found


@pytest.mark.parametrize(
    ("savers", "loaders"),
    [
        ((2, on(tensor=2, rows=4)), (1, on(rows=4))),
        pytest.param((1, on(rows=4)), (4, on(tensor=2, rows=4)), marks=SLOW),
        pytest.param((4, on(tensor=2, rows=4)), (4, on(tensor=4, rows=4)), marks=SLOW),
        pytest.param((4, on(2, tensor=2, rows=4)), (2, on(rows=4)), marks=SLOW),
        pytest.param((4, on(tensor=2, replicate=2, rows=4)), (4, on(4, rows=4)), marks=SLOW),
    ],
)
def test_a_checkpoint_is_the_same_whatever_the_degrees(tmp_path, savers, loaders):
    ranks, sections = savers
    saved = run_on_ranks(ranks, save, replace(RAVEN, sections=sections), tmp_path, timeout=280)[0]
    ranks, sections = loaders
    loaded = run_on_ranks(ranks, load, replace(RAVEN, sections=sections), tmp_path, timeout=280)[0]
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name


def first_weights(rank, world_size, case):
    made = make(rank, world_size, case)
    return whole_state({"model": made.model.state_dict()}, made.orders)


@SLOW
def test_first_weights_are_those_of_one_rank_bit_for_bit():
    alone = run_on_ranks(1, first_weights, replace(RAVEN, sections=on(rows=4)))[0]
    for found in run_on_ranks(4, first_weights, replace(RAVEN, sections=on(tensor=2, rows=4))):
        assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())


def test_arranged_rows_give_each_rank_its_share_of_every_part():
    order = RowOrder(parts=(4, 2, 2), degree=2)
    rows = torch.arange(8)
    assert order.arrange(rows).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert torch.equal(order.restore(order.arrange(rows)), rows)
    assert order.runs(1, 6) == [Run(1, 1, 1), Run(2, 4, 1), Run(3, 6, 1), Run(4, 2, 2)]
    for start in range(9):
        for stop in range(start, 9):
            arranged = [original + i for _, original, n in order.runs(start, stop) for i in range(n)]
            assert arranged == order.arrange(rows)[start:stop].tolist()


@pytest.mark.parametrize("family", ["llama3", "raven"])
def test_every_parameter_of_a_shared_module_is_in_the_plan_and_no_other(family):
    spec = get_spec(family)
    with torch.device("meta"):
        model = spec.build(next(iter(spec.flavors.values())))
    plan = spec.tensor_plan(model)
    named = {plan.embedding, plan.head}
    for shared in plan.shared:
        linears = {f"{shared.name}.{linear}" for linear in (*shared.columns, shared.rows)}
        own = {f"{shared.name}.{name}" for name in shared.by_head}
        inside = {n for n, _ in model.named_parameters() if n.startswith(f"{shared.name}.")}
        assert inside == {f"{linear}.weight" for linear in linears} | own
        named |= linears
        for linear, parts in shared.columns.items():
            assert sum(parts) == model.get_parameter(f"{shared.name}.{linear}.weight").shape[0]
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 2}
    assert matrices - named <= {"transformer.recurrence.iteration.adapter"}


@pytest.mark.parametrize(
    ("arguments", "ranks", "says"),
    [
        (["--model.flavor=8B"], 3, "3 does not divide 32 query heads, 8 key heads"),
        (["--model.flavor=8B", "--training.seq_len=2044"], 8, "8 does not divide 2044 tokens of a sequence"),
        (["--model.flavor=8B"], 16, "16 does not divide 8 key heads: use one of 1, 2, 4, 8"),
        (["--model.flavor=8B", "--model.vocab_size=258"], 4, "4 does not divide 258 rows of the vocabulary"),
        (["--model.name=raven", "--model.flavor=nebel-raven-3.5b"], 2, "2 does not divide 55 query heads"),
    ],
)
def test_a_degree_that_does_not_divide_the_model_is_one_line_that_names_those_that_work(
    arguments, ranks, says
):
    degree = f"--parallelism.tensor_parallel_degree={ranks}"
    with pytest.raises(ConfigError) as error:
        plan_of(degree, "--training.dataset=synthetic", *arguments, ranks=ranks)
    message = str(error.value)
    assert says in message and "use one of 1" in message and "\n" not in message


def test_the_rows_of_the_neural_pile_recipe_are_arranged_for_no_model_but_those_with_fused_matrices():
    shared = ("--training.dataset=synthetic", "--parallelism.tensor_parallel_degree=2")
    assert plan_of(*shared, "--model.flavor=8B", ranks=2).row_orders == {}
    orders = plan_of(*shared, "--model.name=raven", "--model.flavor=debug-demo", ranks=2).row_orders
    assert orders["transformer.recurrence.iteration.core_block.0.attn.Wqkv.weight"].parts == (128,) * 3


def sums(rank, world_size, pieces, labels, weights):
    """Losses and gradients of logits whose ids are on all ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    own = pieces.chunk(world_size, -1)[rank].clone().requires_grad_()
    logits = DTensor.from_local(own, mesh, [Shard(2)], run_check=False)
    result = cross_entropy_sums(logits, labels, 1e-2, weights)
    result.objective.backward()
    return result.objective.item(), result.cross_entropy.item(), own.grad


def test_the_loss_of_shared_logits_is_that_of_whole_ones_also_where_they_are_large():
    generator = torch.Generator().manual_seed(0)
    logits = 200 * torch.randn(2, 5, 12, generator=generator)
    labels = torch.randint(12, (2, 5), generator=generator)
    labels[0, 1] = -100
    weights = torch.rand(12, generator=generator)

    leaf = logits.clone().requires_grad_()
    expected = cross_entropy_sums(leaf, labels, 1e-2, weights)
    expected.objective.backward()
    found = run_on_ranks(2, sums, logits, labels, weights)
    for objective, cross_entropy, _ in found:
        assert objective == pytest.approx(expected.objective.item(), rel=1e-6)
        assert cross_entropy == pytest.approx(expected.cross_entropy.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in found], -1), leaf.grad)


SHRUNK = """
[model.overrides]
dim = 32
n_layers = 2
ffn_dim = 64
n_heads = 4
n_kv_heads = 2
"""
SMALL = {
    "training.seq_len": 32,
    "training.mixed_precision_param": "float32",
    "training.local_batch_size": 4,
    "training.global_batch_size": 4,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": 1,
    "metrics.log_freq": 1,
    "comm.heartbeat_seconds": 0,
    "checkpoint.keep_latest_k": 0,
    "compile.backend": "aot_eager",
    "optimizer.lr": 1e-3,
    "lr_scheduler.warmup_steps": 2,
}


@SLOW
def test_a_toml_of_gpt_neuro_loads_as_written_and_shrunk_trains_on_two_ranks_and_goes_on_on_one(tmp_path):
    text = NEURAL.format(name="synthetic", dataset="synthetic", lr=3e-5, warmup=2000, steps=6, save=3, log=1)
    for key, value in {
        "tensor_parallel_degree = 1": "tensor_parallel_degree = 8\nenable_loss_parallel = true",
        "compile = false": "compile = true",
        "shard_degree = -1": "shard_degree = 32",
        "replicate_degree = 1": "replicate_degree = 2",
    }.items():
        assert key in text
        text = text.replace(key, value)
    path = tmp_path / "x.toml"
    path.write_text(text)
    written = plan_of("--job.config_file", str(path), ranks=512)
    assert (written.dims.replicate, written.dims.shard, written.dims.tensor) == (2, 32, 8)

    path.write_text(text + SHRUNK)

    def losses(name, ranks, *arguments):
        keys = {**SMALL, "job.dump_folder": tmp_path / name, "parallelism.tensor_parallel_degree": ranks}
        small = [f"--{key}={value}" for key, value in keys.items()]
        finished = launch(ranks, ["--job.config_file", str(path), *small, *arguments], timeout=400)
        assert finished.codes == [0] * ranks, finished.errors[0][-2000:]
        return {row["step"]: row["loss"] for row in rows(tmp_path / name)}

    alone = losses("alone", 1)
    assert len(alone) == 6
    assert losses("shared", 2) == pytest.approx(alone, abs=1e-5)
    # From the checkpoint in its middle, on one rank: rows 4 to 6 are new ones.
    again = losses("shared", 1, "--checkpoint.load_step=3")
    assert again == pytest.approx(alone, abs=1e-5)
