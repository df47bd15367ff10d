"""A dense Llama -> a depth-recurrent model (arXiv 2511.07384), as a Hugging Face folder or, with --dcp, as a
checkpoint of ours.

python convert/llama_to_raven.py --input_dir TinyLlama --output_dir retrofitted \\
    --prelude 0-3 --core 10-17 --coda 18-21

Layers count from 0; `torchtitan-rd layers` helps to choose them, and docs/retrofit.md tells how to go on.
"""

import sys

from torchtitan_rd.conversion import cli
from torchtitan_rd.conversion.pipeline import with_tokenizer
from torchtitan_rd.conversion.retrofit import Split, open_dense, to_raven


def main(arguments: list[str]) -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--prelude", required=True, metavar="A-B", help="first and last layer before the recurrence, or none")
    add("--core", required=True, metavar="A-B", help="layers that are iterated")
    add("--coda", required=True, metavar="A-B", help="layers after the recurrence, or none")
    add(
        "--adapter",
        choices=("identity", "random"),
        default="identity",
        help="identity: at first every depth computes what one iteration does (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of a random adapter")
    add("--mean_recurrence", type=int, default=32, help="iterations in evaluation (default: %(default)s)")
    add(
        "--mean_backprop_depth",
        type=int,
        default=8,
        help="of them, how many are differentiated in training (default: %(default)s)",
    )
    add("--dcp", action="store_true", help="write a checkpoint in place of a Hugging Face folder")
    add("--tokenizer_path", help="as model.tokenizer_path, or none (default: the dense model's own)")
    add("--model", choices=("llama3", "aixsim"), help="family of a checkpoint that does not tell its shape")
    add("--flavor", help="size of such a checkpoint")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="a field of its shape")
    given = parser.parse_args(arguments)

    split = Split.parse(given.prelude, given.core, given.coda)
    dense = open_dense(
        given.input_dir,
        model=given.model,
        flavor=given.flavor,
        overrides=cli.parse_overrides(given.override),
    )
    raven, proof = to_raven(
        with_tokenizer(dense, given.tokenizer_path),
        split,
        given.output_dir,
        dcp=given.dcp,
        force=given.force,
        verify=given.verify,
        progress=True,
        adapter=given.adapter,
        seed=given.seed,
        mean_recurrence=given.mean_recurrence,
        mean_backprop_depth=given.mean_backprop_depth,
    )
    print(proof)
    section = cli.model_section(raven, given.output_dir)
    print(f"wrote {given.output_dir}; to start a run from it:\n\n{section}")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
