"""Arguments that several actions of `torchtitan-rd data` have in common."""

import argparse

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.inputs import InputKeys


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """What documents are read from."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a file, folder or pattern of .txt, .jsonl, .parquet or .arrow, a folder of `data download`, "
        "or the name of a repository on the Hugging Face hub",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the result is written")
    parser.add_argument("--column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--subset", help="of a repository on the hub")
    parser.add_argument("--split", default="train", help="of the inputs (default: train)")
    parser.add_argument("--revision", help="commit, branch or tag of a repository on the hub")
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="how often the documents of an input count: 2.5 is twice, and half of them once more",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")


def input_keys(chosen: argparse.Namespace) -> InputKeys:
    """Raises ConfigError for a weight that is none."""
    weights = {name: number(value, "--weight") for name, value in pairs(chosen.weight, "--weight").items()}
    return InputKeys(chosen.inputs, chosen.column, chosen.subset, chosen.split, chosen.revision, weights)


def pairs(given: list[str], flag: str) -> dict[str, str]:
    """`NAME=VALUE` as a dict; the name may hold `=` too."""
    found = {}
    for one in given:
        name, equals, value = one.rpartition("=")
        if not (name and equals):
            raise ConfigError(f"{flag} {one!r}: expected NAME=VALUE")
        found[name] = value
    return found


def number(value: str, flag: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{flag}: {value!r} is no number") from None
