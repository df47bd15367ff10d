"""Loss against iterations and memory of the cache, under every exit criterion,
from one pass over held-out data.

torchtitan-rd pareto X.toml outputs/recurrent_debug
torchtitan-rd pareto X.toml CHECKPOINT --depth 32 --kv full,compress-s16 --target 8 --policy policy.toml
torchtitan-rd generate CHECKPOINT --depth 32 --exit-policy policy.toml --prompt "The"

The table is of tokens whose predecessors were given all iterations. --replay runs the chosen policy with all
tokens leaving early. docs/evaluation.md describes it. Further --section.key value override the TOML file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from torchtitan_rd.checkpoint.folders import STATE
from torchtitan_rd.commands.arguments import (
    at_least_1,
    check_outputs,
    check_plots,
    device_of,
    narrowed,
    refuse,
)
from torchtitan_rd.commands.eval_loss import write_json
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.evaluation import (
    check_context,
    check_depths,
    check_vocabulary,
    open_validation,
)
from torchtitan_rd.inference.exits import ExitPolicy
from torchtitan_rd.inference.loading import Loaded, load_model, open_weights
from torchtitan_rd.inference.pareto import (
    JUDGED,
    Outcome,
    Record,
    Windows,
    choose_policy,
    outcome,
    record,
    record_singly,
    replay,
    require_recurrence,
    thresholds_of,
    write_policy,
)
from torchtitan_rd.inference.pareto_chart import draw
from torchtitan_rd.inference.ranks import process_group
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.inference.stepper import resolve_depth, steps_of
from torchtitan_rd.job import Environment


class Row(NamedTuple):
    """criterion `fixed`: all tokens leave after as many iterations as the threshold says."""

    kv: str
    criterion: str
    threshold: float
    loss: float
    steps: float
    kv_bytes: float


def main(arguments: list[str]) -> int:
    chosen, overrides = _parser().parse_known_args(arguments)
    environment = Environment.read()
    if environment.world_size > 1:
        raise ConfigError("pareto runs on one rank: start it without torchrun")
    check_outputs(chosen, "policy", "png", "output")
    check_plots(chosen, "png")
    if chosen.target is None:
        refuse(chosen, ("policy", "criterion", "replay"), "without --target, the mean depth to aim at")

    elif not 1 <= chosen.target < float("inf"):
        raise ConfigError(
            f"--target: a policy cannot reach a mean depth of {chosen.target}: name one from 1 on"
        )

    strategies = list(dict.fromkeys(chosen.kv.split(",")))
    device = device_of(chosen, environment)
    loaded, windows = _open(chosen, overrides, environment, device, strategies)
    records = _records(loaded, windows, chosen, strategies)
    rows = [row for kv in strategies for row in rows_of(records[kv], kv, chosen.min_steps)]

    print(tabulate(_shown(rows), headers=Row._fields, floatfmt=("", "", ".4g", ".4f", ".2f", ".0f")))
    result: dict[str, Any] = {"checkpoint": chosen.checkpoint, "rows": [row._asdict() for row in rows]}
    if chosen.target is not None:
        result["chosen"] = [_choose(loaded, windows, chosen, kv, records[kv]) for kv in strategies]
    if chosen.png:
        draw(Path(chosen.png), rows)
    write_json(result, chosen.output)
    return 0


def rows_of(seen: Record, kv: str, min_steps: int = 1) -> list[Row]:
    """What every depth, and every criterion at every threshold, would have done under one strategy."""
    sharing = Sharing(kv, seen.core, seen.depth)
    rows = [
        Row(
            kv,
            "fixed",
            float(steps),
            float(seen.losses[steps - 1].mean(dtype="float64")),
            float(steps),
            float((sharing.written(steps) + seen.fixed_slots) * seen.position_bytes),
        )
        for steps in range(1, seen.depth + 1)
    ]
    for criterion in JUDGED:
        found: dict[Outcome, Row] = {}
        for threshold in thresholds_of(seen, criterion):
            result = outcome(seen, ExitPolicy(criterion, threshold, min_steps), kv)
            found.setdefault(result, Row(kv, criterion, threshold, *result))
        rows += sorted(found.values(), key=lambda row: row.steps)
    return rows


def _shown(rows: Sequence[Row]) -> list[Row]:
    """At most a dozen rows a criterion: the whole table is in --output."""
    shown = []
    for key in dict.fromkeys((row.kv, row.criterion) for row in rows):
        own = [row for row in rows if (row.kv, row.criterion) == key]
        places = {round(i * (len(own) - 1) / 11) for i in range(12)} if len(own) > 12 else range(len(own))
        shown += [own[place] for place in sorted(places)]
    return shown


def _open(
    chosen: argparse.Namespace,
    overrides: list[str],
    environment: Environment,
    device: torch.device,
    strategies: Sequence[str],
) -> tuple[Loaded, Windows]:
    config = load(["--job.config_file", chosen.config, *overrides], environment).config
    weights = open_weights(Path(chosen.checkpoint), model=config.model.name, flavor=chosen.flavor)
    require_recurrence(weights.spec)
    check_depths(weights.spec, [] if chosen.depth is None else [chosen.depth])
    check_context(weights.shape, config.training.seq_len)
    if config.training.document_mask:
        raise ConfigError("training.document_mask: pareto judges whole windows; set it to false")

    loaded = load_model(
        chosen.checkpoint,
        model=config.model.name,
        flavor=chosen.flavor,
        tokenizer_path="none",
        dtype=getattr(torch, config.training.mixed_precision_param),
        device=device,
    )

    steps = steps_of(loaded.spec, loaded.model)
    depth = resolve_depth(loaded.spec, steps.mean_depth, chosen.depth)
    for kv in strategies:
        Sharing(kv, steps.layout.core, depth)

    with process_group(environment, device):
        held_out = open_validation(
            narrowed(config.validation, chosen, config.training.dataset),
            config,
            environment,
            source=chosen.source_dataset,
            states=[Path(weights.origin) / STATE],
        )
    check_vocabulary(loaded.shape, held_out)
    return loaded, [(batch.inputs, batch.labels) for batch in held_out.batches]


def _records(
    loaded: Loaded, windows: Windows, chosen: argparse.Namespace, strategies: Sequence[str]
) -> dict[str, Record]:
    """One pass for all strategies that are exact, one for each of the others."""
    records, shared = {}, None
    core = steps_of(loaded.spec, loaded.model).layout.core
    for kv in strategies:
        if Sharing(kv, core, chosen.depth or 1).is_exact:
            shared = shared or record(loaded, windows, chosen.depth, seed=chosen.seed)
            records[kv] = shared
        else:
            records[kv] = record_singly(loaded, windows, kv, chosen.depth, seed=chosen.seed)
    return records


def _choose(
    loaded: Loaded, windows: Windows, chosen: argparse.Namespace, kv: str, seen: Record
) -> dict[str, Any]:
    criteria = [chosen.criterion] if chosen.criterion else JUDGED
    choice = choose_policy(seen, chosen.target, criteria, kv=kv, min_steps=chosen.min_steps)
    full = outcome(seen, ExitPolicy("none"), kv)
    policy, found = choice
    leaves = "from" if policy.rule.counts else "below"
    print(
        f"{kv}: {policy.criterion} {leaves} {policy.threshold:.6g}: "
        f"{found.steps:.2f} iterations of {seen.depth}, loss {found.loss:.4f} ({full.loss:.4f} with all)"
    )
    result = {"kv": kv, "criterion": policy.criterion, "threshold": policy.threshold, **found._asdict()}
    if chosen.replay:
        loss, steps = replay(loaded, windows, policy, kv, chosen.depth, seed=chosen.seed)
        print(f"{kv}: replayed with all tokens leaving early: {steps:.2f} iterations, loss {loss:.4f}")
        result |= {"replayed_loss": loss, "replayed_steps": steps}
    if chosen.policy and kv == chosen.kv.split(",")[0]:
        write_policy(Path(chosen.policy), policy, kv)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("pareto", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("config", help="TOML file of the run")
    add("checkpoint", help="step folder, run's folder, or Hugging Face folder")
    add("--depth", type=int, help="iterations at most (default: the model's mean)")
    add(
        "--kv",
        default="full",
        help="strategies of the cache, as in full,compress-s16; the mixing ones take longer",
    )
    add("--min-steps", type=at_least_1, default=1, help="iterations that every token gets")

    add("--target", type=float, help="mean depth to choose a threshold for")
    add(
        "--criterion",
        choices=JUDGED,
        help="the only one to choose from (default: the one with the lowest loss)",
    )
    add("--policy", help="write the choice for the first strategy there, for generate --exit-policy")
    add("--replay", action="store_true", help="run the choice token by token, all tokens leaving early")
    add("--png", help="draw the table there")
    add("--output", help="write the whole table there as JSON")

    add("--split", help="default: [validation] split")
    add("--sequences", type=at_least_1, help="default: [validation] sequences")
    add("--source-dataset", help="only rows whose column source_dataset holds this")
    add("--seed", type=int, default=0, help="of the first states")
    add("--flavor", help="the shape of a checkpoint that does not tell it")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    return parser
