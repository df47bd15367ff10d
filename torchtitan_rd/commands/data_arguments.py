"""Arguments that several actions of `torchtitan-rd data` have in common."""

import argparse
from dataclasses import fields
from typing import Any

from torchtitan_rd.data.chat import ROLES
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.conversations import CHAT_COLUMN
from torchtitan_rd.preparation.inputs import InputKeys


def given_for(settings: type, chosen: argparse.Namespace) -> dict[str, Any]:
    """The flags that are called as the fields of a dataclass."""
    return {field.name: getattr(chosen, field.name) for field in fields(settings) if field.name in chosen}


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
    parser.add_argument("--column", help="the column that holds the text (default: text) or the messages")
    parser.add_argument(
        "--chat",
        action="store_true",
        help=f"rows are conversations: lists of messages of {', '.join(ROLES)} (default column: "
        f"{CHAT_COLUMN})",
    )
    parser.add_argument("--question-column", help="of conversations of one question and its answer")
    parser.add_argument("--answer-column", help="the column of the answer")

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
    """Raises ConfigError for a weight that is none, and for columns that do not fit together."""
    weights = {name: number(value, "--weight") for name, value in pairs(chosen.weight, "--weight").items()}
    return InputKeys(
        chosen.inputs,
        chosen.column or "text",
        chosen.subset,
        chosen.split,
        chosen.revision,
        weights,
        _chat_columns(chosen),
    )


def columns_for_recipe(keys: InputKeys) -> dict[str, Any]:
    """What of the inputs' columns decides the result."""
    return {"column": list(keys.chat_columns) if keys.chat_columns else keys.column}


def _chat_columns(chosen: argparse.Namespace) -> tuple[str, ...]:
    of_answers = (chosen.question_column, chosen.answer_column)
    if of_answers == (None, None):
        return (chosen.column or CHAT_COLUMN,) if chosen.chat else ()
    if None in of_answers or chosen.column or not chosen.chat:
        raise ConfigError(
            "--question-column and --answer-column belong together, with --chat and without --column"
        )
    return of_answers


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
