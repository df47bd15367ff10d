"""A tiny Llama or raven on ranks that share rows: the body of the tests of context and tensor parallelism.

The batches are those of tests/small_run.py, the same for any number of ranks; each data rank has its share.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tests.small_run import GLOBAL_BATCH, SEQ_LEN, VOCAB, Setup, batches_of, config_of
from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import Batch, BatchDims
from torchtitan_rd.draws import Draws
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import ParallelDims, row_orders, sum_over_tokens
from torchtitan_rd.parallelism.row_order import RowOrder
from torchtitan_rd.train_step import TrainStep
from torchtitan_rd.validation import validate

CPU = torch.device("cpu")
FLAVORS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("debug", {"dim": 32, "n_layers": 2, "ffn_dim": 48, "n_heads": 4}),
    "raven": (
        "debug-demo",
        {"dim": 32, "n_heads": 4, "ffn_dim": 48, "n_layers_prelude": 1, "n_layers_coda": 1},
    ),
}


@dataclass(frozen=True)
class Case:
    """sections: as {section: {key: value}}. document_mask: rows of three documents, each for itself.
    watch: a context around the steps; what it gives is in the result.
    """

    family: str = "llama3"
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    document_mask: bool = False
    watch: Any = nullcontext


class Made(NamedTuple):
    """orders: of the model's arranged rows."""

    config: JobConfig
    dims: ParallelDims
    mesh: DeviceMesh
    model: nn.Module
    optimizer: Optimizer
    step_function: TrainStep
    draws: Draws
    orders: dict[str, RowOrder]


def make(rank: int, world_size: int, case: Case) -> Made:
    sections = {"training": {"local_batch_size": 1}, "optimizer": {"lr": 1e-3}, **case.sections}
    config = config_of(Setup(sections=sections), 1)
    dims = ParallelDims.resolve(config.parallelism, world_size)

    flavor, sizes = FLAVORS[case.family]
    spec = get_spec(case.family)
    shape = replace(get_flavor(spec, flavor, {**sizes, **case.overrides}), vocab_size=VOCAB)
    mesh = dims.build_mesh("cpu")
    model = build_model(config, spec, shape, mesh, CPU)
    draws = Draws(
        spec,
        shape,
        config.recurrence,
        BatchDims.resolve(config.training, dims.data_rank(rank), dims.data_degree),
        seed=0,
        total_steps=case.steps,
        seq_len=SEQ_LEN,
        device=CPU,
        dtype=torch.float32,
        positions=dims.state_positions(rank, SEQ_LEN),
    )
    optimizer = build_optimizer(model, config.optimizer)
    step_function = TrainStep(
        model,
        optimizer,
        config.training,
        CPU,
        forward_inputs=draws.training,
        positions=dims.positions(rank, SEQ_LEN),
        counts=dims.counts(rank),
    )
    orders = row_orders(spec.tensor_plan(model), dims.tensor)
    return Made(config, dims, mesh, model, optimizer, step_function, draws, orders)


def train(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Losses, norms, whole gradients of the first and the last step, telemetry, a validation,
    and a part of the first state.
    """
    torch._dynamo.reset()
    config, dims, mesh, model, _, step_function, draws, orders = make(rank, world_size, case)
    data_rank, positions = dims.data_rank(rank), dims.positions(rank, SEQ_LEN)

    results, gradients, telemetry = [], [], {}
    with case.watch() as watch:
        for step in range(1, case.steps + 1):
            batches = batches_of(step, data_rank, dims.data_degree, config, padded=False)
            batches = [with_prompts(batch) for batch in batches]
            if case.document_mask:
                batches = [with_documents(batch) for batch in batches]
            with draws.watch(model, watching=data_rank == 0 and step == case.steps) as seen:
                results.append(step_function(step, batches))
            telemetry = draws.describe(seen, results[-1].depths, sum_over_tokens(mesh))
            gradients.append({n: whole(p.grad, orders.get(n)) for n, p in model.named_parameters()})

    read_outs = draws.validation([1, 4], batches)
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "depths": [result.depths for result in results],
        "gradients": [gradients[0], gradients[-1]],
        "telemetry": telemetry,
        "validation": validate(model, batches, CPU, read_outs, positions=positions),
        "states": [draws.training(1, n, b).kwargs.get("initial_state") for n, b in enumerate(batches)],
        "rows": [batch.rows for batch in batches],
        "keys": sorted(model.state_dict()),
        "watched": getattr(watch, "seen", None),
    }


def with_prompts(batch: Batch) -> Batch:
    """Row r has no labels before position 2 r: parts of rows have many, few or none."""
    labels = batch.labels.clone()
    for labels_of_row, row in zip(labels, batch.rows, strict=True):
        labels_of_row[: 2 * row] = IGNORE_INDEX
    return replace(batch, labels=labels)


def with_documents(batch: Batch) -> Batch:
    """Three documents a row, with borders that differ from row to row and from the ranks' parts."""
    places = torch.arange(SEQ_LEN).expand(len(batch.rows), -1)
    rows = torch.tensor(list(batch.rows))[:, None]
    documents = (places > 2 + rows % 4).int() + (places > 9 + rows % 3).int()
    return replace(batch, document_ids=documents)


def whole(gradient: torch.Tensor | None, order: RowOrder | None = None) -> torch.Tensor | None:
    """In the order of the model's rows."""
    if gradient is None:
        return None
    tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return (tensor if order is None else order.restore(tensor)).detach().clone()


def on(context: int = 1, *, tensor: int = 1, replicate: int = 1, rows: int = 1) -> dict[str, dict[str, Any]]:
    """Sections for degrees. rows: of one microbatch of one rank, of the 8 of a step."""
    assert GLOBAL_BATCH % rows == 0
    return {
        "parallelism": {
            "context_parallel_degree": context,
            "tensor_parallel_degree": tensor,
            "data_parallel_replicate_degree": replicate,
        },
        "training": {"local_batch_size": rows},
    }


def merged(case: Case, *sections: dict[str, dict[str, Any]]) -> Case:
    """`case` with the keys of all `sections`; of a key that stands in two, the later."""
    names = {name for each in sections for name in each}
    together = {name: {k: v for each in sections for k, v in each.get(name, {}).items()} for name in names}
    return replace(case, sections=together)


def assert_alike(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Losses, both gradients, telemetry and validation, and that they could tell."""
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(alone["norms"], abs=1e-5)
    for gradients, expected in zip(found["gradients"], alone["gradients"], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=2e-7, rtol=1e-4, msg=name)
            assert gradient.abs().max() > 1e-5, name
    assert found["validation"] == pytest.approx(alone["validation"], abs=1e-5)
    assert found["keys"] == alone["keys"]
    if found["telemetry"] and found["rows"] == alone["rows"]:  # it is of the first rank's last microbatch
        assert found["telemetry"] == pytest.approx(alone["telemetry"], rel=1e-4, abs=1e-6)


def assert_recurrent_alike(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """And depths and first states, which are drawn: each rank has its part of the same noise."""
    for found in ranks:
        assert found["depths"] == alone["depths"]
        assert_alike(found, alone)
    assert len(ranks[0]["telemetry"]) == 9
    parts = [rank["states"][0] for rank in ranks]
    assert torch.equal(torch.cat(parts, dim=1), alone["states"][0]), "the same noise, bit for bit"
