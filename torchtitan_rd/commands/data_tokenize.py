"""Turns documents into packed rows of token ids, for training and held out.

torchtitan-rd data tokenize corpus.jsonl --tokenizer tokenizer --block-size 128 --output packed
torchtitan-rd data tokenize staging --tokenizer tokenizer --output packed --files 4096 --processes 16 \\
    --tasks 32 --task $SLURM_ARRAY_TASK_ID

Rows hold block-size + 1 ids, as `training.dataset = "packed"` reads them. Run the same line again after an
interruption: it goes on. docs/preparation.md describes it.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import pyarrow
import tokenizers

from torchtitan_rd.commands.data_arguments import add_inputs, columns_for_recipe, input_keys
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.documents import Documents
from torchtitan_rd.preparation.inputs import keep_hashes, open_inputs
from torchtitan_rd.preparation.manifest import Output, Recipe
from torchtitan_rd.preparation.tokenize import Packing, chat_encoder, pad_id_of, tokenize


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    packing = Packing(
        tokenizer=chosen.tokenizer,
        block_size=chosen.block_size,
        val_share=chosen.val_share,
        seed=chosen.seed,
        tasks=chosen.tasks,
        files=chosen.tasks if chosen.files is None else chosen.files,
        tail=chosen.tail,
    )
    tokenizer = load_tokenizer(chosen.tokenizer)
    if packing.tail == "pad":
        pad_id_of(chosen.tokenizer)

    folder, keys = Path(chosen.output), input_keys(chosen)
    inputs = open_inputs(keys, folder)
    is_text = any(not source.chat_columns for source in inputs.sources)
    if is_text and tokenizer.eos_id is None and tokenizer.bos_id is None:
        raise ConfigError(f"--tokenizer {chosen.tokenizer}: has neither bos nor eos to tell documents apart")
    chat = chat_encoder(tokenizer, inputs.sources)
    libraries = {"tokenizers": tokenizers.__version__, "pyarrow": pyarrow.__version__}
    if chat is not None:
        libraries["transformers"] = version("transformers")

    documents = Documents(inputs.sources, chosen.seed, parts=packing.files)
    names = ("block_size", "val_share", "seed", "tasks", "files", "tail")
    recipe = Recipe(
        "tokenize",
        {name.replace("_", "-"): getattr(packing, name) for name in names}
        | columns_for_recipe(keys)
        | {"weight": [source.weight for source in inputs.sources]},
        inputs.contents,
        tokenizer.digest if chat is None else chat.digest,
        libraries,
    )
    output = Output.open(folder, recipe)
    if not output.result:
        keep_hashes(inputs, output)
    manifest = tokenize(documents, packing, output, chosen.task, chosen.processes)
    _print(manifest, packing, chosen)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data tokenize", __doc__, allow_abbrev=False)
    add_inputs(parser)
    parser.add_argument(
        "--tokenizer", required=True, help="a folder, file or `bytes`, as model.tokenizer_path"
    )
    parser.add_argument("--block-size", type=int, default=4096, help="training.seq_len (default: 4096)")
    parser.add_argument("--val-share", type=float, default=0.05, help="of the documents (default: 0.05)")
    parser.add_argument("--files", type=int, help="of each split, in all (default: one a task)")
    parser.add_argument("--tail", default="drop", help="of a task, where it fills no row: drop or pad")
    parser.add_argument("--processes", type=int, default=1, help="that encode (default: 1)")
    parser.add_argument("--tasks", type=int, default=1, help="shares of the whole work (default: 1)")
    parser.add_argument("--task", type=int, default=0, help="the share that is done here (default: 0)")
    return parser


def _print(manifest: dict | None, packing: Packing, chosen: argparse.Namespace) -> None:
    if manifest is None:
        print(f"task {chosen.task} of {packing.tasks} is done; {chosen.output} is complete when all are")
        return
    for name, facts in manifest["sources"].items():
        print(
            f"{name}: {facts['documents']:,} documents ({facts['held_out']:,} held out, {facts['empty']:,} "
            f"empty), {facts['train_tokens']:,} + {facts['val_tokens']:,} tokens"
        )
    for split, rows in manifest["rows"].items():
        left = manifest["left_over"][split]
        print(f"{split}: {rows:,} rows of {packing.block_size + 1} ids, {left:,} ids left over")
