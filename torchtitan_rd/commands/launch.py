"""Submits a run to Slurm, or prints what it would submit: a script with requeue, a signal before its end, and
what the run takes in its header. Long runs become a chain of jobs, each going on from the checkpoint before.

torchtitan-rd launch X.toml --profile arch-gh200 --nodes 36 --time 6:00:00 --dry_run
torchtitan-rd launch X.toml --profile arch-gh200 --nodes 36 --time 6:00:00 --chain 4 --training.steps 9000
torchtitan-rd launch X.toml --profile frontier-mi250x --nodes 64 --budget 2-00:00:00 --sbatch=--account=ABC123
torchtitan-rd launch X.toml --profile laptop                 # without Slurm: runs here

docs/launching.md describes profiles and chains.
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from torchtitan_rd.commands.arguments import at_least_1
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import load_and_warn
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.log import logger
from torchtitan_rd.planning.cards import GIB, find_card
from torchtitan_rd.planning.compute import SECONDS_A_DAY, stated_pace
from torchtitan_rd.planning.making import make_plan, on_gpus, resolve_without_data
from torchtitan_rd.planning.report import Plan, checkpoint_bytes
from torchtitan_rd.slurm import SIGNAL_SECONDS, Job, Profile, as_time, minutes_of, profiles, read_profile


def main(arguments: list[str]) -> int:
    """Prints the script (--dry_run) or the numbers of the jobs. Where there is no Slurm it does not come
    back: bash runs the script in place of this process.
    """
    chosen, keys = _parser().parse_known_args(arguments)
    profile = read_profile(chosen.profile)
    minutes = _minutes(chosen, profile)
    jobs = _jobs(chosen, minutes)

    plan = _plan(chosen, profile, keys)
    said = ["written by: torchtitan-rd launch " + shlex.join(arguments), *_estimate(plan, minutes, jobs)]
    if plan is not None and not plan.fits and not chosen.dry_run and not chosen.anyway:
        raise ConfigError(
            f"{said[1]}. `torchtitan-rd plan` says what would make it fit; --anyway submits it nevertheless"
        )

    job = Job(
        name=chosen.name or Path(chosen.file).stem,
        profile=profile,
        nodes=chosen.nodes,
        minutes=minutes,
        arguments=(chosen.file, *keys),
        folder=Path.cwd(),
        remarks=tuple(said),
        jobs=jobs,
        is_array=chosen.array,
        dependency=chosen.dependency,
        options=tuple(chosen.sbatch),
    )

    if chosen.dry_run:
        print(job.script(), end="")
        return 0
    for line in said[1:]:
        logger.info("%s", line)
    if not profile.has_slurm:
        _become(job.script())
    print("submitted: " + ", ".join(job.submit()))
    return 0


def _become(script: str) -> NoReturn:
    """Bash runs the script in place of this process, so that signals reach it: launch.sh knows what a Ctrl-C
    means, and Python in between would kill it.
    """
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and so would all that bash starts
    os.execvp("bash", ["bash", "-c", script])


def _minutes(chosen: argparse.Namespace, profile: Profile) -> int | None:
    """Of one job: --time, or the longest that the profile allows. None without Slurm. Raises ConfigError."""
    if not profile.has_slurm:
        given = [name for name in ("time", "chain", "budget", "dependency") if getattr(chosen, name)]
        if given or chosen.array or chosen.sbatch or chosen.nodes > 1:
            raise ConfigError(
                f"--profile {chosen.profile} runs on this machine, without Slurm: leave out --nodes, --time, "
                "--chain, --budget, --array, --dependency and --sbatch"
            )
        return None
    longest = profile.longest(chosen.nodes)
    minutes = chosen.time or longest
    if minutes is None:
        raise ConfigError(f"--time is missing, and profile {chosen.profile} knows no longest one")
    if longest is not None and minutes > longest:
        raise ConfigError(
            f"--time {as_time(minutes)}: profile {chosen.profile} allows {chosen.nodes} nodes "
            f"{as_time(longest)} a job. For longer runs pass --budget or --chain"
        )

    if minutes * 60 <= 2 * SIGNAL_SECONDS:
        raise ConfigError(
            f"--time {as_time(minutes)}: {SIGNAL_SECONDS // 60} minutes before its end a job saves and stops"
        )
    return minutes


def _jobs(chosen: argparse.Namespace, minutes: int | None) -> int:
    """How many follow each other. Raises ConfigError."""
    if chosen.chain and chosen.budget:
        raise ConfigError("--chain and --budget both say how many jobs follow each other: pass one")
    jobs = chosen.chain or (-(-chosen.budget // minutes) if chosen.budget and minutes else 1)
    if chosen.array and jobs == 1:
        raise ConfigError("--array has no effect on one job: pass --chain or --budget too")
    return jobs


def _plan(chosen: argparse.Namespace, profile: Profile, keys: list[str]) -> Plan | None:
    """None where the card or the number of GPUs is not known. Raises ConfigError for a wrong config."""
    environment = Environment.read()
    card = chosen.gpu or profile.card
    gpus = profile.gpus_per_node
    if gpus is not None:
        environment = on_gpus(environment, chosen.nodes * gpus)
    loaded = load_and_warn(["--job.config_file", chosen.file, *keys], environment)
    if (card is None and chosen.gpu_memory_gb is None) or gpus is None:
        if gpus is not None:  # nothing to plan for, but what contradicts itself is said now
            resolve_without_data(loaded.config, environment)
        return None
    return make_plan(
        loaded.config,
        environment,
        find_card(card, chosen.gpu_memory_gb, chosen.gpu_tflops),
        stated_pace(chosen.mfu),
        propose=False,
        gpus_per_node=gpus,
    )


def _estimate(plan: Plan | None, minutes: int | None, jobs: int) -> list[str]:
    if plan is None:
        return ["no estimate: the profile names no card or no number of GPUs of a node"]
    worst, card = plan.measured.worst, plan.card
    model, count = plan.config.model, plan.run.count_parameters()
    lines = [
        f"{model.name} {model.flavor}, {count:,} parameters, {plan.run.dims.world_size} x {card.name}: "
        f"{worst.reserved / GIB:.1f} of {card.memory_gib:.1f} GiB a GPU, "
        + ("fits" if plan.fits else "DOES NOT FIT")
    ]

    took = plan.duration
    if took is not None:
        lines.append(
            f"{plan.config.training.steps:,} steps, {took.seconds:.3g} s each at MFU {took.pace.mfu:.2f} "
            f"({took.pace.source}): {took.days * 24:.1f} h"
        )
    if took is not None and minutes is not None:
        needed = max(1, -(-int(took.days * SECONDS_A_DAY) // (minutes * 60 - SIGNAL_SECONDS)))
        lines.append(f"{jobs} of the {needed} jobs of {as_time(minutes)} that this takes")
    lines.append(f"a checkpoint: {checkpoint_bytes(plan)['bytes'] / 1e9:.1f} GB")
    return [*lines, *(f"could not be planned: {gap}" for gap in plan.gaps)]


def _time(text: str) -> int:
    try:
        return minutes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(text: str) -> str:
    if not text.startswith("-") or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no option of sbatch: want --sbatch=--NAME=VALUE")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("launch", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("file", help="the TOML of the run; other arguments are its keys, as --section.key value")
    add("--profile", required=True, help=f"one of {', '.join(profiles())}, or the path of another .sh file")
    add("--nodes", type=at_least_1, default=1)
    add("--time", type=_time, metavar="H:M:S", help="of one job (default: the longest the profile allows)")
    add("--chain", type=at_least_1, metavar="K", help="K jobs, each of which begins when the one before ends")

    add("--budget", type=_time, metavar="D-H:M:S", help="time in all, split into a chain of such jobs")
    add("--array", action="store_true", help="the chain as one job array, one task at a time")
    add("--dependency", metavar="KIND:JOB", help="of the first job, as sbatch takes it")
    add("--sbatch", action="append", default=[], type=_option, metavar="OPTION", help="a further option")
    add("--name", help="of the job (default: that of the file)")
    add("--gpu", help="the card, in place of the profile's")
    add("--gpu_memory_gb", type=float, metavar="GIB", help="that a program can have, in place of the card's")
    add("--gpu_tflops", type=float, help="dense bfloat16 peak in 1e12 FLOP/s, in place of the card's")
    add("--mfu", type=float, help="for the time (docs/planning.md)")
    add("--anyway", action="store_true", help="submit what does not fit, too")
    add("--dry_run", action="store_true", help="print the script, and submit nothing")
    return parser
