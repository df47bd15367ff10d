"""A dense Llama -> a depth-recurrent model (arXiv 2511.07384), as a Hugging Face folder or, with --dcp, as a
checkpoint of ours.

python convert/llama_to_raven.py --input_dir TinyLlama --output_dir retrofitted \\
    --prelude 0-3 --core 10-17 --coda 18-21

Layers count from 0; `torchtitan-rd layers` helps to choose them, and docs/retrofit.md tells how to go on.
"""

import sys

from torchtitan_rd.conversion import cli


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    cli.add_retrofit_arguments(parser)
    cli.retrofit(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
