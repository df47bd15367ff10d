"""Continues a prompt, with the flags of the CLM tutorial; `torchtitan-rd generate` has more.

torchtitan-rd hf-gen exported-60M --prompt "London is" --max_new_tokens 100 --temperature 0.6
torchtitan-rd hf-gen --model_name exported-60M --do_sample false

MODEL is what `generate` takes: a Hugging Face folder, a step folder or the folder of a run. Text goes to
stdout, figures to stderr.
"""

import argparse

from torchtitan_rd.commands import generate
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError


def main(arguments: list[str]) -> int:
    return generate.main(translated(arguments))


def translated(arguments: list[str]) -> list[str]:
    """The arguments of `generate`."""
    chosen = _parser().parse_args(arguments)
    models = [name for name in (chosen.model, chosen.model_name) if name is not None]
    if len(models) != 1:
        raise ConfigError("hf-gen needs one model: MODEL, or --model_name MODEL")
    sampling = (
        ["--temperature", str(chosen.temperature), "--top-p", str(chosen.top_p), "--top-k", str(chosen.top_k)]
        if chosen.do_sample == "true"
        else ["--temperature", "0"]
    )

    optional = [
        part
        for flag in ("tokenizer", "dtype", "device")
        if (value := getattr(chosen, flag)) is not None
        for part in (f"--{flag}", value)
    ]
    length = ["--max-new-tokens", str(chosen.max_new_tokens), "--seed", str(chosen.seed)]
    return [models[0], "--prompt", chosen.prompt, *length, *sampling, *optional]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("hf-gen", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="the model")
    add("--model_name", "--model-name", metavar="MODEL", help="the same")
    add("--prompt", default="London is", help='default "London is"')
    add("--max_new_tokens", "--max-new-tokens", type=int, default=128, help="default 128")
    add("--do_sample", "--do-sample", choices=("true", "false"), default="true", help="false: greedy")
    add("--temperature", type=float, default=1.0, help="default 1")
    add("--top_p", "--top-p", type=float, default=0.9, help="default 0.9")
    add("--top_k", "--top-k", type=int, default=50, help="default 50")
    add("--seed", type=int, default=0, help="default 0")
    add("--tokenizer", "--tokenizer_name", help="instead of the one beside the model")
    add("--dtype", choices=tuple(generate.DTYPES), help="of the matrices (default: as stored)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    return parser
