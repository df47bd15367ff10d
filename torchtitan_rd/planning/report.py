"""Shows a plan, as tables or as JSON."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.config import JobConfig
from torchtitan_rd.planning.cards import GIB, Card
from torchtitan_rd.planning.compute import SECONDS_A_DAY, Duration, executed, total_tokens
from torchtitan_rd.planning.draws import Depths
from torchtitan_rd.planning.memory import FRAGMENTATION, RUNTIME_GIB, Measured, Traced, staging_bytes
from torchtitan_rd.planning.proposals import Proposal
from torchtitan_rd.planning.supply import Supply
from torchtitan_rd.run_plan import RunPlan

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """gaps: what could not be planned, and why. card: None where no GPU was named."""

    config: JobConfig
    run: RunPlan
    depths: Depths
    measured: Measured
    card: Card
    duration: Duration | None
    supplies: list[Supply]
    proposals: list[Proposal]
    gaps: list[str]
    gpus_per_node: int

    @property
    def fits(self) -> bool:
        return self.measured.worst.headroom(self.card) >= 0

    def as_dict(self) -> dict[str, Any]:
        """For programs. Bytes, FLOPs of one GPU and seconds."""
        run, measured = self.run, self.measured

        shards = {
            "parameters": measured.parameters,
            "gradients": measured.gradients,
            "optimizer": measured.optimizer,
        }
        depths = [self._depth_as_dict(one) for one in measured.depths]
        proposals = [self._proposal_as_dict(one) for one in self.proposals]

        return {
            "parameters": run.count_parameters(),
            "gpus": run.dims.world_size,
            "tokens_per_step": run.tokens_per_step,
            "samples_per_step": run.batch.global_batch_size,
            "steps": self.config.training.steps,
            "tokens": total_tokens(self.config, run),
            "card": self.card._asdict(),
            "fits": self.fits,
            "headroom_bytes": self.measured.worst.headroom(self.card),
            "shards": shards,
            "depths": depths,
            # Host memory is that of a rank, a checkpoint that of all.
            "host": host_bytes(self),
            "checkpoint": checkpoint_bytes(self),
            "duration": asdict(self.duration) if self.duration else None,
            "data": [asdict(one) for one in self.supplies],
            "proposals": proposals,
            "gaps": self.gaps,
        }

    def _depth_as_dict(self, one: Traced) -> dict[str, Any]:
        return {
            "name": one.depth.name,
            "num_steps": one.depth.num_steps,
            "peak_bytes": one.need.peak,
            "with_reserve_bytes": one.need.reserved,
            "moment": one.need.moment,
            "parts": one.need.parts,
            "saved_activations": one.need.saved,
            "saved_on_host": one.need.saved_on_host,
            "flops": executed(one.flops, self.run.seq_len),
            "collectives": {name: it._asdict() for name, it in one.collectives.items()},
        }

    def _proposal_as_dict(self, one: Proposal) -> dict[str, Any]:
        return {
            "arguments": one.change.arguments,
            "says": one.change.says,
            "fits": one.fits,
            "peak_bytes": one.need.peak,
            "headroom_bytes": one.need.headroom(self.card),
            "work": one.work,
        }

    def text(self) -> str:
        return "\n\n".join(self._sections())

    def _sections(self) -> Iterator[str]:
        yield _table("run", self._run())
        yield self._memory()
        yield self._verdict()
        if self.proposals:
            yield self._proposals()
        yield _table("host memory and disk", self._host_and_disk())
        yield self._flops()
        yield _table("time", self._time())
        yield self._collectives()
        if self.gaps:
            yield "could not be planned:\n" + "\n".join(f"  {gap}" for gap in self.gaps)

    def _run(self) -> Rows:
        run, config = self.run, self.config
        rows: Rows = [
            ("model", f"{run.spec.name} {config.model.flavor}, {run.count_parameters():,} parameters"),
            *(tuple(line.split(": ", 1)) for line in run.report() if ": " in line),
            ("steps", f"{config.training.steps:,}, {total_tokens(config, run):,} tokens"),
        ]
        for one in self.supplies:
            counts = {"files": one.files, "rows": one.rows}
            known = [f"{count:,} {what}" for what, count in counts.items() if count is not None]
            epochs = [] if one.epochs is None else [f"{one.epochs:.2f} epochs"]
            rows.append((f"data: {one.name}", "; ".join([*known, *epochs, one.note])))
        return rows

    def _memory(self) -> str:
        """A column a depth. What lives at the moment at which most does, and not the most of each."""
        depths = self.measured.depths
        labels = list(dict.fromkeys(label for one in depths for label in one.need.parts))
        rows: Rows = [(label, *(_gib(one.need.parts.get(label, 0)) for one in depths)) for label in labels]
        rows.append(("at most, in " + depths[0].need.moment, *(_gib(one.need.peak) for one in depths)))
        rows.append(
            (
                f"with {RUNTIME_GIB:g} GiB of the runtime and {FRAGMENTATION:.0%} of fragments",
                *(_gib(one.need.reserved) for one in depths),
            )
        )
        rows.append(("activations that forward leaves", *(_gib(one.need.saved) for one in depths)))
        headers = ("memory of a GPU, GiB", *(_named(one) for one in depths))
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", *("right" for _ in depths)))

    def _verdict(self) -> str:
        left = self.measured.worst.headroom(self.card)
        card = f"{self.card.name} ({self.card.memory_gib:g} GiB; {self.card.source})"
        if self.fits:
            return f"fits {card}: {_gib(left)} GiB are left"
        return f"DOES NOT FIT {card}: {_gib(-left)} GiB are missing"

    def _proposals(self) -> str:
        rows = [
            (
                "yes" if one.fits else "no",
                _gib(one.need.reserved),
                f"{one.work:.3f}",
                one.change.arguments,
                one.change.says,
            )
            for one in self.proposals
        ]
        return tabulate(rows, ("fits", "GiB", "FLOPs x", "with", "what it does"), disable_numparse=True)

    def _host_and_disk(self) -> Rows:
        host, disk = host_bytes(self), checkpoint_bytes(self)
        rows: Rows = [(name, f"{_gib(size)} GiB a GPU") for name, size in host.items() if size]
        rows.append(("all of it on a node", f"{_gib(sum(host.values()) * self.gpus_per_node)} GiB"))
        if not self.config.checkpoint.enable:
            return [*rows, ("checkpoints", "none: checkpoint.enable is false")]
        kept = "all" if disk["kept"] is None else f"{disk['kept']} at most"
        free = "" if disk["free_bytes"] is None else f"; free there now: {_gib(disk['free_bytes'])} GiB"
        saves = f"{disk['saves']} of them in the run"
        if self.config.checkpoint.interval_type == "seconds":
            saves = "how many is not known: pass --gpu_tflops" if disk["saves"] is None else f"about {saves}"
        room = "not known"
        if disk["peak_bytes"] is not None:
            room = f"{_gib(disk['kept_bytes'])} GiB, and {_gib(disk['peak_bytes'])} while one is written"
        rows.append(("a checkpoint", f"{_gib(disk['bytes'])} GiB, {saves}"))
        rows.append(("kept", f"{kept}: {room}{free}"))
        if None not in (disk["free_bytes"], disk["peak_bytes"]) and disk["free_bytes"] < disk["peak_bytes"]:
            rows.append(("", "NOT ENOUGH here; elsewhere, look at job.dump_folder's own disk"))
        return rows

    def _flops(self) -> str:
        depths = self.measured.depths
        by_pass = [executed(one.flops, self.run.seq_len) for one in depths]
        names = list(dict.fromkeys(name for passes in by_pass for name in passes))
        rows: Rows = [
            (name, *(_share(passes.get(name, 0.0), passes) for passes in by_pass)) for name in names
        ]
        rows.append(("PFLOP a GPU and step", *(f"{sum(passes.values()) / 1e15:.3f}" for passes in by_pass)))
        headers = ("FLOPs of a step", *(one.depth.name or "share" for one in depths))
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", *("right" for _ in depths)))

    def _time(self) -> Rows:
        if self.duration is None:
            return [("step", "not known: pass --gpu_tflops")]
        took = self.duration
        depth = "" if self.depths.mean is None else " at the mean depth"
        if self.run.draws.own_depths and depth:
            depth += " of each update's deepest rank"
        return [
            ("MFU", f"{took.pace.mfu:.1%} ({took.pace.source})"),
            ("step", f"{took.seconds:.2f} s{depth}"),
            ("tokens", f"{took.tokens_per_second:,.0f} a second"),
            ("run", f"{took.days:.2f} days, {took.days * 24 * self.run.dims.world_size:,.0f} GPU hours"),
        ]

    def _collectives(self) -> str:
        one = max(self.measured.depths, key=lambda traced: sum(traced.flops.values()))
        rows = [(name, it.calls, f"{it.bytes / GIB:.3f}") for name, it in sorted(one.collectives.items())]
        return tabulate(rows, ("collectives of a step", "calls", "GiB of whole messages"))


def host_bytes(plan: Plan) -> dict[str, int]:
    """Of one rank in host memory, beside the program itself."""
    measured = plan.measured
    shards = measured.parameters + measured.gradients + measured.optimizer
    return {
        "shards (enable_cpu_offload)": shards if plan.config.training.enable_cpu_offload else 0,
        "activations (offload)": max(one.need.saved_on_host for one in measured.depths),
        "a checkpoint that is being written": staging_bytes(plan.config, measured),
    }


def checkpoint_bytes(plan: Plan) -> dict[str, Any]:
    """bytes: of one, on disk, in float32 with the optimizer's state. saves: None: not known. kept: None: all.
    kept_bytes: of those that stay. peak_bytes: while one is written, since the oldest goes only after that;
    None: not known.
    """
    keys = plan.config.checkpoint
    per_parameter = 4 * (1 + plan.measured.optimizer / plan.measured.parameters)
    size = round(plan.run.count_parameters() * per_parameter)
    saves, kept = _saves(plan), keys.keep_latest_k or None

    def at_most(number: int | None) -> int | None:
        known = [one for one in (saves, number) if one is not None]
        return size * min(known) if known else None

    folder = Path(plan.config.job.dump_folder).resolve()
    there = next((one for one in (folder, *folder.parents) if one.is_dir()), None)
    return {
        "bytes": size,
        "saves": saves,
        "kept": kept,
        "kept_bytes": at_most(kept),
        "peak_bytes": at_most(None if kept is None else kept + 1),
        "free_bytes": None if there is None else shutil.disk_usage(there).free,
    }


def _saves(plan: Plan) -> int | None:
    """How many checkpoints the run writes. None where that depends on the time of a step, which is not
    known.
    """
    keys, steps = plan.config.checkpoint, plan.config.training.steps
    if not keys.enable:
        return 0
    interval = keys.interval
    if keys.interval_type == "seconds":
        if plan.duration is None:
            return None
        # It is asked after each step whether a save is due.
        interval = math.ceil(interval / (plan.duration.days * SECONDS_A_DAY / steps))
    return math.ceil(steps / interval)


def _named(traced: Traced) -> str:
    depth = traced.depth
    return f"{depth.name} {depth.num_steps}" if depth.name else "GiB"


def _share(count: float, passes: dict[str, float]) -> str:
    return f"{count / sum(passes.values()):.1%}"


def _table(head: str, rows: Rows) -> str:
    return tabulate(rows, (head, ""), disable_numparse=True)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
