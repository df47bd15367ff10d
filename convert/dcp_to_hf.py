"""A checkpoint of ours -> a Hugging Face folder that AutoModelForCausalLM.from_pretrained loads.

python convert/dcp_to_hf.py --input_dir outputs/checkpoint/step-500 --output_dir exported
"""

import sys

from torchtitan_rd.conversion import cli


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", choices=cli.FAMILIES, help="family that the checkpoint must be of")
    cli.add_export_arguments(parser)
    given = parser.parse_args(arguments)
    cli.export(given, model=given.model)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
