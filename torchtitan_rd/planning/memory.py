"""What a step takes at most on each GPU and in host memory, by what it belongs to (docs/planning.md)."""

from dataclasses import dataclass, replace
from typing import Any

from torchtitan_rd.config import JobConfig
from torchtitan_rd.planning.cards import GIB, Card
from torchtitan_rd.planning.draws import Depth
from torchtitan_rd.planning.trace import StepTrace, TracedRun
from torchtitan_rd.planning.tracker import Collective
from torchtitan_rd.run_plan import RunPlan

# Assumed, and said so: what a context, cuBLAS and NCCL take before anything is allocated, and the share that
# the allocator cannot use.
RUNTIME_GIB = 2.0
FRAGMENTATION = 0.05
_ITERATIONS = (2, 3)  # with gradient, from which more follow


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU when most live. parts: by what they belong to. moment: forward, backward, or neither.
    saved: activations that forward leaves for backward, on the device or in host memory.
    """

    parts: dict[str, int]
    moment: str
    saved: int
    saved_on_host: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def reserved(self) -> float:
        """With what the allocator cannot use and what is there before it."""
        return self.peak * (1 + FRAGMENTATION) + RUNTIME_GIB * GIB

    def headroom(self, card: Card) -> float:
        """Bytes that are left on the card; below 0 it does not fit."""
        return card.memory_gib * GIB - self.reserved


@dataclass(frozen=True)
class Traced:
    """One depth of a run: what it takes and does. flops: (pass, kind) -> FLOPs of one rank in a step."""

    depth: Depth
    need: Need
    flops: dict[tuple[str, str], float]
    collectives: dict[str, Collective]


@dataclass(frozen=True)
class Measured:
    """parameters, gradients, optimizer: bytes of the shards of one rank. depths: for each that is drawn."""

    parameters: int
    gradients: int
    optimizer: int
    depths: list[Traced]

    @property
    def worst(self) -> Need:
        return max((traced.need for traced in self.depths), key=lambda need: need.peak)


def measure(config: JobConfig, plan: RunPlan, depths: list[Depth], *, on_gpu: bool = True) -> Measured:
    """Traces the run at each of these depths; those that differ in what leaves nothing behind, once."""
    traces: dict[Any, StepTrace] = {}
    with TracedRun(config, plan, on_gpu=on_gpu) as run:
        for depth in depths:
            if depth.traced not in traces:
                traces[depth.traced] = run.step(depth.inputs, depth.traced)
        microbatches = plan.batch.accumulation * plan.batch.stages
        found = [_of_whole_step(depth, traces[depth.traced], run.to_host, microbatches) for depth in depths]
        return Measured(run.parameters, run.gradients, run.optimizer, found)


def _of_whole_step(depth: Depth, trace: StepTrace, to_host: int, microbatches: int) -> Traced:
    parts = dict(trace.peak.by_label())
    if to_host:
        parts["copies to and from host memory"] = 2 * to_host
    scale = microbatches / trace.microbatches
    flops = {key: count * (1.0 if key[0] == "update" else scale) for key, count in trace.flops.items()}
    if depth.traced is not None and depth.num_steps[0]:
        for kind in ("matmul", "attention"):
            key = ("without gradient", kind)
            flops[key] = flops.get(key, 0.0) * depth.num_steps[0] / depth.traced[0]
    # The first and the last microbatch of a step differ from the others by a few small messages.
    collectives = {
        name: Collective(round(one.calls * scale), round(one.bytes * scale))
        for name, one in trace.collectives.items()
    }
    need = Need(parts, trace.peak.moment, trace.saved, trace.on_host)
    return Traced(depth, need, flops, collectives)


def estimate(config: JobConfig, plan: RunPlan, depth: Depth) -> Traced:
    """As `measure`, in a fraction of the time where it can be: few layers or iterations are traced, and each
    further one takes and does what the last one did. Where the peaks of both are not the same point of a
    step, all are traced.
    """
    short: tuple[int, int]
    if depth.traced is not None and depth.traced[1] > _ITERATIONS[1]:
        n, whole = depth.num_steps
        short = _ITERATIONS
        fewer, more = measure(config, plan, [replace(depth, num_steps=(n, k)) for k in short]).depths
    else:
        every = _period(config)
        # Behind fewer blocks than are gathered ahead and reduced at a time, a peak is not that of many.
        first = 2 + config.parallelism.fsdp_prefetch_units
        whole, short = getattr(plan.shape, "n_layers", 0), (every * first, every * (first + 1))
        if whole <= short[1] or whole % every:
            return measure(config, plan, [depth]).depths[0]
        shape: Any = plan.shape
        plans = (replace(plan, shape=replace(shape, n_layers=number)) for number in short)
        fewer, more = (measure(config, one, [depth]).depths[0] for one in plans)

    if not _are_of_one_moment(fewer.need, more.need):
        return measure(config, plan, [depth]).depths[0]
    return _extrapolated(fewer, more, (whole - short[0]) / (short[1] - short[0]))


def _period(config: JobConfig) -> int:
    """Blocks after which activation checkpointing repeats itself."""
    keys = config.activation_checkpoint
    if keys.mode == "selective" and keys.selective_ac_option != "op":
        return int(keys.selective_ac_option)
    return keys.keep_every


def _are_of_one_moment(fewer: Need, more: Need) -> bool:
    """Whether two peaks are the same point of a step: nothing is less where there is more."""
    no_less = all(more.parts.get(label, 0) >= size for label, size in fewer.parts.items())
    return fewer.moment == more.moment and no_less


def _extrapolated(fewer: Traced, more: Traced, times: float) -> Traced:
    """times: how often the difference of the two is to be added to the first."""

    def line(before: float, after: float) -> float:
        return before + times * (after - before)

    parts = {
        label: round(line(fewer.need.parts.get(label, 0), size)) for label, size in more.need.parts.items()
    }
    need = Need(
        parts,
        more.need.moment,
        round(line(fewer.need.saved, more.need.saved)),
        round(line(fewer.need.saved_on_host, more.need.saved_on_host)),
    )
    flops = {key: line(fewer.flops.get(key, 0.0), count) for key, count in more.flops.items()}
    collectives = {}
    for name, one in more.collectives.items():
        before = fewer.collectives.get(name, Collective(0, 0))
        collectives[name] = Collective(*(round(line(*pair)) for pair in zip(before, one, strict=True)))
    return Traced(more.depth, need, flops, collectives)


def staging_bytes(config: JobConfig, measured: Measured) -> int:
    """Of one rank in host memory, while a checkpoint is written in the background."""
    if not config.checkpoint.enable or config.checkpoint.async_mode == "disabled":
        return 0
    return measured.parameters + measured.optimizer
