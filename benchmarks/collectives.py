"""All-gathers and reduce-scatters of a raven's training step by depth: the loop as one FSDP unit, and block by block.

    python benchmarks/collectives.py

One process stands for rank 0 of 8 (torch's fake process group); the counts are exact and repeat.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_rd.models.raven.config import RavenConfig
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.plan import wrap_plan
from torchtitan_rd.parallelism import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
    ShardingKeys,
    parallelize,
)

WORLD_SIZE = 8
DRAWS = [(0, 1), (4, 4), (24, 8), (56, 8)]
CONFIG = RavenConfig(64, 4, 96, 2, 4, 2, 32, 8, vocab_size=64)  # nebel's layers


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in ("allgather", "reduce_scatter"):
            self.counts[kind] += kind in func.__name__
        return func(*args, **(kwargs or {}))


def build(looped: bool, reshard: str) -> Raven:
    with torch.device("meta"):
        model = Raven(CONFIG)
    plan = wrap_plan(model)
    if not looped:  # each core block a unit; the adapter goes to the root
        plan = replace(plan, loops=())
    parallelize(
        model,
        plan,
        init_device_mesh("cpu", (WORLD_SIZE,)),
        parallelism=ParallelismConfig(fsdp_reshard_after_forward=reshard),
        activation_checkpoint=ActivationCheckpointConfig(mode="full" if looped else "none"),
        compile=CompileConfig(),
        sharding=ShardingKeys(mixed_precision_param="float32"),
    )
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    return model


def count(model: Raven, draw: tuple[int, int]) -> str:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with CountCollectives() as counter:
        model(tokens, num_steps=draw, initial_state=torch.zeros(1, 8, CONFIG.dim)).sum().backward()
    return f"{counter.counts['allgather']} + {counter.counts['reduce_scatter']}"


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    variants = [(looped, reshard) for looped in (True, False) for reshard in ("default", "never")]
    models = [build(looped, reshard) for looped, reshard in variants]
    print("all-gathers + reduce-scatters of one microbatch")
    titles = [f"{'one unit' if looped else 'by block'}, reshard {reshard}" for looped, reshard in variants]
    print(f"{'(n, k)':10}" + "".join(f"{title:>27}" for title in titles))
    for draw in DRAWS:
        print(f"{draw!s:10}" + "".join(f"{count(model, draw):>27}" for model in models))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
