"""Steps of real configs on one card: the trainer's builder, FSDP over one rank, and its train step; beside
them what `torchtitan-rd plan` says of the same config.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.machine import GIB, device, peak_of, seconds_of, synchronize
from benchmarks.gpu.record import Row
from torchtitan_rd.batch import Batch
from torchtitan_rd.build_model import build_model
from torchtitan_rd.checkpoint import Checkpointer
from torchtitan_rd.config import JobConfig
from torchtitan_rd.job import Environment
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.models.attention import setup_attention
from torchtitan_rd.optimizer import build_optimizer, optimizer_state
from torchtitan_rd.planning.cards import Card
from torchtitan_rd.planning.draws import depths_of
from torchtitan_rd.planning.memory import Traced, estimate, measure
from torchtitan_rd.run_plan import RunPlan, resolve
from torchtitan_rd.train_step import TrainStep

Sections = Mapping[str, Mapping[str, Any]]
LLAMA_8B = {"dim": 4096, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336}
TINY_LLAMA = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 160}
RAVEN = {"dim": 5280, "n_heads": 55, "ffn_dim": 17920, "n_layers_prelude": 2, "n_layers_core": 4}
TINY_RAVEN = {"dim": 64, "n_heads": 4, "ffn_dim": 160, "n_layers_prelude": 1, "n_layers_core": 2}
WHOLE, FEW = 32, 2  # layers of the 8B model; of the shorter one of two that tell what a layer takes


def config_of(model: Mapping[str, Any], sections: Sections) -> JobConfig:
    """A sequence of made data, 256 ids, full recomputation, as the recipes at 131072 tokens have it."""
    keys: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 256, **model},
        "activation_checkpoint": {"mode": "full"},
        "training": {"dataset": "synthetic", "local_batch_size": 1, "steps": 10},
    }
    for name, given in sections.items():
        keys[name] = {**keys.get(name, {}), **given}
    return JobConfig.model_validate(keys)


def llama(layers: int, tokens: int, tiny: bool, sections: Sections) -> JobConfig:
    overrides = {**(TINY_LLAMA if tiny else LLAMA_8B), "n_layers": layers, "max_seq_len": tokens}
    training = {"seq_len": tokens, **sections.get("training", {})}
    model = {"name": "llama3", "flavor": "debug", "overrides": overrides}
    return config_of(model, {**sections, "training": training})


def raven(depth: tuple[int, int], tokens: int, tiny: bool, sections: Sections) -> JobConfig:
    """depth: iterations in all, and those with gradient."""
    overrides = {
        **(TINY_RAVEN if tiny else RAVEN),
        "sampling_scheme": "fixed",
        "mean_recurrence": depth[0],
        "mean_backprop_depth": depth[1],
    }
    flavor = "debug-demo" if tiny else "nebel-raven-3.5b"
    model = {"name": "raven", "flavor": flavor, "overrides": overrides}
    return config_of(model, {**sections, "training": {"seq_len": tokens}})


def _resolved(config: JobConfig) -> RunPlan:
    return resolve(config, Environment(0, 0, 1, 1, "WARNING"))


def most_layers(tokens: int, tiny: bool) -> int:
    """As many as the plan says fit this card."""
    if tiny:
        return 2 * FEW
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    card = Card("this card", total, None, "as torch reports it")
    for layers in (24, 20, 16, 12, 8, 6):
        config = llama(layers, tokens, tiny, {})
        plan = _resolved(config)
        [depth] = depths_of(plan, config.training.steps).chosen
        if estimate(config, plan, depth).need.headroom(card) >= 0:
            return layers
    return 2 * FEW


@dataclass(frozen=True)
class Run:
    """step: makes an update and returns its loss. tensors: what a checkpoint holds."""

    config: JobConfig
    plan: RunPlan
    model: nn.Module
    step: Callable[[], float]
    tensors: dict[str, dict[str, torch.Tensor]]


@contextmanager
def _run(config: JobConfig) -> Iterator[Run]:
    # What the run before has left is only free now that its frames have ended.
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    where, plan = device(), _resolved(config)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        dtype = getattr(torch, config.training.mixed_precision_param)
        shape = plan.dims.heads_in_kernel(plan.shape.attention_shape)
        setup_attention("auto", shape, where, dtype, document_mask=False)
        model = build_model(config, plan.spec, plan.shape, plan.dims.build_mesh(where.type), where)
        optimizer = build_optimizer(model, config.optimizer)

        def inputs(step: int, number: int, batch: Batch) -> ForwardInputs:
            return plan.draws.training(1, number, batch)

        update = TrainStep(model, optimizer, config.training, where, forward_inputs=inputs)
        size = (config.training.local_batch_size, config.training.seq_len)
        ids = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0)).to(where)
        batches = [Batch(ids, ids, None, range(size[0]))]
        tensors = {"model": dict(model.named_parameters()), "optimizer": optimizer_state(model, optimizer)}

        def step() -> float:
            loss = float(update(1, batches).loss)
            update.settle()
            return loss

        yield Run(config, plan, model, step, tensors)
    finally:
        dist.destroy_process_group()


def _planned(config: JobConfig) -> Traced:
    """Before the run: a plan has a process group of its own, of which there is one at a time."""
    plan = _resolved(config)
    chosen = depths_of(plan, config.training.steps).chosen
    return max(
        measure(config, plan, chosen, on_gpu=device().type == "cuda").depths, key=lambda one: one.need.peak
    )


def measure_step(config: JobConfig, tiny: bool) -> Row:
    """Seconds of a step and its memory, beside what was planned. An out-of-memory error is a finding."""
    if config.training.enable_cpu_offload and device().type == "cpu":
        return {"note": "not here: torch offloads from a GPU only"}
    planned = _planned(config)
    told = planned.need.peak

    try:
        with _run(config) as run:
            first = run.step()
            seconds = seconds_of(run.step, warm_up=1, times=2 if tiny else 3)
            peak = peak_of(run.step)
            last = run.step()
            if device().type == "cpu":  # what lived before is not in it, and host memory is the device's
                peak += _bytes(run.tensors)
                told += planned.need.saved_on_host
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory, planned were {told / GIB:.1f} GiB: {str(error)[:120]}"}

    if not last < first:
        return {"failed": f"the loss does not fall: {first:.4f}, then {last:.4f}"}
    tokens = config.training.local_batch_size * config.training.seq_len
    row: Row = (
        {} if planned.depth.traced is None else {"iterations": "{}+{}".format(*planned.depth.num_steps)}
    )
    return row | {
        "step s": seconds,
        "tokens/s": tokens / seconds,
        "GiB": peak / GIB,
        "planned GiB": told / GIB,
        "of planned": peak / told,
    }


def _bytes(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    found = [one for part in tensors.values() for one in part.values()]
    local = [one.to_local() if hasattr(one, "to_local") else one for one in found]
    return sum(one.untyped_storage().nbytes() for one in local)


def of_whole_model(few: Row, many: Row, layers: int) -> Row:
    """From steps of FEW and of `layers` layers: a layer's seconds, and a step of the WHOLE model, which is
    not measured but reckoned from them.
    """
    if "failed" in few or "failed" in many:
        return {"failed": "one of the two steps that this is reckoned from failed"}
    layer = (many["step s"] - few["step s"]) / (layers - FEW)
    step = few["step s"] + (WHOLE - FEW) * layer
    tokens = few["tokens/s"] * few["step s"]
    return {"step s": step, "tokens/s": tokens / step, "s a layer": layer, "note": "extrapolated"}


def measure_checkpoint(config: JobConfig) -> Row:
    """Seconds to save and to load, synced to the disk of the temporary folder; the weights must come back."""
    with _run(config) as run, TemporaryDirectory() as folder:
        run.step()
        keys = config.checkpoint.model_copy(update={"enable": True, "async_mode": "disabled"})
        checkpointer = Checkpointer(
            keys,
            dump_folder=Path(folder),
            job_config=config.as_dict(),
            must_match=JobConfig.must_match_keys(),
            model_shape={"name": run.plan.spec.name},
        )

        before = {name: _whole(one).clone() for name, one in run.tensors["model"].items()}
        try:
            saving = _once(lambda: checkpointer.save(1, run.tensors, {"step": 1}))
            run.step()
            loading = _once(lambda: checkpointer.load(run.tensors))
        finally:
            checkpointer.close()
        is_same = all(torch.equal(_whole(one), before[name]) for name, one in run.tensors["model"].items())
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    if not is_same:
        return {"failed": "the weights that were loaded are not those that were saved"}
    return {
        "GB": size / 1e9,
        "save s": saving,
        "load s": loading,
        "save GB/s": size / saving / 1e9,
        "load GB/s": size / loading / 1e9,
    }


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().cpu()


def _once(work: Callable[[], object]) -> float:
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def compiled(config: JobConfig, tiny: bool) -> JobConfig:
    """Tiny: the graph alone, without the minutes that its kernels would take to build."""
    keys = {"enable": True, "backend": "aot_eager" if tiny else "inductor"}
    return config.model_copy(update={"compile": config.compile.model_copy(update=keys)})
