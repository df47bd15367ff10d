"""What the keys against memory cost in time, where the plain step fits too.

    python benchmarks/techniques.py [--rounds 5]
    torchrun --nproc_per_node 2 benchmarks/techniques.py [--rounds 5]

TrainStep under FSDP on one gloo rank, one thread, float32, the shape of benchmarks/train_step.py. CPU time of
a step, the least of all rounds, the variants taking turns; ratios are to the first line, or, of what needs
full recomputation, to that. On several ranks it is those variants that share rows or matrices, on the same
global batch: the sum of all ranks' CPU time, in which gloo's copies are.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.one_thread import start_with_settings

if __name__ == "__main__":
    start_with_settings()

import torch
import torch.distributed as dist
from tabulate import tabulate

from benchmarks.train_step import BATCH, CONFIG, SEQ_LEN
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import Batch
from torchtitan_rd.models import get_spec
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.train_step import TrainStep

FULL = {"mode": "full"}


@dataclass(frozen=True)
class Variant:
    """Keys of three sections of a configuration. compared_with: the variant to which its time is a ratio."""

    training: dict[str, Any] = field(default_factory=dict)
    recomputation: dict[str, Any] = field(default_factory=lambda: {"mode": "none"})
    parallelism: dict[str, Any] = field(default_factory=dict)
    compared_with: str = "plain"


ON_ONE_RANK = {
    "plain": Variant(),
    "loss_chunk_tokens = 256": Variant({"loss_chunk_tokens": 256}),
    "mlp_tile_tokens = 512": Variant({"mlp_tile_tokens": 512}),
    "full": Variant(recomputation=FULL),
    'full, keep = "attention"': Variant(recomputation={**FULL, "keep": "attention"}, compared_with="full"),
    "full, offload": Variant(recomputation={**FULL, "offload": True}, compared_with="full"),
    "full, mlp_tile_tokens = 512": Variant({"mlp_tile_tokens": 512}, FULL, compared_with="full"),
}
WARM_UP = 2


def sharing(ranks: int) -> dict[str, Variant]:
    keys = ("context_parallel_degree", "tensor_parallel_degree")
    return {"plain": Variant(), **{f"{key} = {ranks}": Variant(parallelism={key: ranks}) for key in keys}}


class Step:
    """Calls TrainStep with this rank's rows of one batch. ids: (BATCH, SEQ_LEN + 1), of all ranks."""

    def __init__(self, variant: Variant, ids: torch.Tensor):
        config = JobConfig.model_validate(
            {
                "training": {
                    "mixed_precision_param": "float32",
                    "seq_len": SEQ_LEN,
                    **variant.training,
                },
                "activation_checkpoint": variant.recomputation,
                "parallelism": variant.parallelism,
            }
        )
        rank, device = dist.get_rank(), torch.device("cpu")
        dims = ParallelDims.resolve(config.parallelism, dist.get_world_size())
        model = build_model(config, get_spec("llama3"), CONFIG, dims.build_mesh("cpu"), device)

        rows = BATCH // dims.data_degree
        own = range(rows * dims.data_rank(rank), rows * (dims.data_rank(rank) + 1))
        self._batch = Batch(ids[own.start : own.stop, :-1], ids[own.start : own.stop, 1:], None, own)
        self._step = TrainStep(
            model,
            build_optimizer(model, config.optimizer),
            config.training,
            device,
            positions=dims.positions(rank, SEQ_LEN),
            counts=dims.counts(rank),
        )

    def cpu_seconds(self, number: int) -> float:
        """Of all ranks together."""
        started = time.process_time()
        self._step(number, [self._batch])
        seconds = torch.tensor(time.process_time() - started)
        dist.all_reduce(seconds)
        return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks, rank = dist.get_world_size(), dist.get_rank()

    torch.manual_seed(0)
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    variants = sharing(ranks) if ranks > 1 else ON_ONE_RANK
    steps = {name: Step(variant, ids) for name, variant in variants.items()}

    least = dict.fromkeys(variants, float("inf"))
    for number in range(1, WARM_UP + rounds + 1):
        for name, step in steps.items():
            seconds = step.cpu_seconds(number)
            if number > WARM_UP:
                least[name] = min(least[name], seconds)
    dist.destroy_process_group()

    rows = [
        (
            name,
            1e6 * least[name] / (BATCH * SEQ_LEN),
            least[name] / least[variant.compared_with],
            variant.compared_with,
        )
        for name, variant in variants.items()
    ]
    headers = ("what", "CPU us/token", "ratio", "to")
    if rank == 0:
        print(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".0f", ".2f", "")))


if __name__ == "__main__":
    main()
