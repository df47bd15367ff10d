"""What this environment can do, what is missing, and the command that installs it.

torchtitan-rd doctor
torchtitan-rd doctor train_configs/primate_8b_131k.toml     # with the checkpoint of that run on its disk
torchrun --nproc_per_node 4 -m torchtitan_rd doctor         # and every rank: which one is slow or dead

ok: good. --: not to be had here, which not every run needs. !!: stands in the way of training; status 1.
Nothing is downloaded, and nothing stays on disk. docs/rehearsal.md describes it.
"""

import argparse
import socket
import textwrap
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

from torchtitan_rd.commands.arguments import at_least_1
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import load
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE
from torchtitan_rd.diagnosis import device, ranks, software, surroundings
from torchtitan_rd.diagnosis.finding import Finding, Mark
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.counting import count_parameters
from torchtitan_rd.run_plan import resolve_shape

WIDTH = 110


def main(arguments: list[str]) -> int:
    chosen, overrides = _parser().parse_known_args(arguments)
    environment = Environment.read()
    if overrides and chosen.config is None:
        raise ConfigError(f"doctor: {overrides[0]} overrides a key of a file, and none is named")
    place = environment.device()

    told = _ranks(environment, place, chosen.limit) if environment.world_size > 1 else None
    if environment.rank > 0:
        return 0
    folder, parameters = _run_of(chosen, overrides, environment)
    print(f"{socket.gethostname()}: what this environment can do\n")
    is_good = True
    if told is not None:
        print(_rank_table(told, environment.world_size, place))
        is_good = told.is_good

    sections = {
        "software": software.look_at_software,
        "devices": device.look_at_devices,
        "attention (bfloat16)": lambda: device.look_at_attention(place),
        "compiler": lambda: [device.look_at_compile(chosen.limit)],
        "data": lambda: [*surroundings.look_at_caches(), surroundings.look_at_hub(chosen.hub_seconds)],
        "disk": lambda: surroundings.look_at_disk(folder, parameters),
        "cluster": surroundings.look_at_cluster,
    }
    for name, look in sections.items():
        print(name, flush=True)  # before what takes its time
        found = look()
        print("\n".join(_shown(one) for one in found) + "\n", flush=True)
        is_good = is_good and all(one.mark is not Mark.WRONG for one in found)
    return int(not is_good)


def _ranks(environment: Environment, place: torch.device, limit: float) -> ranks.Findings | None:
    """On rank 0 what was found out; on the others nothing. Raises ConfigError without a store to reach."""
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"doctor: the ranks do not reach torchrun's store: {error}") from error
    return ranks.look_at_ranks(store, rank, world_size, place, limit, ranks.own_work)


def _rank_table(told: ranks.Findings, world_size: int, place: torch.device) -> str:
    rows: list[tuple[Any, ...]] = []
    for one in told.ranks:
        speed = ranks.bandwidth_of(one, world_size, place)
        first, last = (1e3 * one.seconds[0], 1e3 * one.seconds[-1]) if one.seconds else (None, None)
        rate = None if speed is None else speed / 1e9
        verdict = "SLOW" if one.rank in told.slow else "STUCK" if one.rank in told.stuck else ""
        rows.append((one.rank, one.host, one.device, 1e3 * one.work, first, last, rate, verdict))
    for rank in told.dead:
        rows.append((rank, "", "", None, None, None, None, "DEAD"))

    headers = ("rank", "host", "device", "own work ms", "first ms", "largest ms", "GB/s", "")
    # Gloo between processes of a busy CPU may move a megabyte a second, NCCL hundreds of gigabytes.
    formats = ("", "", "", ".2f", ".2f", ".2f", ".3g", "")
    table = tabulate(sorted(rows), headers=headers, floatfmt=formats, missingval="-")
    return "\n".join(
        [f"ranks ({world_size}): the same work on each alone, then all-reduces", table, *_verdicts(told)]
    )


def _verdicts(told: ranks.Findings) -> list[str]:
    """A sentence for each kind of trouble, and an empty line."""
    hosts = {one.rank: one.host for one in told.ranks}
    said = []
    if told.dead:
        said.append(f"!!  {_named(told.dead, hosts)} never answered: look at its node, or leave it out")
    if told.stuck:
        said.append(
            f"!!  {_named(told.stuck, hosts)} answered, and hung in the all-reduces: look at its network"
        )
    if told.slow:
        said.append(f"--  {_named(told.slow, hosts)} computes slower than {ranks.SLOW} times the median")
    if told.problem:
        said.append(f"!!  {told.problem}")
    return [*(said or ["ok  all ranks answer, add right, and compute alike"]), ""]


def _named(numbers: Sequence[int], hosts: Mapping[int, str]) -> str:
    names = [f"{rank} ({hosts[rank]})" if rank in hosts else str(rank) for rank in numbers]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _run_of(
    chosen: argparse.Namespace, overrides: list[str], environment: Environment
) -> tuple[Path, int | None]:
    """The folder whose disk is measured, and the parameters of the run if a file is named."""
    if chosen.config is None:
        return Path(chosen.folder or "."), None
    config = load(["--job.config_file", chosen.config, *overrides], environment).config
    spec = get_spec(config.model.name)
    shape = resolve_shape(config, spec, config.model.vocab_size or SPIKE_VOCAB_SIZE)
    return Path(chosen.folder or config.job.dump_folder), count_parameters(spec, shape).total


def _shown(one: Finding) -> str:
    text = one.found if not one.remedy else f"{one.found} -> {one.remedy}"
    return textwrap.fill(
        text, WIDTH, initial_indent=f"  {one.mark.value}  {one.what:<18}", subsequent_indent=" " * 24
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "doctor",
        __doc__,
        usage="%(prog)s [X.toml] [--folder DIR] [--limit SECONDS] [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="the file of a run, whose checkpoint is reckoned")
    parser.add_argument("--folder", help="whose disk is measured (default: the run's, or this one)")
    parser.add_argument(
        "--limit",
        type=at_least_1,
        default=120,
        help="seconds that ranks, and the compiler, may take (default 120)",
    )
    parser.add_argument("--hub-seconds", type=at_least_1, default=5, help="that the hub may take (default 5)")
    return parser
