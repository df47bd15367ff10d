"""One step of a run on one CPU without numbers and without peers: the run's own builder and train step over
tensors that have a size alone (FakeTensor), with a process group that answers for any number of ranks.

Where a GPU's kernels keep something else than those of a CPU, theirs is what is counted: see `gpu_kernels`.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from torchtitan_rd import train_step
from torchtitan_rd.batch import Batch
from torchtitan_rd.build_model import shard_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.model_spec import ForwardInputs, NumSteps, WrapPlan
from torchtitan_rd.models.layers import Head
from torchtitan_rd.optimizer import build_optimizer, optimizer_state, takes_flag
from torchtitan_rd.parallelism import GradientExchange, allocate, local_part
from torchtitan_rd.parallelism.local_part import local
from torchtitan_rd.parallelism.offload import OnHost
from torchtitan_rd.planning.tracker import (
    GRADIENTS,
    HOST,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    SAVED,
    UPDATE,
    Collective,
    Peak,
    Tracker,
    replaced,
)
from torchtitan_rd.run_plan import RunPlan

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepTrace:
    """Of one rank. Bytes, FLOPs, and messages of a step with `microbatches` microbatches.

    peak: the moment at which most lived, with what it belonged to. saved: activations that forward left for
    backward. on_host: those of them that waited in host memory.
    flops: (pass, "matmul" or "attention") -> FLOPs; attention over all S x S pairs.
    collectives: name -> calls and bytes.
    """

    peak: Peak
    saved: int
    on_host: int
    microbatches: int
    flops: Mapping[tuple[Any, str], int]
    collectives: Mapping[str, Collective]


class TracedRun:
    """A run whose steps can be traced. To be closed: it has the process group, of which there is one.

    parameters, gradients, optimizer: bytes of this rank, the first one, whose shards are the largest.
    to_host: bytes of the largest sharded unit, which CPU offload copies at a time; 0 without it.
    """

    def __init__(self, config: JobConfig, plan: RunPlan, *, on_gpu: bool):
        """on_gpu: count what a GPU's kernels keep, else what a CPU's do."""
        self.config, self.plan = config, plan
        self._closing = ExitStack()
        offloaded = config.training.enable_cpu_offload
        # A peak of the device's memory leaves out what stands in host memory.
        away = (PARAMETERS, GRADIENTS, OPTIMIZER, UPDATE) if offloaded else ()
        self._tracker = Tracker(gpu_kernels=on_gpu, off_device=away)
        try:
            self._build(on_gpu)
        except BaseException:
            self._closing.close()
            raise
        self.gradients = 0
        self.to_host = self._largest_unit() if offloaded else 0

    def __enter__(self) -> "TracedRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def _build(self, on_gpu: bool) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.plan.dims.world_size)
        self._closing.callback(dist.destroy_process_group)
        mesh = self.plan.dims.build_mesh("cpu")
        config = _traceable(self.config)
        self.model, _ = shard_model(config, self.plan.spec, self.plan.shape, mesh)

        self._closing.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if on_gpu:
            self._closing.enter_context(gpu_kernels())
        self._closing.enter_context(self._tracker.sees_resizing())
        self._closing.enter_context(_marks_host_memory(self._tracker))
        self._closing.enter_context(_knows_offsets())
        allocate(self.model, _CPU, offload=False)
        self.model.init_buffers(_CPU)
        self.model.train()

        self.parameters = self._label(self.model.parameters(), PARAMETERS)
        self._know_gradients()
        _watch(self.model, self.plan.spec.wrap_plan(self.model), self._tracker)
        optimizer = build_optimizer(self.model, self.config.optimizer)
        state = optimizer_state(self.model, optimizer)
        self.optimizer = self._label(state.values(), OPTIMIZER)

        # Before such an update the host reads whether it happens; the one that does is traced.
        if not takes_flag(optimizer, _CPU):
            updates = replaced(train_step, "update_unless", lambda skip, optimizer: optimizer.step())
            self._closing.enter_context(updates)

        self._drawn: ForwardInputs | None = None
        self._step = train_step.TrainStep(
            self.model,
            optimizer,
            self.config.training,
            _CPU,
            forward_inputs=lambda step, number, batch: self._inputs(batch),
            late=True,  # so that no number is read
            token_weights=self.plan.token_weights,
            exchange=GradientExchange(self.model, config.parallelism, config.training, mesh),
            positions=self.plan.positions,
        )

    def step(self, drawn: ForwardInputs, num_steps: NumSteps | None = None) -> StepTrace:
        """Traces one step, of at most two microbatches: the others are as the second.

        drawn: what forward takes beside tokens, for no rows. num_steps: in place of the drawn depth.
        """
        kwargs = dict(drawn.kwargs)
        if num_steps is not None:
            kwargs["num_steps"] = num_steps
        self._drawn = ForwardInputs(kwargs, num_steps or drawn.num_steps)
        batch = self.plan.batch
        number = min(batch.accumulation * batch.stages, 2)
        shape = (batch.local_batch_size, self.plan.seq_len)
        batches = [
            Batch(
                torch.empty(shape, dtype=torch.int64),
                torch.empty(shape, dtype=torch.int64),
                None,
                batch.rows_of(index),
            )
            for index in range(number)
        ]
        gc.collect()  # what an earlier step left in circles would count

        tracker = self._tracker
        tracker.begin()
        tracker.moment = OTHER
        with tracker:
            self._step(1, batches)
        tracker.moment = OTHER
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradients = self._label(gradients, GRADIENTS)
        self._step.optimizer.zero_grad()
        self._closing.enter_context(replaced(self._step, "settle", _nothing))  # it would read numbers
        saved = tracker.saved
        return StepTrace(
            tracker.peak,
            saved.get(SAVED, 0) + saved.get(HOST, 0),
            saved.get(HOST, 0),
            number,
            dict(tracker.flops),
            dict(tracker.collectives),
        )

    def _inputs(self, batch: Batch) -> ForwardInputs:
        """What was drawn for no rows, for those of `batch`."""
        drawn = self._drawn
        if drawn is None:
            raise RuntimeError("a step is traced by `step`")
        rows = len(batch.rows)
        kwargs = {
            name: torch.empty(rows, *value.shape[1:], dtype=value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in drawn.kwargs.items()
        }
        return ForwardInputs(kwargs, drawn.num_steps)

    def _know_gradients(self) -> None:
        """Labels each shard of a gradient as soon as FSDP has made it: CPU offload takes it off the device
        at that moment.
        """

        def is_made(parameter: torch.Tensor) -> None:
            if isinstance(parameter.grad, DTensor):
                self._tracker.label([parameter.grad.to_local()], GRADIENTS)

        for parameter in self.model.parameters():
            if isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(is_made)

    def _label(self, tensors: Any, label: str) -> int:
        """-> bytes of the storages that are known under it now."""
        self._tracker.label(map(local, tensors), label)
        return self._tracker.bytes_of(label)

    def _largest_unit(self) -> int:
        plan = self.plan.spec.wrap_plan(self.model)
        names = [
            *plan.blocks,
            *(unit for unit, _ in plan.loops),
            *(one for unit in plan.shard_only for one in unit),
        ]
        units = [self.model.get_submodule(name) for name in names]
        return max(
            (sum(local(p).nbytes for p in unit.parameters() if isinstance(p, DTensor)) for unit in units),
            default=0,
        )


def _traceable(config: JobConfig) -> JobConfig:
    """The same without what needs a device: compiled code, which keeps at most what plain code does, and
    page-locked shards, which are told apart by what they are.
    """
    sections = {
        "compile": config.compile.model_copy(update={"enable": False, "fail_on_recompile": False}),
        "training": config.training.model_copy(update={"enable_cpu_offload": False}),
    }
    return config.model_copy(update=sections)


def _nothing() -> None:
    pass


def _watch(model: nn.Module, plan: WrapPlan, tracker: Tracker) -> None:
    """Tells the tracker which part of a step it is."""

    def forward_begins(*_: object) -> None:
        tracker.moment = "forward"

    def forward_ends(*_: object) -> None:
        tracker.moment = OTHER

    # Before FSDP's own hook gathers anything.
    model.register_forward_pre_hook(forward_begins, prepend=True)
    model.register_forward_hook(forward_ends)

    def region_begins(*_: object) -> None:
        tracker.without_gradient = not torch.is_grad_enabled()

    def region_ends(*_: object) -> None:
        tracker.without_gradient = False

    for name in (*plan.blocks, *(iteration for _, iteration in plan.loops)):
        region = model.get_submodule(name)
        region.register_forward_pre_hook(region_begins)
        region.register_forward_hook(region_ends)

    for module in model.modules():
        if isinstance(module, Head):
            module.register_forward_pre_hook(_enters_head(tracker))


def _enters_head(tracker: Tracker) -> Callable:
    """What is made from the head's forward until its backward is done is the head's."""

    def enters(module: nn.Module, inputs: tuple) -> None:
        tracker.in_head = True
        hidden = inputs[0]
        if hidden.requires_grad:
            hidden.register_hook(leaves)

    def leaves(gradient: torch.Tensor) -> None:
        tracker.in_head = False

    return enters


@contextmanager
def _marks_host_memory(tracker: Tracker) -> Iterator[None]:
    """Here all memory is the CPU's; the copies that `activation_checkpoint.offload` makes are the host's."""
    original = OnHost.__init__

    def init(self: OnHost, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tracker.label(self.host, HOST)

    with replaced(OnHost, "__init__", init):
        yield


@contextmanager
def _knows_offsets() -> Iterator[None]:
    """torch reads where a shard begins from a small tensor, which must have numbers here too (Muon asks)."""
    original = local_part.compute_local_shape_and_global_offset

    def computed(*args: Any) -> Any:
        with _disable_current_modes():
            return original(*args)

    with replaced(local_part, "compute_local_shape_and_global_offset", computed):
        yield


class _FusedRMSNorm(torch.autograd.Function):
    """What torch's fused kernel keeps on a GPU: the input and one float32 a row, no float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _fused_rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return _FusedRMSNorm.apply(x, weight)


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within it, tensors without numbers take the ways of a GPU through the models: FlashAttention (flex and
    cuDNN keep the same: the output and one float32 a query and head) and the fused norm.

    A CPU build of torch cannot run autograd on tensors that call themselves CUDA's, hence the detour.
    """
    with (
        replaced(F, "scaled_dot_product_attention", _flash_attention),
        replaced(F, "rms_norm", _fused_rms_norm),
        replaced(FakeTensor, "is_cpu", False),
    ):
        yield
