"""A tiny Llama or raven on ranks that share rows: the body of the tests of context parallelism.

The batches are those of tests/small_run.py, the same for any number of ranks; each data rank has its share.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.small_run import GLOBAL_BATCH, SEQ_LEN, VOCAB, Setup, batches_of, config_of
from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.build_model import build_model
from torchtitan_rd.data import Batch, BatchDims
from torchtitan_rd.draws import Draws
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import ParallelDims, sum_over_tokens
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


def train(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Losses, norms, whole gradients of the first and the last step, telemetry, a validation,
    and a part of the first state.
    """
    torch._dynamo.reset()
    sections = {"training": {"local_batch_size": 1}, "optimizer": {"lr": 1e-3}, **case.sections}
    config = config_of(Setup(sections=sections), 1)
    dims = ParallelDims.resolve(config.parallelism, world_size)
    data_rank, positions = dims.data_rank(rank), dims.positions(rank, SEQ_LEN)

    flavor, sizes = FLAVORS[case.family]
    spec = get_spec(case.family)
    shape = replace(get_flavor(spec, flavor, {**sizes, **case.overrides}), vocab_size=VOCAB)
    mesh = dims.build_mesh("cpu")
    model = build_model(config, spec, shape, mesh, CPU)
    draws = Draws(
        spec,
        shape,
        config.recurrence,
        BatchDims.resolve(config.training, data_rank, dims.data_degree),
        seed=0,
        total_steps=case.steps,
        seq_len=SEQ_LEN,
        device=CPU,
        dtype=torch.float32,
        positions=positions,
    )
    optimizer = build_optimizer(model, config.optimizer)
    step_function = TrainStep(
        model, optimizer, config.training, CPU, forward_inputs=draws.training, positions=positions
    )

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
            gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})

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


def whole(gradient: torch.Tensor | None) -> torch.Tensor | None:
    tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return None if tensor is None else tensor.detach().clone()


def on(context: int, *, replicate: int = 1, rows: int = 1) -> dict[str, dict[str, Any]]:
    """Sections for a degree. rows: of one microbatch of one rank, of the 8 of a step."""
    assert GLOBAL_BATCH % rows == 0
    return {
        "parallelism": {"context_parallel_degree": context, "data_parallel_replicate_degree": replicate},
        "training": {"local_batch_size": rows},
    }
