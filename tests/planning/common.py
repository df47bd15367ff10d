"""Small runs that are planned here, and run for real to compare."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median_low
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_rd.batch import Batch
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.job import Environment
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.optimizer import build_optimizer, optimizer_state
from torchtitan_rd.parallelism import GradientExchange
from torchtitan_rd.planning.draws import depths_of
from torchtitan_rd.planning.memory import Measured, measure
from torchtitan_rd.run_plan import RunPlan, resolve
from torchtitan_rd.train_step import TrainStep

LLAMA = {
    "name": "llama3",
    "flavor": "debug",
    "overrides": {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 160, "n_layers": 4},
}
RAVEN = {
    "name": "raven",
    "flavor": "debug-demo",
    "overrides": {
        "dim": 64,
        "n_heads": 4,
        "ffn_dim": 160,
        "n_layers_prelude": 1,
        "n_layers_core": 2,
        "n_layers_coda": 1,
        "sampling_scheme": "fixed",
        "mean_recurrence": 5,
        "mean_backprop_depth": 3,
    },
}


def config_of(model: dict[str, Any], **sections: dict[str, Any]) -> JobConfig:
    """Float32, 2 sequences of 256 tokens, made data; no recomputation unless a section says so."""
    given = {
        "model": {"vocab_size": 256, **model},
        "activation_checkpoint": {"mode": "none"},
        **sections,
        "training": {
            "dataset": "synthetic",
            "seq_len": 256,
            "local_batch_size": 2,
            "steps": 10,
            "mixed_precision_param": "float32",
            **sections.get("training", {}),
        },
    }
    fields = JobConfig.model_fields
    return JobConfig(**{name: fields[name].annotation.model_validate(keys) for name, keys in given.items()})


def plan_of(config: JobConfig, world_size: int, rank: int = 0) -> RunPlan:
    return resolve(config, Environment(rank, rank, world_size, world_size, "INFO"))


def planned(config: JobConfig, world_size: int, *, on_gpu: bool = False) -> Measured:
    plan = plan_of(config, world_size)
    return measure(config, plan, depths_of(plan, config.training.steps).chosen, on_gpu=on_gpu)


def run_for_real(rank: int, world_size: int, configs: list[JobConfig]) -> list[dict[str, int]]:
    """Of each, two steps: the bytes of shards, and the most that the allocator gave out in the second step
    beyond what was there before it.
    """
    return [_run(rank, world_size, config) for config in configs]


def _run(rank: int, world_size: int, config: JobConfig) -> dict[str, int]:
    plan = plan_of(config, world_size, rank)
    mesh = plan.dims.build_mesh("cpu")
    model = build_model(config, plan.spec, plan.shape, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, config.optimizer)
    state = optimizer_state(model, optimizer)

    def inputs(step: int, number: int, batch: Batch) -> ForwardInputs:
        return plan.draws.training(1, number, batch)

    train_step = TrainStep(
        model,
        optimizer,
        config.training,
        torch.device("cpu"),
        forward_inputs=inputs,
        exchange=GradientExchange(model, config.parallelism, config.training, mesh),
        positions=plan.positions,
        counts=plan.dims.counts(rank),
    )
    shape = (config.training.local_batch_size, config.training.seq_len)
    ids = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    number = plan.batch.accumulation
    batches = [Batch(ids, ids, None, range(shape[0])) for _ in range(number)]
    train_step(1, batches)

    def peak_of(step: int) -> int:
        optimizer.zero_grad()
        train_step.settle()
        with GivenBack() if world_size > 1 else nullcontext():
            return allocated(lambda: train_step(step, batches))

    peak = median_low(peak_of(step) for step in ((2, 3, 4) if world_size > 1 else (2,)))
    gradients = [p.grad for p in model.parameters()]
    return {
        "parameters": _bytes(model.parameters()),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(state.values()),
        "peak": peak,
    }


class GivenBack(TorchDispatchMode):
    """A context in which every message between ranks is over for the allocator too.

    Gloo's threads let go of what they have sent a moment after the rank that waited goes on. On busy cores
    the moment is long, and a peak then holds up to twice as much. A pause seldom fails, so more than one
    step is measured.
    """

    MOMENT = 0.02  # seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.name():
            time.sleep(self.MOMENT)
        return result


def _bytes(tensors: Any) -> int:
    local = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in local}
    return sum(storages.values())


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that the allocator gave out during `work`, beyond what was there before: each piece that
    it gives or takes back, in order.
    """
    gc.collect()  # what an earlier model left in circles would count as given back if it went meanwhile
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
