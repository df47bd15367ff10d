"""Continues recordings of neurons with a model of spikes, and writes an .npz file of ids and,
if wanted, a raster.

torchtitan-rd generate-spikes outputs/rodent_8B_131k --dataset rodent --split test --data-idx 11 --ctx-t 10
torchtitan-rd generate-spikes outputs/rodent_8B_131k --unconditional --n-neurons 100 --gen-t 29 --raster

docs/inference.md describes it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from torchtitan_rd.commands.arguments import (
    add_model_arguments,
    add_path_arguments,
    add_recurrent_arguments,
    add_sampling_arguments,
    at_least_1,
    check_plots,
    device_of,
    refuse,
    settings_of,
)
from torchtitan_rd.commands.generate import load
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import generate
from torchtitan_rd.inference.ranks import over_ranks, process_group
from torchtitan_rd.inference.spikes import (
    SpikePrompt,
    bins_of,
    conditional,
    counts_of,
    ids_of,
    make_folder,
    raster,
    save,
    unconditional,
)
from torchtitan_rd.job import Environment

RECORDING = {"dataset": "rodent", "dataset_path": None, "split": "test", "data_idx": 0, "ctx_t": 10}
NEURONS = 100


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.unconditional:
        refuse(chosen, tuple(RECORDING), "with --unconditional")
    else:
        refuse(chosen, ("n_neurons",), "without --unconditional")
    check_plots(chosen, "raster")
    if chosen.seed < 0:
        raise ConfigError(f"--seed {chosen.seed} must be at least 0")
    make_folder(Path(chosen.out))
    settings, _ = settings_of(chosen)
    environment = Environment.read()
    device = device_of(chosen, environment)

    with process_group(environment, torch.device("cpu")):  # answers are small
        loaded = load(chosen, environment, device)
        if loaded.source.kind not in ("spikes", None):
            raise ConfigError(
                f"{chosen.path} was trained on {loaded.source.kind}: use torchtitan-rd generate"
            )
        prompt = _prompt(chosen, loaded.source.vocab_size)

        # Whole time bins: one token a neuron and one that ends the bin.
        settings = replace(settings, max_new_tokens=chosen.gen_t * (prompt.neurons + 1))
        separator = loaded.source.vocab_size - 1
        ids = ids_of(prompt.counts, separator)
        constraint = bins_of(prompt.neurons, separator, loaded.shape.vocab_size)
        settings.check(loaded, [ids])
        samples = over_ranks(
            chosen.batch_size,
            environment,
            lambda own: generate(loaded, [ids] * len(own), settings, numbers=own, constraint=constraint).rows,
        )

    for number, answer in enumerate(samples or []):
        suffix = f"-{number}" if chosen.batch_size > 1 else ""
        path = save(Path(chosen.out), prompt, answer.ids, chosen.gen_t, separator, suffix)
        print(path)
        if chosen.raster:
            raster(path.with_suffix(".png"), prompt, counts_of(answer.ids, separator))
            print(path.with_suffix(".png"))
        print(
            f"{len(answer.ids)} tokens for {chosen.gen_t} time bins of {prompt.neurons} neurons",
            file=sys.stderr,
        )
    return 0


def _prompt(chosen: argparse.Namespace, vocab_size: int) -> SpikePrompt:
    if chosen.unconditional:
        return unconditional(NEURONS if chosen.n_neurons is None else chosen.n_neurons, chosen.seed)
    given = {flag: getattr(chosen, flag) for flag in RECORDING}
    keys = RECORDING | {flag: value for flag, value in given.items() if value is not None}
    return conditional(
        keys["dataset"],
        path=keys["dataset_path"],
        split=keys["split"],
        index=keys["data_idx"],
        ctx_t=keys["ctx_t"],
        gen_t=chosen.gen_t,
        vocab_size=vocab_size,
        seed=chosen.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("generate-spikes", __doc__)
    add_path_arguments(parser)
    add = parser.add_argument_group("recording").add_argument
    add("--dataset", help=f"a data set of spikes (docs/data.md; default {RECORDING['dataset']})")
    add("--dataset-path", help="where to read it instead")
    add("--split", help=f"default {RECORDING['split']}")
    add("--data-idx", type=int, help="row (default 0)")
    add("--ctx-t", type=at_least_1, help=f"time bins of the prompt (default {RECORDING['ctx_t']})")
    add("--gen-t", type=at_least_1, default=10, help="time bins to generate (default 10)")
    add(
        "--unconditional",
        action="store_true",
        help="no recording: a tenth of the neurons spike in the first bin",
    )
    add("--n-neurons", type=at_least_1, help=f"with --unconditional (default {NEURONS})")

    add_sampling_arguments(parser, temperature=1.0, told="default 1")

    add_recurrent_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--batch-size", type=at_least_1, default=1, help="samples (default 1)")
    add("--out", default=".", help="folder")
    add("--raster", action="store_true", help="a PNG beside the file (needs the extra `plots`)")
    # The number of tokens follows from that of the neurons.
    parser.set_defaults(tokenizer="none", stop=[], ignore_eos=True, depths=None, max_new_tokens=1)
    return parser
