"""Perplexity on a data set: of a checkpoint (pt-ppl),
or of a Hugging Face folder or repository by the transformers library (hf-ppl).

torchtitan-rd eval pt-ppl aixsim 60M outputs/aixsim-60M/checkpoint/step-7075
torchtitan-rd eval hf-ppl exported/
torchtitan-rd eval hf-ppl exported/ --dataset_name text --dataset_path texts/ --split test --dtype float32

The mean is over tokens. On the same data both give the same number for a model and its export.
With torchrun the data is shared out to the ranks. docs/evaluation.md describes it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan_rd.checkpoint.folders import STATE
from torchtitan_rd.commands.arguments import at_least_1, check_outputs, device_of
from torchtitan_rd.commands.eval_loss import write_json
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.conversion.pipeline import TOKENIZERS
from torchtitan_rd.conversion.verification import transformers_model
from torchtitan_rd.data import DATASETS, DatasetKeys
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.evaluation import (
    FromTransformers,
    check_context,
    check_depths,
    check_vocabulary,
    evaluate,
    open_held_out,
    plain_read_outs,
    use_attention,
)
from torchtitan_rd.inference.loading import Loaded, load_model, open_weights, source_of
from torchtitan_rd.inference.ranks import model_folder, process_group
from torchtitan_rd.job import Environment

TOKENIZER = "HuggingFaceTB/cosmo2-tokenizer"
DTYPES = ("float32", "float16", "bfloat16")


def main(kind: str, arguments: list[str]) -> int:
    chosen = _parser(kind).parse_args(arguments)
    environment = Environment.read()
    result = measure(kind, chosen, environment)
    if environment.rank == 0:
        figures = result["losses"]["val_loss"]
        print(f"Perplexity: {figures['perplexity']:.4f}")
        print(", ".join(f"{name} {value:.6f}" for name, value in figures.items() if name != "perplexity"))
        print(f"{result['tokens']} tokens of {result['dataset']} ({result['split']})")
        write_json(result, chosen.output)
    return 0


def measure(kind: str, chosen: argparse.Namespace, environment: Environment) -> dict[str, Any]:
    device = device_of(chosen, environment)
    is_ours = kind == "pt-ppl"
    given = chosen.checkpoint_path if is_ours else chosen.model_name_or_path
    family = {"model": chosen.model_arch, "flavor": chosen.model_flavor} if is_ours else {}
    dtype = getattr(torch, chosen.dtype)
    check_outputs(chosen, "output")

    with process_group(environment, device):
        path = Path(given) if is_ours else model_folder(given, chosen.revision, environment)
        weights = open_weights(path, **family)
        check_context(weights.shape, chosen.seq_len)
        check_depths(weights.spec, [] if chosen.depth is None else [chosen.depth])
        held_out = open_held_out(
            _keys(chosen, environment.world_size),
            chosen.split,
            environment,
            tokenizer_path=chosen.tokenizer_path or _tokenizer_beside(path),
            vocab_size=_vocab_size(chosen, weights.shape.vocab_size),
            states=[Path(weights.origin) / STATE],
        )

        model: nn.Module
        if is_ours:
            loaded = load_model(path, **family, tokenizer_path="none", dtype=dtype, device=device)
            model = loaded.model
            use_attention(loaded, device, dtype, False, "auto")
        else:
            theirs = transformers_model(path, weights, dtype).to(device)
            model = FromTransformers(theirs, weights.spec.hf.forward_arguments)
            loaded = Loaded(weights.spec, weights.shape, model, None, source_of(weights))

        check_vocabulary(loaded.shape, held_out)
        read_outs = plain_read_outs(
            loaded,
            held_out,
            environment,
            depth=chosen.depth,
            dtype=dtype,
            device=device,
        )
        result = evaluate(model, held_out, device, read_outs)
    return {"model": given, "dtype": chosen.dtype, **result}


def _keys(chosen: argparse.Namespace, ranks: int) -> DatasetKeys:
    if chosen.num_batches % ranks:
        raise ConfigError(f"--num_batches {chosen.num_batches} is not a multiple of the {ranks} ranks")
    return DatasetKeys(
        dataset=chosen.dataset_name,
        dataset_path=chosen.dataset_path,
        seq_len=chosen.seq_len,
        local_batch_size=chosen.batch_size,
        global_batch_size=chosen.batch_size * chosen.num_batches,
    )


def _vocab_size(chosen: argparse.Namespace, rows: int) -> int | None:
    """Ids of packed rows may be any that the model has."""
    row = DATASETS.get(chosen.dataset_name)
    return rows if row is not None and row.kind == "packed" else None


def _tokenizer_beside(folder: Path) -> str:
    """The one in the folder of the weights, else that of the CLM models."""
    has_one = any((folder / name).is_file() for name in TOKENIZERS)
    return str(folder) if has_one else TOKENIZER


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = parser_of(f"eval {kind}", __doc__)
    add = parser.add_argument
    if kind == "pt-ppl":
        add("model_arch", help="model family, such as aixsim")
        add("model_flavor", help="its shape, such as 60M")
        add("checkpoint_path", help="step folder, or the folder of a run")
    else:
        add("model_name_or_path", help="Hugging Face folder, or a repository on the hub")
        add("--revision", help="commit, branch or tag of the repository (default: the newest commit)")

    add("--tokenizer_path", "--tokenizer-path", help=f"default: beside the weights, else {TOKENIZER}")
    add("--dataset_name", "--dataset-name", default="fineweb-edu", help="a row of the table of data sets")
    add("--dataset_path", "--dataset_subset", "--dataset-path", help="where to read it instead")
    add("--split", default="train", help="default: train")
    add("--batch_size", "--batch-size", type=at_least_1, default=32)
    add("--num_batches", "--num-batches", type=at_least_1, default=32)
    add("--seq_len", "--seq-len", type=at_least_1, default=2048)

    default = "float32" if kind == "pt-ppl" else "bfloat16"
    add("--dtype", choices=DTYPES, default=default, help=f"of the matrices (default {default})")
    add("--depth", type=int, help="iterations of a recurrent model (default: its mean)")
    add("--output", help="write the result there as JSON")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    return parser
