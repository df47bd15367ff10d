"""Meta's Llama files, or a Hugging Face Llama folder -> a checkpoint to start runs from.

python convert/llama_to_dcp.py --input_dir Llama-3.1-8B/original --output_dir outputs/checkpoint/step-0

Embedding and head are left out, since another vocabulary needs others, unless --keep_embeddings is given.
"""

import sys

from torchtitan_rd.conversion import cli
from torchtitan_rd.conversion.pipeline import open_released
from torchtitan_rd.conversion.weights import select_tensors

VOCABULARY = ("tok_embeddings.weight", "output.weight")


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--keep_embeddings", action="store_true", help="keep tok_embeddings and output")
    given = parser.parse_args(arguments)
    weights = open_released(given.input_dir, model="llama3")
    if not given.keep_embeddings:
        weights = select_tensors(weights, weights.tensors.keys() - set(VOCABULARY))
    cli.import_(given, weights)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
