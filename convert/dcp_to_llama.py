"""A Llama checkpoint of ours -> a Hugging Face folder, or checkpoint.pth with the bare state dict.

python convert/dcp_to_llama.py --input_dir outputs/checkpoint/step-500 --output_dir exported
"""

import sys

from torchtitan_rd.conversion import cli


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--format", choices=("hf", "pth"), default="hf", help="what to write (default: %(default)s)"
    )
    parser.add_argument("--model", choices=("llama3", "aixsim"), help="family that the checkpoint must be of")
    cli.add_export_arguments(parser)
    given = parser.parse_args(arguments)
    cli.export(given, model=given.model, to_torch_file=given.format == "pth")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
