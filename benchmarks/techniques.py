"""What the keys against memory cost in time, where the plain step fits too.

    python benchmarks/techniques.py [--rounds 5]

TrainStep under FSDP on one gloo rank, one thread, float32, the shape of benchmarks/train_step.py. CPU time of
a step, the least of all rounds, the variants taking turns; ratios are to the first line, or, of what needs
full recomputation, to that.
"""

import argparse
import sys
import time
from pathlib import Path

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
# name -> ([training], [activation_checkpoint], what its time is compared with)
VARIANTS = {
    "plain": ({}, {"mode": "none"}, "plain"),
    "loss_chunk_tokens = 256": ({"loss_chunk_tokens": 256}, {"mode": "none"}, "plain"),
    "mlp_tile_tokens = 512": ({"mlp_tile_tokens": 512}, {"mode": "none"}, "plain"),
    "full": ({}, FULL, "plain"),
    'full, keep = "attention"': ({}, {**FULL, "keep": "attention"}, "full"),
    "full, offload": ({}, {**FULL, "offload": True}, "full"),
    "full, mlp_tile_tokens = 512": ({"mlp_tile_tokens": 512}, FULL, "full"),
}
WARM_UP = 2


def step_of(training: dict, recomputation: dict) -> TrainStep:
    config = JobConfig.model_validate(
        {
            "training": {"mixed_precision_param": "float32", "seq_len": SEQ_LEN, **training},
            "activation_checkpoint": recomputation,
        }
    )
    mesh = ParallelDims.resolve(config.parallelism, 1).build_mesh("cpu")
    model = build_model(config, get_spec("llama3"), CONFIG, mesh, torch.device("cpu"))
    return TrainStep(model, build_optimizer(model, config.optimizer), config.training, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, range(BATCH))
    steps = {name: step_of(training, ac) for name, (training, ac, _) in VARIANTS.items()}

    least = dict.fromkeys(VARIANTS, float("inf"))
    for number in range(1, WARM_UP + rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step(number, [batch])
            if number > WARM_UP:
                least[name] = min(least[name], time.process_time() - started)
    dist.destroy_process_group()

    rows = [
        (name, 1e6 * least[name] / (BATCH * SEQ_LEN), least[name] / least[other], other)
        for name, (_, _, other) in VARIANTS.items()
    ]
    headers = ("what", "CPU us/token", "ratio", "to")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".0f", ".2f", "")))


if __name__ == "__main__":
    main()
