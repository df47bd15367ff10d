"""Collectives of one whole training step, by kind: TrainStep itself, under FSDP and HSDP,
1 and 4 microbatches.

    python benchmarks/collectives.py

One process stands for rank 0 of 8 (torch's fake process group); the counts are exact and repeat. Kinds:
all-gathers of parameters, reduce-scatters and all-reduces of gradients (the latter between the copies
of HSDP), and the small all-reduces of the step itself (valid tokens before backward; losses, norm and
stop flag after it).
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import Batch
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.llama.shape import LlamaShape
from torchtitan_rd.models.raven.shape import RavenShape
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import GradientExchange, ParallelDims
from torchtitan_rd.train_step import TrainStep

WORLD_SIZE = 8
SEQ_LEN = 8
DRAWS = [(0, 1), (4, 4), (24, 8), (56, 8)]
LAYOUTS = {"FSDP": 1, "HSDP": 2}  # name -> copies of the model
ACCUMULATIONS = (1, 4)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "of the step")
NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")  # of the namespaces of collectives
RAVEN = RavenShape(  # nebel's layers
    dim=64,
    n_heads=4,
    ffn_dim=96,
    n_layers_prelude=2,
    n_layers_core=4,
    n_layers_coda=2,
    mean_recurrence=32,
    mean_backprop_depth=8,
    vocab_size=64,
)
LLAMA = LlamaShape(dim=64, n_layers=8, n_heads=4, n_kv_heads=4, ffn_dim=96, vocab_size=64)


class CountCollectives(TorchDispatchMode):
    """Counts what reaches torch.distributed.
    A fake reduce-scatter leaves its output as it finds it: that is zeroed.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.phase = ""

    def beat(self, step: int, phase: str) -> None:
        """TrainStep tells what it does: gradients are exchanged in its microbatches."""
        self.phase = phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it takes the operation apart, and its collectives come by here
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(NO_COLLECTIVES):
            self.counts[self._kind(func.__name__.replace("_", ""), args)] += 1
        return result

    def _kind(self, name: str, args: tuple) -> str:
        if "allgather" in name:
            return "all-gather"
        if "reducescatter" in name:
            args[0].zero_()
            return "reduce-scatter"
        if "allreduce" in name:
            return "all-reduce" if self.phase.startswith("microbatch") else "of the step"
        return name


@contextmanager
def fake_ranks() -> Iterator[None]:
    """This process as rank 0 of WORLD_SIZE, the others of which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(
    name: str, shape: Any, layout: str, reshard: str = "default", **parallelism: Any
) -> tuple[JobConfig, torch.nn.Module]:
    """parallelism: more of its keys."""
    sections = {
        "parallelism": {
            "data_parallel_replicate_degree": LAYOUTS[layout],
            "fsdp_reshard_after_forward": reshard,
            **parallelism,
        },
        "activation_checkpoint": {"mode": "full"},
        "training": {
            "local_batch_size": 1,
            "seq_len": SEQ_LEN,
            "mixed_precision_param": "float32",
        },
    }
    fields = JobConfig.model_fields
    config = JobConfig(**{key: fields[key].annotation.model_validate(keys) for key, keys in sections.items()})
    mesh = ParallelDims.resolve(config.parallelism, WORLD_SIZE).build_mesh("cpu")
    return config, build_model(config, get_spec(name), shape, mesh, torch.device("cpu"))


def count(
    config: JobConfig, model: torch.nn.Module, accumulation: int, draw: tuple[int, int] | None = None
) -> dict[str, int]:
    """The collectives of one update of `accumulation` microbatches;
    a kind that is not of KINDS has its torch name.
    """
    counter = CountCollectives()
    mesh = ParallelDims.resolve(config.parallelism, WORLD_SIZE).build_mesh("cpu")
    step = TrainStep(
        model,
        build_optimizer(model, config.optimizer),
        config.training,
        torch.device("cpu"),
        beat=counter.beat,
        exchange=GradientExchange(model, config.parallelism, config.training, mesh),
        **({} if draw is None else {"forward_inputs": lambda step, number, batch: inputs_of(draw)}),
    )
    ids = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    with counter:
        step(1, [Batch(ids, ids, None)] * accumulation)
    return {kind: counter.counts.pop(kind, 0) for kind in KINDS} | dict(counter.counts)


def inputs_of(draw: tuple[int, int]) -> ForwardInputs:
    return ForwardInputs({"num_steps": draw, "initial_state": torch.zeros(1, SEQ_LEN, RAVEN.dim)}, draw)


def table() -> list[tuple[str, str, int, dict[str, int]]]:
    """(model, layout, microbatches, counts); a raven has one row for all DRAWS,
    since their counts are the same.
    """
    rows = []
    for layout in LAYOUTS:
        llama, raven = build("llama3", LLAMA, layout), build("raven", RAVEN, layout)
        tied = build("llama3", replace(LLAMA, tie_word_embeddings=True), layout)
        for accumulation in ACCUMULATIONS:
            rows.append(("llama, 8 layers", layout, accumulation, count(*llama, accumulation)))
            rows.append(("llama, tied head", layout, accumulation, count(*tied, accumulation)))
            by_draw = [count(*raven, accumulation, draw) for draw in DRAWS]
            if any(counts != by_draw[0] for counts in by_draw):
                raise AssertionError(
                    f"the counts depend on the draw: {dict(zip(DRAWS, by_draw, strict=True))}"
                )
            rows.append(("raven, 2 + 4 + 2", layout, accumulation, by_draw[0]))
    return sorted(rows, key=lambda row: (row[0], row[1], row[2]))


def main() -> None:
    with fake_ranks():
        rows = table()
    print(f"one step on {WORLD_SIZE} ranks; raven: the same at the draws {', '.join(map(str, DRAWS))}")
    titles = "".join(f" {kind} |" for kind in KINDS)
    print(f"| model | layout | microbatches |{titles}\n|{'---|' * (3 + len(KINDS))}")
    for model, layout, accumulation, counts in rows:
        print(
            f"| {model} | {layout} | {accumulation} |" + "".join(f" {number} |" for number in counts.values())
        )


if __name__ == "__main__":
    main()
