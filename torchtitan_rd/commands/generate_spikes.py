"""Continues recordings of neurons with a model of spikes, and writes an .npz file of ids and,
if wanted, a raster.

torchtitan-rd generate-spikes outputs/rodent_8B_131k --dataset rodent --split test --data-idx 11 --ctx-t 10
torchtitan-rd generate-spikes outputs/rodent_8B_131k --unconditional --n-neurons 100 --gen-t 29 --raster

docs/inference.md describes it.
"""

import argparse
import sys
from pathlib import Path

from torchtitan_rd.commands.generate import (
    add_model_arguments,
    add_recurrent_arguments,
    add_sampling_arguments,
    load,
    settings_of,
)
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import generate
from torchtitan_rd.inference.ranks import over_ranks, process_group
from torchtitan_rd.inference.spikes import (
    bins_of,
    conditional,
    counts_of,
    ids_of,
    raster,
    save,
    unconditional,
)
from torchtitan_rd.job import Environment


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    environment = Environment.read()
    loaded = load(chosen, environment)
    if loaded.source.kind not in ("spikes", None):
        raise ConfigError(f"{chosen.path} was trained on {loaded.source.kind}: use torchtitan-rd generate")

    separator = loaded.source.vocab_size - 1
    if chosen.unconditional:
        prompt = unconditional(chosen.n_neurons, chosen.seed)
    else:
        prompt = conditional(
            chosen.dataset,
            path=chosen.dataset_path,
            split=chosen.split,
            index=chosen.data_idx,
            ctx_t=chosen.ctx_t,
            gen_t=chosen.gen_t,
            vocab_size=loaded.source.vocab_size,
            seed=chosen.seed,
        )

    # Whole time bins: one token a neuron and one that ends the bin.
    chosen.max_new_tokens = chosen.gen_t * (prompt.neurons + 1)
    settings, _ = settings_of(chosen)
    ids = ids_of(prompt.counts, separator)
    constraint = bins_of(prompt.neurons, separator, loaded.shape.vocab_size)
    with process_group(environment):
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchtitan-rd generate-spikes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="step folder, run's folder, or Hugging Face folder")
    add = parser.add_argument_group("recording").add_argument
    add("--dataset", default="rodent", help="a data set of spikes (docs/data.md)")
    add("--dataset-path", help="where to read it instead")
    add("--split", default="test")
    add("--data-idx", type=int, default=0, help="row")
    add("--ctx-t", type=int, default=10, help="time bins of the prompt")
    add("--gen-t", type=int, default=10, help="time bins to generate")
    add(
        "--unconditional",
        action="store_true",
        help="no recording: a tenth of the neurons spike in the first bin",
    )
    add("--n-neurons", type=int, default=100, help="with --unconditional")

    add_sampling_arguments(parser, temperature=1.0, told="default 1")

    add_recurrent_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--batch-size", type=int, default=1, help="samples")
    add("--out", default=".", help="folder")
    add("--raster", action="store_true", help="a PNG beside the file (needs the extra `plots`)")
    parser.set_defaults(tokenizer="none", stop=[], ignore_eos=True, depths=None)
    return parser
