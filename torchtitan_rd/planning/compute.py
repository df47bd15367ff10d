"""How long a step and a run take, and what they do meanwhile."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torchtitan_rd.config import JobConfig
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.metrics.read import read_run
from torchtitan_rd.planning.cards import Card
from torchtitan_rd.planning.draws import Depths
from torchtitan_rd.run_plan import RunPlan

ASSUMED_MFU = 0.4
SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Pace:
    """mfu: share of the peak that a model's own FLOPs take, pairs that a causal mask leaves counted once and
    recomputation not at all (`mfu_causal` of a run's metrics). source: where it is from.
    """

    mfu: float
    source: str


@dataclass(frozen=True)
class Duration:
    """seconds: of a step of mean depth. tokens_per_second: of all GPUs."""

    seconds: float
    days: float
    tokens_per_second: float
    pace: Pace


def read_pace(folder: Path) -> Pace:
    """From what a run has measured: the median of the later half of its rows. Raises ConfigError."""
    _, values = read_run(folder).series("mfu_causal")
    later = values[len(values) // 2 :]
    if not later:
        raise ConfigError(
            f"--calibrate {folder}: its rows have no mfu_causal, as on a CPU or a card of unknown peak "
            "(metrics.peak_tflops); name another run, or pass --mfu"
        )
    return Pace(median(later), f"measured in {folder}, median of {len(later)} rows")


def stated_pace(mfu: float | None) -> Pace:
    """Raises ConfigError."""
    if mfu is None:
        return Pace(ASSUMED_MFU, "assumed; pass --mfu or --calibrate RUN")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: a share of the peak, above 0 and at most 1")
    return Pace(mfu, "as given")


def model_flops(plan: RunPlan, depths: Depths) -> float:
    """Of all ranks in a full step, without recomputation, if all go at the mean pace."""
    count = plan.spec.flops(plan.shape, plan.seq_len, num_steps=depths.mean)
    return plan.tokens_per_step * (count.matmul + count.attention_causal)


def total_tokens(config: JobConfig, plan: RunPlan) -> int:
    """Of the whole run, whose first steps are smaller where the batch grows."""
    ramp = min(plan.batch.ramp_steps, config.training.steps)
    rows = sum(plan.batch.rows_at(step) for step in range(1, ramp + 1))
    return (rows + (config.training.steps - ramp) * plan.batch.global_batch_size) * plan.seq_len


def duration(config: JobConfig, plan: RunPlan, depths: Depths, card: Card, pace: Pace) -> Duration | None:
    """None where the card's peak is not known."""
    if card.tflops is None:
        return None
    seconds = model_flops(plan, depths) / (plan.dims.world_size * card.tflops * 1e12 * pace.mfu)
    steps = total_tokens(config, plan) / plan.tokens_per_step
    return Duration(seconds, seconds * steps / SECONDS_A_DAY, plan.tokens_per_step / seconds, pace)


def executed(flops: dict[tuple[str, str], float], seq_len: int) -> dict[str, float]:
    """Pass -> FLOPs of one rank, of attention the pairs that a causal mask leaves."""
    causal = (seq_len + 1) / (2 * seq_len)
    sums: dict[str, float] = {}
    for (name, kind), count in flops.items():
        sums[name] = sums.get(name, 0.0) + count * (causal if kind == "attention" else 1.0)
    return sums
