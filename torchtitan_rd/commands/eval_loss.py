"""The loss of a model on the held-out data of a run: what training calls val_loss.

torchtitan-rd eval loss train_configs/recurrent_debug.toml outputs/recurrent_debug
torchtitan-rd eval depth train_configs/recurrent_debug.toml outputs/recurrent_debug --depths 1-16,32,64
torchrun --nproc_per_node 4 -m torchtitan_rd eval loss X.toml step-1000 --split test --output result.json

Further --section.key value override the TOML file, as in training. Every rank holds the whole model;
the data is shared out. docs/evaluation.md describes it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from torchtitan_rd.checkpoint.folders import STATE
from torchtitan_rd.commands.arguments import at_least_1, check_outputs, device_of, narrowed
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.evaluation import (
    check_context,
    check_depths,
    check_vocabulary,
    evaluate,
    open_validation,
    read_outs_of,
    use_attention,
)
from torchtitan_rd.inference.loading import load_model, open_weights
from torchtitan_rd.inference.ranks import process_group
from torchtitan_rd.job import Environment
from torchtitan_rd.whole_file import whole_file

DEPTHS = "1-64"
MOST_DEPTHS = 1024


def main(kind: str, arguments: list[str]) -> int:
    chosen, overrides = _parser(kind).parse_known_args(arguments)
    environment = Environment.read()
    result = measure(kind, chosen, overrides, environment)
    if environment.rank == 0:
        _print(result)
        write_json(result, chosen.output)
    return 0


def measure(
    kind: str, chosen: argparse.Namespace, overrides: list[str], environment: Environment
) -> dict[str, Any]:
    config = load(["--job.config_file", chosen.config, *overrides], environment).config
    training = config.training
    validation = narrowed(config.validation, chosen, training.dataset)
    depths = parse_depths(chosen.depths) if chosen.depths else []
    if kind == "depth" and not depths:
        depths = parse_depths(DEPTHS)
    device = device_of(chosen, environment)
    dtype = getattr(torch, training.mixed_precision_param)

    # Names a mistake before the data is read.
    check_outputs(chosen, "output")
    weights = open_weights(Path(chosen.checkpoint), model=config.model.name, flavor=chosen.flavor)
    check_context(weights.shape, training.seq_len)
    check_depths(weights.spec, depths)

    with process_group(environment, device):
        held_out = open_validation(
            validation,
            config,
            environment,
            source=chosen.source_dataset,
            states=[Path(weights.origin) / STATE],
        )

        loaded = load_model(
            chosen.checkpoint,
            model=config.model.name,
            flavor=chosen.flavor,
            tokenizer_path="none",
            dtype=dtype,
            device=device,
        )
        check_vocabulary(loaded.shape, held_out)

        if kind == "loss" and loaded.spec.inputs is not None and not chosen.depths:
            depths = validation.partial_depth_eval
        read_outs = read_outs_of(
            loaded, held_out, depths, environment, recurrence=config.recurrence, training=training
        )
        use_attention(loaded, device, dtype, training.document_mask, config.model.attention_backend)
        result = evaluate(loaded.model, held_out, device, read_outs)
    return {"checkpoint": chosen.checkpoint, "weights": str(loaded.source.folder), **result}


def parse_depths(text: str) -> list[int]:
    """`1-8,16` -> [1, ..., 8, 16]. Raises ConfigError."""
    depths: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found = range(int(first), int(last or first) + 1)
            if not found or found[0] < 1:
                raise ConfigError(f"--depths {text}: {part}: depths must be at least 1, and ranges ascend")
            if len(depths) + found[-1] - found[0] >= MOST_DEPTHS:
                raise ConfigError(f"--depths {text}: {MOST_DEPTHS} at most, whose states are held at once")
            depths += found
    except ValueError:
        raise ConfigError(f"--depths {text}: whole numbers and ranges, as in 1-8,16,32") from None
    return sorted(set(depths))


def write_json(result: dict[str, Any], path: str | None) -> None:
    """Raises ConfigError if it cannot be written."""
    if path is None:
        return
    with whole_file(Path(path), "--output") as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _print(result: dict[str, Any]) -> None:
    losses = result["losses"]
    units = list(next(iter(losses.values())))
    print(
        tabulate(
            [[name, *row.values()] for name, row in losses.items()], headers=["", *units], floatfmt=".6g"
        )
    )
    source = f" of source {result['source_dataset']}" if result["source_dataset"] else ""
    print(
        f"{result['tokens']} tokens of {result['dataset']} ({result['split']}){source}; {result['weights']}"
    )


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = parser_of(f"eval {kind}", __doc__, allow_abbrev=False)
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("checkpoint", help="step folder, run's folder, or Hugging Face folder")
    parser.add_argument("--split", help="default: [validation] split")
    parser.add_argument("--sequences", type=at_least_1, help="default: [validation] sequences")
    parser.add_argument("--source-dataset", help="only rows whose column source_dataset holds this")
    default = DEPTHS if kind == "depth" else "[validation] partial_depth_eval"
    parser.add_argument(
        "--depths", help=f"of a recurrent model, beside its mean, as in 1-8,16 (default: {default})"
    )
    parser.add_argument("--flavor", help="the shape of a checkpoint that does not tell it")
    parser.add_argument("--output", help="write the result there as JSON")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    return parser
