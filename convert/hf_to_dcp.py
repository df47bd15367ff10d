"""A Hugging Face folder, Meta's files or a training checkpoint of Huginn (step-*_0.pth) -> a
checkpoint of ours.

python convert/hf_to_dcp.py --model raven --input_dir huginn-0125 --output_dir outputs/checkpoint/step-0
"""

import sys

from torchtitan_rd.conversion import cli
from torchtitan_rd.conversion.pipeline import open_released


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", choices=cli.FAMILIES, required=True, help="family of the model")
    parser.add_argument("--flavor", help="size, for a training checkpoint that does not tell it")
    given = parser.parse_args(arguments)
    cli.import_(given, open_released(given.input_dir, model=given.model, flavor=given.flavor))


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
