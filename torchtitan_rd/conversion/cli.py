"""What the scripts in convert/ share: arguments, error messages, exit codes."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli
import tomli_w
import torch

from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.hub import check_push, push_folder
from torchtitan_rd.conversion.pipeline import TOKENIZERS, to_dcp, to_hf, to_pth, with_tokenizer
from torchtitan_rd.conversion.retrofit import Split, open_dense, to_raven
from torchtitan_rd.conversion.state_dict import open_state_dict
from torchtitan_rd.conversion.weights import Weights, cast_weights
from torchtitan_rd.errors import ConfigError, TorchtitanRDError
from torchtitan_rd.log import init_logging
from torchtitan_rd.models import MODELS

FAMILIES = tuple(dict.fromkeys(spec.name for spec in MODELS.values()))
DTYPES = ("float32", "bfloat16", "float16")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the arguments that every script has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--input_dir", type=Path, required=True, help="where the weights are")
    made.add_argument(
        "--output_dir", type=Path, required=True, help="folder to write; it must not exist or be empty"
    )
    add_output_arguments(made)
    return made


def add_output_arguments(made: argparse.ArgumentParser) -> None:
    """How the result is written and proved."""
    made.add_argument(
        "--force", action="store_true", help="replace a converted model that stands in output_dir"
    )
    made.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the logits of the result with those of transformers "
        "(default: if that is possible here)",
    )


def add_export_arguments(made: argparse.ArgumentParser) -> None:
    """Those of a checkpoint on its way out. Each but the push replaces what the checkpoint itself says."""
    made.add_argument("--tokenizer_path", help="as model.tokenizer_path, or none (default: the run's own)")
    made.add_argument("--flavor", help="size of a checkpoint that does not store its shape")
    add_replacing_arguments(made)


def add_replacing_arguments(made: argparse.ArgumentParser) -> None:
    """Those of an export whose tokenizer and flavor are named otherwise."""
    made.add_argument(
        "--export_dtype", choices=DTYPES, help="round the weights to this type (default: as stored)"
    )
    made.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the shape, as rope_theta=10000",
    )
    made.add_argument("--hf_repo_name", help="repository on the Hugging Face hub to push to")
    made.add_argument("--push_to_hub", action="store_true", help="push the result to hf_repo_name")


def add_retrofit_arguments(made: argparse.ArgumentParser) -> None:
    """Which layers of a dense model go where, and what becomes of them."""
    add = made.add_argument
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


def run(action: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a script; returns its exit status. A user's mistake is one message on stderr and status 1."""
    init_logging()
    # So that the staging is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        action(arguments)
        return 0
    except TorchtitanRDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def export(given: argparse.Namespace, *, model: str | None, to_torch_file: bool = False) -> None:
    """A DCP folder, or a file of torch.save with the state dict -> a Hugging Face folder, or a .pth file;
    and to the hub.
    """
    check_push(given.hf_repo_name, given.push_to_hub)
    overrides = parse_overrides(given.override)
    if given.input_dir.is_file() and model is not None and given.flavor is not None:
        weights = open_state_dict(given.input_dir, model=model, flavor=given.flavor, overrides=overrides)
    else:
        weights = open_dcp(given.input_dir, model=model, flavor=given.flavor, overrides=overrides)
    weights = cast_weights(weights, getattr(torch, given.export_dtype) if given.export_dtype else None)
    convert = to_pth if to_torch_file else to_hf
    weights = weights if to_torch_file else with_tokenizer(weights, given.tokenizer_path)
    print(convert(weights, given.output_dir, force=given.force, verify=given.verify, progress=True))
    print(f"wrote {given.output_dir}")
    if given.push_to_hub:
        # The ancestor's scripts find a .pth under the name of the checkpoint;
        # from_pretrained wants the top folder.
        print(
            "pushed to",
            push_folder(
                given.output_dir, given.hf_repo_name, given.input_dir.name if to_torch_file else None
            ),
        )


def import_(given: argparse.Namespace, weights: Weights) -> None:
    """Weights of another program -> a DCP folder, and what to write into a TOML file to train on from it."""
    print(to_dcp(weights, given.output_dir, force=given.force, verify=given.verify, progress=True))
    print(f"wrote {given.output_dir}; to start a run from it:\n\n{model_section(weights, given.output_dir)}")


def retrofit(given: argparse.Namespace) -> None:
    """A dense Llama -> a raven, and what to write into a TOML file to train on from it."""
    split = Split.parse(given.prelude, given.core, given.coda)
    dense = open_dense(
        given.input_dir,
        model=given.model,
        flavor=given.flavor,
        overrides=parse_overrides(given.override),
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
    section = model_section(raven, given.output_dir)
    print(f"wrote {given.output_dir}; to start a run from it:\n\n{section}")


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """["rope_theta=1e4", "rope_scaling.factor=8"] -> a nested table; values as in TOML.
    Raises ConfigError.
    """
    lines = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--override {pair}: expected KEY=VALUE")
        lines.append(f"{name} = {value}")
    try:
        return tomli.loads("\n".join(lines))
    except tomli.TOMLDecodeError as error:
        raise ConfigError(
            f"--override {' '.join(pairs)}: {error}; values are as in TOML, text in quotes"
        ) from None


def model_section(weights: Weights, folder: Path) -> str:
    """The TOML that trains this shape from `folder`, with the tokenizer that lies there."""
    shape = dataclasses.asdict(weights.shape)
    choices = {name: dataclasses.asdict(flavor) for name, flavor in weights.spec.flavors.items()}
    given = {"vocab_size", "max_seq_len"}  # model.vocab_size, and what training.seq_len raises

    def differing(name: str) -> dict[str, Any]:
        return {
            key: value for key, value in shape.items() if key not in given and value != choices[name][key]
        }

    if weights.flavor in choices:
        flavor, overrides = weights.flavor, {}
    else:
        # TOML has no null: a field cannot be set back to "unset".
        usable = [name for name in choices if None not in differing(name).values()]
        flavor = min(usable, key=lambda name: len(differing(name)))
        overrides = differing(flavor)
    section = {"name": weights.spec.name, "flavor": flavor, "vocab_size": weights.shape.vocab_size}
    if overrides:
        section["overrides"] = overrides
    note = ""
    if any(name in weights.files for name in TOKENIZERS):
        section["tokenizer_path"] = str(folder.absolute())
    else:
        note = "# No tokenizer came with the weights: to train on text, set model.tokenizer_path to theirs.\n"
    start = {"enable": True, "initial_load_path": str(folder.absolute())}
    return note + tomli_w.dumps({"model": section, "checkpoint": start})
