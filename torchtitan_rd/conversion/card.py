"""README.md of an exported folder: what the model is, how it was trained, how to load it.
It promises nothing.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from torchtitan_rd import __version__
from torchtitan_rd.conversion.tokenizer_files import TOKENIZER_JSON
from torchtitan_rd.conversion.verification import parameter_count
from torchtitan_rd.conversion.weights import Weights
from torchtitan_rd.model_spec import ModelShape

SECTIONS = ("model", "training", "optimizer", "lr_scheduler")
# Absolute paths, and addresses with a login or a query, in which keys are passed.
_PRIVATE = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\|file:)|[\s,;=:](/|~)(?!/)|://[^/]*@|://.*\?")


def model_card(weights: Weights, *, dtype: str, config: Mapping[str, Any] | None) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    dtype: of the exported tensors. config: {section: {key: value}} of the run. Of it, only how the model was
    trained is told, and nothing of the machine: no absolute paths, and no addresses that may hold a key.
    """
    parts = [
        _front_matter(weights),
        f"# {weights.spec.name} {weights.flavor}",
        f"A {weights.spec.name} model of {parameter_count(weights):,} parameters, in {dtype}"
        + (f", after step {weights.step} of its training" if weights.step is not None else "")
        + f". Converted from `{_name(weights.origin)}` by torchtitan_rd {__version__}.",
        "## Shape",
        _table(weights.shape),
    ]
    if training := _training(config or {}):
        parts += ["## Training", f"These keys of the run's configuration tell how:\n\n```toml\n{training}```"]
    parts += ["## Use", _usage(weights)]
    return "\n\n".join(parts) + "\n"


def _front_matter(weights: Weights) -> str:
    tags = sorted({"torchtitan_rd", weights.spec.name, weights.spec.hf.model_type})
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{listed}\n---"


def _table(shape: ModelShape) -> str:
    rows = ["| | |", "|---|---|"]
    for key, value in dataclasses.asdict(shape).items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        if value is not None:
            rows.append(f"| {key} | {value} |")
    return "\n".join(rows)


def _training(config: Mapping[str, Any]) -> str:
    """TOML of the sections that tell how the model was trained; empty if nothing is left of them."""
    kept = {name: _public(config[name]) for name in SECTIONS if name in config}
    return tomli_w.dumps({name: section for name, section in kept.items() if section})


def _public(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is unset, as TOML has no null, and what is private, in nested tables and lists too."""
    kept = {key: _public(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None and not _is_private(value)}


def _is_private(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list | tuple):
        return any(map(_is_private, value))
    return isinstance(value, str | Path) and _PRIVATE.search(str(value)) is not None


def _name(origin: str) -> str:
    """The last part of a path: the folders above it are the machine's."""
    return Path(origin).name or origin


def _usage(weights: Weights) -> str:
    layout = weights.spec.hf
    given, generating = (
        "".join(f", {name}={value!r}" for name, value in arguments.items())
        for arguments in (layout.example_arguments(weights.shape), layout.example_generation)
    )
    trust = ", trust_remote_code=True" if layout.code else ""
    lines = [
        "from transformers import AutoModelForCausalLM"
        + (", AutoTokenizer" if _has_tokenizer(weights) else "")
    ]
    lines += ["", 'folder = "."  # this folder, or its name on the hub']
    lines += [f"model = AutoModelForCausalLM.from_pretrained(folder{trust})"]

    if _has_tokenizer(weights):
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
        lines += ['tokens = tokenizer("A text", return_tensors="pt").input_ids']
    else:
        lines = [
            "import torch",
            *lines,
            "tokens = torch.tensor([[0, 1, 2]])  # ids of the data it was trained on",
        ]
    lines += [f"logits = model(tokens{given}).logits"]
    lines += [f"answer = model.generate(tokens, max_new_tokens=20{generating})"]

    text = "```python\n" + "\n".join(lines) + "\n```"
    if layout.code:
        text += "\n\nThe transformers library lacks this class: the Python files of this folder are run."
    return f"{text} {layout.usage}" if layout.usage else text


def _has_tokenizer(weights: Weights) -> bool:
    return TOKENIZER_JSON in weights.files
