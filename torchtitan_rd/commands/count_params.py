"""Counts the parameters of a model, as training counts them: in all, without the input embedding, by part.

torchtitan-rd count-params aixsim                               # all of its flavors
torchtitan-rd count-params aixsim 60M
torchtitan-rd count-params --model_arch raven --model_flavor nebel-raven-3.5b --depths 1,8,32

A matrix that is embedding and head at once (tied) counts once, and not as an input embedding, since it
multiplies too. Unfolded: of the model without a recurrence that runs as many blocks. docs/commands.md.
"""

import argparse
import dataclasses
from typing import Any

from tabulate import tabulate

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.models.counting import ParameterCount, count_parameters


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    family, flavor = _named(chosen)
    spec = get_spec(family)
    depths = _depths(chosen.depths, spec)
    names = [flavor] if flavor else list(spec.flavors)

    counts = {name: count_parameters(spec, _shape(spec, name, chosen.vocab_size)) for name in names}
    if flavor is None:
        rows = [(name, *_sums(count, depths).values()) for name, count in counts.items()]
        print(_table(rows, ("flavor", *_sums(counts[names[0]], depths))))
    else:
        print(_table([*counts[flavor].parts.items()], ("part", "parameters")) + "\n")
        print(_table([*_sums(counts[flavor], depths).items()], ("", "parameters")))
    return 0


def _sums(count: ParameterCount, depths: list[int]) -> dict[str, int]:
    """What is counted -> parameters. Without depths a recurrent model is unfolded to its own mean."""
    sums = {"total": count.total, "without input embedding": count.without_input_embedding}
    if count.mean_depth is not None and not depths:
        return sums | {"unfolded to its mean depth": count.unfolded(count.mean_depth)}
    return sums | {f"unfolded to depth {depth}": count.unfolded(depth) for depth in depths}


def _table(rows: list[Any], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers=headers, intfmt=",")


def _shape(spec: ModelSpec, flavor: str, vocab_size: int | None) -> Any:
    shape = get_flavor(spec, flavor)
    return shape if vocab_size is None else dataclasses.replace(shape, vocab_size=vocab_size)


def _named(chosen: argparse.Namespace) -> tuple[str, str | None]:
    """Family and flavor, from either way to name them."""
    found = []
    for what in ("arch", "flavor"):
        places = [getattr(chosen, what), getattr(chosen, f"model_{what}")]
        given = [name for name in places if name is not None]
        if len(given) > 1:
            raise ConfigError(f"--model_{what} {given[1]}: {given[0]} is named already; give one of them")
        found.append(given[0] if given else None)
    return found[0] or "aixsim", found[1]


def _depths(text: str | None, spec: ModelSpec) -> list[int]:
    if text is None:
        return []
    if spec.inputs is None:
        raise ConfigError(f"--depths {text}: a {spec.name} has no recurrence to unfold; leave it out")
    try:
        depths = [int(depth) for depth in text.split(",")]
    except ValueError:
        depths = [0]
    if min(depths) < 1:
        raise ConfigError(f"--depths {text}: numbers of iterations from 1, as in 1,8,32")
    return depths


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("count-params", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("arch", nargs="?", help="model family (default aixsim)")
    add("flavor", nargs="?", help="its size (default: a line for each)")
    add("--model_arch", help="the same as ARCH")
    add("--model_flavor", help="the same as FLAVOR")
    add("--vocab_size", type=int, help="ids of the vocabulary (default: the flavor's)")
    add("--depths", help="recurrent models: iterations to unfold to, as in 1,8,32 (default: the mean)")
    return parser
