"""What every converter reads from and writes to: the weights of one model, wherever they are stored."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.errors import CheckpointError, listed
from torchtitan_rd.model_spec import ModelShape, ModelSpec

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Weights:
    """The weights of one model by our names, read one tensor at a time.

    spec, shape: its family and its shape there.
    flavor: the name of the size, for people; the shape alone says what the model is.
    tensors: our name -> shape and type, in the order of the model's state dict.
    read: our name -> the whole tensor on the CPU, perhaps a view of a mapped file:
        not to be changed in place.
    origin: where they are stored, for messages and the model card.
    step: training step, where known.
    token_ids: bos_token_id, eos_token_id, pad_token_id (each an id, or None; eos also a list), where known.
    files: small files that go with the model (tokenizer.json, generation_config.json, ...): name -> content.
    job_config: {section: {key: value}} of the run that made them, if it was one of ours.
    hf_folder: the Hugging Face folder that they are read from, if it is one.
    """

    spec: ModelSpec
    shape: ModelShape
    flavor: str
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    origin: str
    step: int | None = None
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    job_config: Mapping[str, Any] | None = None
    hf_folder: Path | None = None


def travelling_files(weights: Weights) -> dict[str, bytes]:
    """The files that go with the model, with the token ids in generation_config.json if
    they were elsewhere.
    """
    files = dict(weights.files)
    if weights.token_ids and GENERATION_CONFIG not in files:
        files[GENERATION_CONFIG] = json.dumps(dict(weights.token_ids), indent=2).encode()
    return files


def total_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors together."""
    return sum(info.shape.numel() * info.dtype.itemsize for info in tensors.values())


def select_tensors(weights: Weights, names: Collection[str]) -> Weights:
    """The weights of these names alone."""
    return replace(weights, tensors={name: info for name, info in weights.tensors.items() if name in names})


def cast_weights(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """The weights with every floating-point tensor rounded to `dtype`; None: as they are."""
    if dtype is None:
        return weights
    tensors = {
        name: TensorInfo(info.shape, dtype if info.dtype.is_floating_point else info.dtype)
        for name, info in weights.tensors.items()
    }
    return replace(weights, tensors=tensors, read=lambda name: weights.read(name).to(tensors[name].dtype))


def model_tensors(spec: ModelSpec, shape: ModelShape) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """-> (name -> shape of the whole state dict, second name -> first name of each tied tensor)."""
    with torch.device("meta"):
        found = spec.build(shape).state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {
        name: first[id(tensor)]
        for name, tensor in found.items()
        if first.setdefault(id(tensor), name) != name
    }
    return {name: tensor.shape for name, tensor in found.items()}, tied


def check_shapes(found: Mapping[str, Any], wanted: Mapping[str, torch.Size], origin: str) -> None:
    """Every wanted tensor must be there, with the wanted shape, and no other. found: tensors, or what is
    known of them (TensorInfo). Raises CheckpointError.
    """
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{origin} lacks {listed(missing)}")
    if surplus := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{origin} holds {listed(surplus)}, which the model it describes does not have")
    for name, shape in wanted.items():
        own = tuple(found[name].shape)
        if own != tuple(shape):
            raise CheckpointError(
                f"{origin}: {name} has shape {own}, but its configuration says {tuple(shape)}"
            )


def matching_flavor(spec: ModelSpec, shape: ModelShape) -> str:
    """The flavor of this shape, whatever its vocabulary and context; "custom" if there is none."""

    def comparable(one: ModelShape) -> ModelShape:
        return replace(one.resolved(), vocab_size=1, max_seq_len=1)

    wanted = comparable(shape)
    return next((name for name, flavor in spec.flavors.items() if comparable(flavor) == wanted), "custom")
