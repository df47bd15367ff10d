"""From a config to its plan."""

from dataclasses import dataclass, replace

from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import BatchKeys, DatasetKeys
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.planning.cards import Card
from torchtitan_rd.planning.compute import Pace, duration, total_tokens
from torchtitan_rd.planning.draws import depths_of
from torchtitan_rd.planning.memory import measure
from torchtitan_rd.planning.proposals import Trials
from torchtitan_rd.planning.report import Plan
from torchtitan_rd.planning.supply import supplies
from torchtitan_rd.run_plan import RunPlan, resolve
from torchtitan_rd.validation import ValidationConfig


@dataclass(frozen=True)
class Resolved:
    """config: what is planned. gaps: what of the data hides, so that another took its place."""

    config: JobConfig
    plan: RunPlan
    gaps: list[str]


def make_plan(
    config: JobConfig, environment: Environment, card: Card, pace: Pace, *, propose: bool, gpus_per_node: int
) -> Plan:
    """propose: try what would make it fit, if it does not. Raises ConfigError with every contradiction that
    is not about data.
    """
    resolved = resolve_without_data(config, environment)
    config, run, gaps = resolved.config, resolved.plan, list(resolved.gaps)
    gaps += _left_out(config)

    depths = depths_of(run, config.training.steps)
    measured = measure(config, run, depths.chosen)
    took = duration(config, run, depths, card, pace)
    rows = total_tokens(config, run) // run.seq_len
    found = [] if resolved.gaps else supplies(config, run, rows)

    proposals = []
    worst = max(measured.depths, key=lambda traced: traced.need.peak)
    if propose and worst.need.headroom(card) < 0:
        proposals = Trials(config, run, environment, worst, card).propose()
    return Plan(config, run, depths, measured, card, took, found, proposals, gaps, gpus_per_node)


def resolve_without_data(config: JobConfig, environment: Environment) -> Resolved:
    """As training resolves it; where only the data or its tokenizer stand in the way, with made data in their
    place. Raises ConfigError.
    """
    try:
        return Resolved(config, resolve(config, environment), [])
    except ConfigError as error:
        problems = str(error)
    gaps = [f"the data: {line}" for line in problems.splitlines()]
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        shape = get_flavor(get_spec(config.model.name), config.model.flavor, config.model.overrides)
        vocab_size = shape.vocab_size
        gaps.append(f"its vocabulary: the flavor's {vocab_size} is planned")

    own = set(BatchKeys.model_fields) | {"seq_len"}
    made = {
        name: field.get_default(call_default_factory=True)
        for name, field in DatasetKeys.model_fields.items()
        if name not in own
    }
    made |= {"dataset": "synthetic", "token_weights": None}
    stand_in = config.model_copy(
        update={
            "training": config.training.model_copy(update=made),
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "validation": ValidationConfig(),
        }
    )
    try:
        return Resolved(stand_in, resolve(stand_in, environment), gaps)
    except ConfigError as error:
        if str(error) in problems or not set(str(error).splitlines()).isdisjoint(problems.splitlines()):
            raise ConfigError(problems) from None
        raise


def on_gpus(environment: Environment, number: int) -> Environment:
    """The environment of the first of so many ranks. Raises ConfigError."""
    if number < 1:
        raise ConfigError(f"--num_gpus {number}: must be at least 1")
    return replace(environment, rank=0, local_rank=0, world_size=number)


def _left_out(config: JobConfig) -> list[str]:
    gaps = []
    if config.compile.enable:
        gaps.append("memory under compile.enable: what is shown is that of plain code, which takes more")
    if config.training.document_mask:
        gaps.append("document_mask: memory is that of the plain mask; FLOPs are of all pairs, an upper bound")
    if config.validation.enable:
        gaps.append("validation: neither its time nor its memory, which is below training's")
    return gaps
