"""What bfloat16 costs a raven: errors of logits and core gradients against float32, beside those of autocast.

    python benchmarks/drift.py [--steps 10 150]

A small raven (E 192, 2 + 4 + 2 blocks) is trained in float32 on a copying task. Its weights then run on the
same batches and first states in float32, under torch's autocast, and sharded by FSDP at each setting of the
precision. Errors are relative (Frobenius norms), root mean squares over 12 batches. CPU, one process, a few
minutes on an idle machine.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan_rd.models.raven.init import inits
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.plan import wrap_plan
from torchtitan_rd.models.raven.shape import RavenShape
from torchtitan_rd.parallelism import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
    ShardingKeys,
    TilingKeys,
    allocate,
    init_weights,
    parallelize,
)

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
CONFIG = RavenShape(
    dim=192,
    n_heads=4,
    ffn_dim=512,
    n_layers_prelude=2,
    n_layers_core=4,
    n_layers_coda=2,
    mean_recurrence=8,
    mean_backprop_depth=4,
    vocab_size=64,
)
DRAWS = [(4, 4), (24, 8), (0, 16)]
BATCHES, ROWS, LENGTH = 12, 4, 32

Run = Callable[[tuple[int, int], int], tuple[torch.Tensor, torch.Tensor]]


def batch_of(config: RavenShape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens (ROWS, LENGTH), whose second half repeats the first, and first states."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(config.vocab_size, (ROWS, LENGTH // 2), generator=generator)
    return torch.cat((half, half), dim=1), torch.randn(ROWS, LENGTH, config.dim, generator=generator)


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(config: RavenShape, steps: int) -> Raven:
    """An unsharded raven after `steps` updates in float32 (rate 1e-3, draws (2, 2))."""
    model = Raven(config)
    init_weights(model, inits(model), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        tokens, state = batch_of(config, 1000 + step)
        loss_of(model(tokens, num_steps=(2, 2), initial_state=state), tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def plain(model: Raven, *, autocast: bool = False) -> Run:
    """Float32 parameters, unsharded: in float32, or as Huginn was trained."""

    def run(draw: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, state = batch_of(model.shape, seed)
        model.zero_grad()
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            logits = model(tokens, num_steps=draw, initial_state=state)
        loss_of(logits, tokens).backward()
        return logits.detach(), core_gradient(model)

    return run


def sharded(
    weights: Raven,
    *,
    state_dtype: torch.dtype = FP32,
    loop_grad_dtype: torch.dtype | None = None,
    full_precision: bool = True,
    sharding: Mapping[str, Any] | None = None,
) -> Run:
    """The same weights as training computes with them. full_precision: whether the plan's
    names are heeded.
    """
    with torch.device("meta"):
        model = Raven(weights.shape)
    plan = wrap_plan(model)
    parallelize(
        model,
        plan if full_precision else replace(plan, full_precision=(), float32_units=()),
        init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",)),
        parallelism=ParallelismConfig(),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        compile=CompileConfig(),
        sharding=ShardingKeys(**(sharding or {})),
        tiling=TilingKeys(),
        loop_grad_dtype=loop_grad_dtype,
    )

    allocate(model, CPU, offload=False)
    model.init_buffers(CPU)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights.parameters(), strict=True):
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)

    def run(draw: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, state = batch_of(model.shape, seed)
        model.zero_grad()
        types = {"state_dtype": state_dtype, "head_dtype": BF16}
        logits = model(tokens, num_steps=draw, initial_state=state.to(state_dtype), **types)
        loss_of(logits, tokens).backward()
        return logits.detach(), core_gradient(model)

    return run


def core_gradient(model: Raven) -> torch.Tensor:
    """The gradient of all parameters of the core, as one vector."""
    gradients = [parameter.grad for parameter in model.transformer.recurrence.parameters()]
    return torch.cat(
        [(g.full_tensor() if isinstance(g, DTensor) else g).flatten().float() for g in gradients]
    )


def errors(run: Run, reference: Run, draw: tuple[int, int], batches: int = BATCHES) -> tuple[float, float]:
    """-> relative errors of logits and core gradient."""
    pairs = [zip(run(draw, seed), reference(draw, seed), strict=True) for seed in range(batches)]
    found = torch.tensor([[(a - b).norm() / b.norm() for a, b in pair] for pair in pairs])
    logits, gradient = found.square().mean(0).sqrt().tolist()
    return logits, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[10, 150], help="training steps before measuring"
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)

    print("relative errors of logits / core gradient")
    for steps in parser.parse_args().steps:
        weights = trained(CONFIG, steps)
        reference = cache(plain(weights))

        runs = {
            "autocast": plain(weights, autocast=True),
            "default": sharded(weights),
            "default, core_grad_dtype float32": sharded(weights, loop_grad_dtype=FP32),
            "state_dtype as_param": sharded(weights, state_dtype=BF16),
            "all in bfloat16": sharded(weights, state_dtype=BF16, full_precision=False),
        }
        print(f"after {steps} steps{'':21}" + "".join(f"{draw!s:>18}" for draw in DRAWS))
        for name, run in runs.items():
            found = [errors(run, reference, draw) for draw in DRAWS]
            print(
                f"  {name:34}" + "".join(f"{logits:9.4f} /{gradient:7.4f}" for logits, gradient in found),
                flush=True,
            )

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
