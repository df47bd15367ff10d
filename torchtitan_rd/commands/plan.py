"""Shows what a run takes before it is queued: memory of a GPU by what it belongs to, host memory, disk,
FLOPs, time, and, where it does not fit, what would make it. No GPU is needed; it takes seconds.

torchtitan-rd plan train_configs/primate_8b_131k.toml --num_gpus 144 --gpu gh200-96
torchtitan-rd plan X.toml --num_gpus 8 --gpu h100-80 --training.mlp_tile_tokens 2048   # keys of the config
torchtitan-rd plan X.toml --num_gpus 8 --gpu_memory_gb 48 --gpu_tflops 181 --mfu 0.35
torchtitan-rd plan X.toml --num_gpus 144 --gpu gh200-96 --calibrate outputs/run --json    # for programs

Status 0 if it fits, 2 if not, 1 for a mistake. docs/planning.md says how to read it.
"""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from torchtitan_rd.commands.arguments import at_least_1
from torchtitan_rd.config import load_and_warn
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.planning.cards import CARDS, find_card
from torchtitan_rd.planning.compute import read_pace, stated_pace
from torchtitan_rd.planning.making import make_plan, on_gpus
from torchtitan_rd.run_plan import fewest_ranks

DOES_NOT_FIT = 2


def main(arguments: list[str]) -> int:
    chosen, keys = _parser().parse_known_args(arguments)
    card = find_card(chosen.gpu, chosen.gpu_memory_gb, chosen.gpu_tflops)
    if chosen.calibrate and chosen.mfu is not None:
        raise ConfigError("--mfu and --calibrate both say how fast it is: pass one")
    pace = read_pace(Path(chosen.calibrate)) if chosen.calibrate else stated_pace(chosen.mfu)

    environment = Environment.read()
    if chosen.num_gpus is not None:
        environment = on_gpus(environment, chosen.num_gpus)
    loaded = load_and_warn([*(["--job.config_file", chosen.file] if chosen.file else []), *keys], environment)
    if chosen.num_gpus is None and environment.world_size == 1:
        environment = on_gpus(environment, fewest_ranks(loaded.config.parallelism))

    plan = make_plan(
        loaded.config,
        environment,
        card,
        pace,
        propose=not chosen.no_proposals,
        gpus_per_node=min(chosen.gpus_per_node, environment.world_size),
    )
    print(json.dumps(plan.as_dict(), indent=1) if chosen.json else plan.text())
    return 0 if plan.fits else DOES_NOT_FIT


class _Parser(argparse.ArgumentParser):
    """Status 2 of argparse says here that a run does not fit: a mistake must not look like it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists them")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchtitan-rd plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", nargs="?", help="the TOML of the run; other arguments are its keys, as --section.key value")
    add("--num_gpus", type=at_least_1, help="default: as few as [parallelism] allows")
    add("--gpu", help=f"one of {', '.join(CARDS)}")
    add("--gpu_memory_gb", type=float, metavar="GIB", help="that a program can have, in place of the card's")
    add("--gpu_tflops", type=float, help="dense bfloat16 peak in 1e12 FLOP/s, in place of the card's")
    add("--mfu", type=float, help="share of the peak that the model's own FLOPs take (default 0.4, a guess)")
    add("--calibrate", metavar="RUN", help="dump_folder of a run whose measured MFU to take")
    add("--gpus_per_node", type=at_least_1, default=4, help="for the host memory of a node (default 4)")
    add("--no_proposals", action="store_true", help="do not try what would make it fit")
    add("--json", action="store_true", help="as one JSON object, in bytes, FLOPs and seconds")
    return parser
