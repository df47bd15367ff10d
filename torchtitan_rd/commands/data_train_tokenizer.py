"""Trains a byte-level BPE tokenizer on text and writes a folder that transformers loads.

torchtitan-rd data train-tokenizer corpus.jsonl --vocab-size 4096 --output tokenizer
torchtitan-rd data train-tokenizer staging --output tokenizer --chat-template huginn \\
    --special '<|my_token|>=65400'

docs/preparation.md describes it.
"""

import argparse
from pathlib import Path

import tokenizers

from torchtitan_rd.commands.data_arguments import (
    add_inputs,
    columns_for_recipe,
    given_for,
    input_keys,
    pairs,
)
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.documents import Documents
from torchtitan_rd.preparation.inputs import open_inputs
from torchtitan_rd.preparation.manifest import Output, Recipe
from torchtitan_rd.preparation.tokenizer_training import LAYOUTS, REGEXES, Wanted, train_tokenizer


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    wanted = Wanted(**given_for(Wanted, chosen) | {"special": _specials(chosen.special)})
    if chosen.max_characters is not None and chosen.max_characters < 1:
        raise ConfigError(f"--max-characters {chosen.max_characters}: must be at least 1")
    decided = wanted.arguments()  # a mistake in them is found before the text is read

    keys = input_keys(chosen)
    inputs = open_inputs(keys, Path(chosen.output))
    documents = Documents(inputs.sources, chosen.seed)
    recipe = Recipe(
        "train-tokenizer",
        decided
        | columns_for_recipe(keys)
        | {
            "seed": chosen.seed,
            "weight": [source.weight for source in inputs.sources],
            "max-characters": chosen.max_characters,
        },
        inputs.contents,
        libraries={"tokenizers": tokenizers.__version__},
    )
    output = Output.open(Path(chosen.output), recipe)
    manifest = train_tokenizer(documents, wanted, output, chosen.max_characters)
    _print(manifest, wanted)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data train-tokenizer", __doc__, allow_abbrev=False)
    add_inputs(parser)
    parser.add_argument("--vocab-size", type=int, default=65536, help="of all tokens (default: 65536)")
    parser.add_argument("--regex", default="gpt4-digits", help=f"how words are cut: {', '.join(REGEXES)}")
    parser.add_argument("--max-token-length", type=int, default=32, help="bytes (default: 32)")
    parser.add_argument("--min-frequency", type=int, default=2, help="of a pair that is merged (default: 2)")
    parser.add_argument(
        "--layout", default="huginn", help=f"special tokens, as the last ids: {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--special", action="append", default=[], metavar="NAME=ID", help="one more, pinned")
    for role in ("bos", "eos", "pad"):
        parser.add_argument(f"--{role}", metavar="NAME", help=f"the special token that is {role}, or none")
    parser.add_argument("--chat-template", default="none", help="huginn, chatml, none, or a file")
    parser.add_argument("--max-characters", type=int, help="of each document (default: all)")
    return parser


def _specials(given: list[str]) -> dict[str, int]:
    specials = {}
    for name, value in pairs(given, "--special").items():
        if not value.isdecimal():
            raise ConfigError(f"--special {name}={value}: the id is no whole number")
        specials[name] = int(value)
    return specials


def _print(manifest: dict, wanted: Wanted) -> None:
    print(f"{wanted.vocab_size} tokens, {len(manifest['specials'])} of them special")
    for role, name in wanted.roles().items():
        print(f"{role:<10} {name} {manifest['specials'][name]}")
    size, tokens = manifest["checked_bytes"], manifest["checked_tokens"]
    print(
        f"{manifest['checked_documents']} documents were encoded and decoded without a difference: "
        f"{size:,} bytes, {tokens:,} tokens, {size / tokens:.2f} bytes a token"
    )
