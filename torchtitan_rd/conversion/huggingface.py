"""Weights from and to Hugging Face folders (config.json and safetensors)."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.checkpoint.manifest import dtype_name
from torchtitan_rd.conversion.card import model_card
from torchtitan_rd.conversion.pth import named_tensors, open_pth
from torchtitan_rd.conversion.safetensors_file import DTYPES_BY_NAME, write_safetensors
from torchtitan_rd.conversion.tokenizer_files import files_in
from torchtitan_rd.conversion.weights import (
    Weights,
    check_shapes,
    matching_flavor,
    model_tensors,
    total_bytes,
    travelling_files,
)
from torchtitan_rd.errors import CheckpointError, ConfigError, listed
from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.models import MODELS, get_spec

CONFIG_JSON = "config.json"
INDEX = "{}.index.json"
HEAD = "lm_head.weight"  # in every family's folders; there may be one though it is tied to the embedding
MAX_SHARD_BYTES = 5 * 10**9  # as Hugging Face's own folders
# Stated where an id is not known: the defaults of transformers' LlamaConfig, 1 and 2, may be any token here.
NO_TOKEN_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def open_hf(folder: Path, *, model: str | None = None) -> Weights:
    """The weights of a Hugging Face folder of a family that we have; its config.json decides the shape.

    model: the family that it must be of; by default the first one that stands in such a folder. Raises
    CheckpointError for missing, truncated or wrongly shaped files, ConfigError for a model that is not ours.
    Reads names and shapes only.
    """
    fields = _read_json(folder / CONFIG_JSON)
    spec = _family(fields, model, folder)
    try:
        shape = spec.hf.shape_of(fields)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_JSON}: {str(error).removeprefix(f'{CONFIG_JSON}: ')}") from None

    stored = _stored_tensors(folder)
    wanted, tied = model_tensors(spec, shape)
    names = spec.hf.key_map(shape)  # ours -> theirs
    if tied and HEAD in stored:
        _check_tied(stored, names[next(iter(tied.values()))], folder)

    ignored = re.compile(f"{spec.hf.derived}|{re.escape(HEAD)}" if tied else spec.hf.derived)
    found = {
        name: entry.info
        for name, entry in stored.items()
        if name in names.values() or not ignored.fullmatch(name)
    }
    expected = {names[ours]: wanted[ours] for ours in names}
    check_shapes(found, expected, str(folder))

    travelling = files_in(folder)
    info = {name: stored[names[tied.get(name, name)]].info for name in wanted}

    def read(name: str) -> torch.Tensor:
        ours = tied.get(name, name)
        return spec.hf.from_hf(ours, stored[names[ours]].read(), shape)

    return Weights(
        spec=spec,
        shape=shape,
        flavor=matching_flavor(spec, shape),
        tensors=info,
        read=read,
        origin=str(folder),
        token_ids=travelling.token_ids,
        files=travelling.files,
        hf_folder=folder,
    )


def write_hf(weights: Weights, folder: Path) -> None:
    """Writes a complete Hugging Face folder into the empty `folder`.

    weights: at least those of the layout's key_map. Raises ConfigError if the shape has no counterpart there.
    """
    layout, shape = weights.spec.hf, weights.shape
    fields = layout.config_fields(shape)
    names = layout.key_map(shape)
    buffers = layout.buffers(shape)
    infos = {theirs: weights.tensors[ours] for ours, theirs in names.items()}
    infos |= {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in buffers.items()}
    ours_of = {theirs: ours for ours, theirs in names.items()}

    def read(name: str) -> torch.Tensor:
        if name in buffers:
            return buffers[name]
        return layout.to_hf(ours_of[name], weights.read(ours_of[name]), shape)

    _write_shards(infos, read, folder)
    dtype = dtype_name(weights.tensors[next(iter(names))].dtype)
    fields |= {"torch_dtype": dtype, **NO_TOKEN_IDS, **weights.token_ids}
    _write_json(folder / CONFIG_JSON, fields)
    card = model_card(weights, dtype=dtype, config=weights.job_config)
    files = {"README.md": card.encode(), **travelling_files(weights)}
    files |= layout.code_files()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def require_complete(weights: Weights) -> None:
    """Raises CheckpointError if a tensor of the model is missing, or two that are tied differ."""
    wanted, tied = model_tensors(weights.spec, weights.shape)
    if missing := [
        name for name in wanted if name not in weights.tensors and tied.get(name) not in weights.tensors
    ]:
        raise CheckpointError(
            f"{weights.origin} lacks {listed(missing)}: a whole model is needed. "
            f"llama_to_dcp.py leaves embedding and head out unless it is given --keep_embeddings"
        )
    for second, first in tied.items():
        if second in weights.tensors and not torch.equal(weights.read(first), weights.read(second)):
            raise CheckpointError(
                f"{weights.origin}: {first} and {second} are tied in this model, and yet differ"
            )


def _write_shards(infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor], folder: Path) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(infos),
        get_storage_size=lambda info: info.shape.numel() * info.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: infos[name] for name in names}, read)
    if split.is_sharded:
        index = {"metadata": {"total_size": total_bytes(infos)}, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX.format("model.safetensors"), index)


class _Stored:
    """One tensor of a folder: `info`, and `read()` -> the tensor."""

    def __init__(self, info: TensorInfo, read: Callable[[], torch.Tensor]):
        self.info, self.read = info, read


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Their name -> tensor, of safetensors files if there are any, else of pickled ones."""
    for base, open_file in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = folder / INDEX.format(base)
        if index.exists():
            places = _read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(
                Path(str(file)).name == file for file in places.values()
            ):
                raise CheckpointError(f"{index} is damaged: it has no weight_map of files beside it")
            files = {file: open_file(folder / file) for file in sorted(set(places.values()))}
            if absent := [name for name, file in places.items() if name not in files[file]]:
                raise CheckpointError(
                    f"{index} names {listed(absent)}, which {places[absent[0]]} does not hold"
                )
            return {name: files[file][name] for name, file in places.items()}
        if (folder / base).exists():
            return open_file(folder / base)
    raise CheckpointError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index"
    )


def _open_safetensors(path: Path) -> dict[str, _Stored]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download it again")

    def read(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:  # anew, so that what was mapped before is given back
            return file.get_tensor(name)

    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES_BY_NAME:
                    raise CheckpointError(
                        f"{path}: {name} has the type {part.get_dtype()}, which is not read here"
                    )
                info = TensorInfo(torch.Size(part.get_shape()), DTYPES_BY_NAME[part.get_dtype()])
                found[name] = _Stored(info, partial(read, name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}): download it again") from None
    return found


def _open_bin(path: Path) -> dict[str, _Stored]:
    return {
        name: _Stored(TensorInfo(tensor.shape, tensor.dtype), partial(torch.Tensor.detach, tensor))
        for name, tensor in named_tensors(open_pth(path), str(path)).items()
    }


def _check_tied(stored: Mapping[str, _Stored], embedding: str, folder: Path) -> None:
    if embedding in stored and not torch.equal(stored[HEAD].read(), stored[embedding].read()):
        raise CheckpointError(
            f"{folder}: {CONFIG_JSON} says that {HEAD} is tied to {embedding}, and yet they differ: set "
            f"tie_word_embeddings to false there if the model was trained so"
        )


def _family(fields: Mapping[str, Any], model: str | None, folder: Path) -> ModelSpec:
    kind = fields.get("model_type")
    families = {spec.name: spec for spec in MODELS.values() if spec.hf.model_type == kind}
    if not families:
        known = sorted({spec.hf.model_type for spec in MODELS.values()})
        raise ConfigError(
            f"{folder / CONFIG_JSON}: model_type = {kind!r} is none of ours ({', '.join(known)})"
        )
    if model is None:
        return next(iter(families.values()))
    if get_spec(model).name not in families:
        raise ConfigError(f"--model {model}: {folder} holds a {kind}; use --model {' or '.join(families)}")
    return get_spec(model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    # RecursionError: brackets within brackets, thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a table")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
