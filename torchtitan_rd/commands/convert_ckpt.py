"""A checkpoint as a Hugging Face folder, which AutoModelForCausalLM.from_pretrained loads.

torchtitan-rd convert-ckpt aixsim 60M outputs/aixsim-60M/checkpoint/step-7075 exported-60M
torchtitan-rd convert-ckpt pt2hf aixsim 60M HuggingFaceTB/cosmo2-tokenizer STEP_FOLDER exported-60M
torchtitan-rd convert-ckpt aixsim 60M none checkpoint.pt exported-60M --export_dtype bfloat16

CKPT is a step folder, the folder of a run (its latest step), or a .pt or .pth file with the state dict. The
rotary settings of the export are those that the model was trained with; to state others is asked for with
--ori_max_position_embeddings and --max_position_embeddings. docs/commands.md describes it.
"""

import argparse
from pathlib import Path

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.conversion import cli
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.loading import latest_step
from torchtitan_rd.models import get_flavor, get_spec

DIRECTION = "pt2hf"


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] == DIRECTION:
        arguments = arguments[1:]
    # Positional arguments may stand around and between the flags.
    given = _parser().parse_intermixed_args(arguments)
    get_flavor(get_spec(given.arch), given.flavor)
    given.input_dir = latest_step(given.input_dir)
    given.override += _stated_context(given)
    cli.export(given, model=given.arch)
    return 0


def _stated_context(given: argparse.Namespace) -> list[str]:
    """Fields of the shape for the flags with which NewComputeBench states a longer context than was trained:
    Llama 3.1's scaling of the rotary embedding, with its factors 8, 1 and 4.
    """
    overrides = []
    if given.max_position_embeddings is not None:
        overrides.append(f"max_seq_len={given.max_position_embeddings}")
    if given.ori_max_position_embeddings is not None:
        original = given.ori_max_position_embeddings
        overrides.append(f"rope_scaling.original_max_position_embeddings={original}")
    for flag in ("max_position_embeddings", "ori_max_position_embeddings"):
        value = getattr(given, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    return overrides


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "convert-ckpt",
        __doc__,
        usage="%(prog)s [pt2hf] ARCH FLAVOR [TOKENIZER] CKPT OUT [flags]",
        allow_abbrev=False,
    )

    add = parser.add_argument
    add("arch", metavar="ARCH", help="model family, such as aixsim")
    add("flavor", metavar="FLAVOR", help="its size, such as 60M")
    add(
        "tokenizer_path",
        metavar="TOKENIZER",
        nargs="?",
        help="a folder, a name on the hub, or none (default: the run's own)",
    )
    add("input_dir", metavar="CKPT", type=Path, help="step folder, folder of a run, or .pt file")
    add("output_dir", metavar="OUT", type=Path, help="folder to write; it must not exist or be empty")

    cli.add_output_arguments(parser)
    cli.add_replacing_arguments(parser)
    add("--max_position_embeddings", type=int, metavar="N", help="the context to state (default: as trained)")
    add(
        "--ori_max_position_embeddings",
        type=int,
        metavar="N",
        help="state a rotary embedding that is stretched eightfold from this context (default: as trained)",
    )
    return parser
