"""How much each layer of a dense model changes the residual stream, over real text: to choose the layers of a
recurrent model (convert/llama_to_raven.py).

torchtitan-rd layers TinyLlama --data texts/
torchtitan-rd layers outputs/debug --data pydoc-validation --seq-len 128 --output layers.json

cosine is that of a layer's input and output, change ||output - input|| / ||input||, means over tokens.
docs/retrofit.md tells how to read the table.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from torchtitan_rd.checkpoint.folders import STATE
from torchtitan_rd.commands.arguments import DTYPES, at_least_1, check_outputs, device_of
from torchtitan_rd.commands.eval_loss import write_json
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config_loader import nearest
from torchtitan_rd.conversion.pipeline import TOKENIZERS
from torchtitan_rd.conversion.weights import Weights
from torchtitan_rd.data import DATASETS, TOKENIZED, DatasetKeys, trained_kind
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.evaluation import (
    HeldOut,
    check_context,
    check_vocabulary,
    open_held_out,
    use_attention,
)
from torchtitan_rd.inference.layers import LayerChange, layer_changes, require_dense
from torchtitan_rd.inference.loading import load_model, open_weights
from torchtitan_rd.inference.ranks import process_group
from torchtitan_rd.job import Environment


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    environment = Environment.read()
    if environment.world_size > 1:
        raise ConfigError("layers runs on one rank: start it without torchrun")
    check_outputs(chosen, "output")
    rows, held_out = measure(chosen, environment)
    print(tabulate(rows, headers=rows[0]._fields, floatfmt=("", ".4f", ".4f")))
    keys = held_out.keys
    print(f"{keys.global_batch_size} sequences of {keys.seq_len} tokens of {chosen.data}")
    result = {"model": str(chosen.model), "data": chosen.data, "layers": [row._asdict() for row in rows]}
    write_json(result, chosen.output)
    return 0


def measure(chosen: argparse.Namespace, environment: Environment) -> tuple[list[LayerChange], HeldOut]:
    device, dtype = device_of(chosen, environment), DTYPES[chosen.dtype]
    weights = open_weights(chosen.model)
    require_dense(weights.spec)
    keys = _keys(chosen, weights)
    check_context(weights.shape, keys.seq_len)

    with process_group(environment, device):
        packed = DATASETS[keys.dataset].kind == "packed"
        held_out = open_held_out(
            keys,
            chosen.split,
            environment,
            tokenizer_path=chosen.tokenizer or _tokenizer_of(weights),
            vocab_size=weights.shape.vocab_size if packed else None,  # any id that the model has
            states=[Path(weights.origin) / STATE],
        )
        check_vocabulary(weights.shape, held_out)
        loaded = load_model(chosen.model, tokenizer_path="none", dtype=dtype, device=device)
        use_attention(loaded, device, dtype, False, "auto")
        return layer_changes(loaded, held_out.batches, device), held_out


def _keys(chosen: argparse.Namespace, weights: Weights) -> DatasetKeys:
    """--data names a row of the table of data sets, or text files."""
    is_named = chosen.data in DATASETS
    if not is_named and not Path(chosen.data).exists():
        raise ConfigError(
            f"--data {chosen.data}: there is no such file or folder, and no such data set"
            f"{nearest(chosen.data, DATASETS)}"
        )
    return DatasetKeys(
        dataset=chosen.data if is_named else "text",
        dataset_path=chosen.data_path if is_named else chosen.data,
        seq_len=chosen.seq_len or min(1024, weights.shape.max_seq_len),
        local_batch_size=1,
        global_batch_size=chosen.sequences,
    )


def _tokenizer_of(weights: Weights) -> str:
    """That of the model; for data without text any name will do. Raises ConfigError if it has none."""
    if any(name in weights.files for name in TOKENIZERS):
        return weights.origin
    config = weights.job_config or {}
    if trained_kind(config.get("training", {})) in TOKENIZED:
        return config.get("model", {}).get("tokenizer_path", "bytes")
    raise ConfigError(f"{weights.origin} holds no tokenizer: name its own with --tokenizer")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("layers", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", type=Path, help="step folder, run's folder, or Hugging Face folder of a dense model")
    add("--data", required=True, help="text file, folder of them, or a row of the table of data sets")
    add("--data-path", help="where to read such a row instead")
    add("--split", default="train", help="default: train")
    add("--sequences", type=at_least_1, default=32, help="how many to read (default 32)")
    add("--seq-len", type=at_least_1, help="tokens of each (default: 1024, or the model's context)")
    add("--tokenizer", help="as model.tokenizer_path (default: the model's own)")
    add("--dtype", choices=DTYPES, default="float32", help="of the matrices (default float32)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    add("--output", help="write the table there as JSON")
    return parser
