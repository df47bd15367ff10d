"""Weights from and to torch.distributed.checkpoint (DCP) folders."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from torchtitan_rd import __version__
from torchtitan_rd.checkpoint import SafeReader, read_manifest, verify
from torchtitan_rd.checkpoint.folders import CONFIG, MANIFEST, step_of, write_durably
from torchtitan_rd.checkpoint.manifest import Manifest, TensorEntry, hash_files
from torchtitan_rd.checkpoint.safe_reader import MODEL_SHAPE
from torchtitan_rd.conversion.tokenizer_files import files_in
from torchtitan_rd.conversion.weights import (
    Weights,
    check_shapes,
    matching_flavor,
    model_tensors,
    travelling_files,
)
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.model_spec import ModelShape, ModelSpec
from torchtitan_rd.models import get_flavor, get_spec

PREFIX = "model."


def open_dcp(
    folder: Path,
    *,
    model: str | None = None,
    flavor: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Weights:
    """The `model.*` tensors of a checkpoint; what else it holds (an optimizer, a rotary table) is not read.
    One without such names is that of a model alone.

    model: the family that it must be of. flavor, overrides: the shape of a checkpoint that does not store
    one, which another program wrote; of one that does, overrides replace single fields.
    Raises CheckpointError if it is damaged (sizes of files here, checksums of tensors as they are read) or of
    another model, ConfigError if its shape is not known.
    """
    reader = SafeReader(folder, prefix=PREFIX)
    found = {key.removeprefix(PREFIX): info for key, info in reader.tensors().items()}
    step = step_of(folder.name)
    if (folder / MANIFEST).exists():
        if problems := verify(folder, hashes=False):
            raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
        step = read_manifest(folder).step
    spec, shape, flavor = _stored_shape(folder, reader.model_shape(), model, flavor, dict(overrides or {}))
    wanted, _ = model_tensors(spec, shape)
    if wanted.keys().isdisjoint(found):
        raise CheckpointError(
            f"{folder} holds no {spec.name}: none of its tensors is named as one of these, with or without "
            f"{PREFIX} before it"
        )
    # A seed may lack the embedding and the head; whoever needs the whole model checks that it is there.
    here = {name: size for name, size in wanted.items() if name in found}
    weights = {name: info for name, info in found.items() if name not in spec.derived}
    check_shapes(weights, here, str(folder))
    travelling = files_in(folder)
    return Weights(
        spec=spec,
        shape=shape,
        flavor=flavor,
        tensors={name: found[name] for name in wanted if name in found},
        read=lambda name: reader.read(PREFIX + name),
        origin=str(folder),
        step=step,
        token_ids=travelling.token_ids,
        files=travelling.files,
        job_config=job_config(folder),
    )


def write_dcp(weights: Weights, folder: Path, name: str) -> None:
    """Writes `weights` into the empty `folder` as a checkpoint that will be named `name`: a seed,
    to start runs from.

    One file a tensor: torch keeps what it has put into a file in memory until the file is complete.
    """
    skeleton = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in weights.tensors.items()
    }
    planner = _StreamingPlanner(weights.read)
    writer = FileSystemWriter(folder, single_file_per_rank=False, sync_files=True, overwrite=False)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
        )
        dcp.save({"model": skeleton}, storage_writer=writer, planner=planner, no_dist=True)

    shape = {"name": weights.spec.name, "flavor": weights.flavor, **asdict(weights.shape)}
    write_durably(folder / MODEL_SHAPE, json.dumps(shape, indent=1, sort_keys=True))
    for file, content in travelling_files(weights).items():
        write_durably(folder / file, content)

    table = {PREFIX + key: TensorEntry.of(info) for key, info in weights.tensors.items()}
    Manifest(
        step=step_of(name) or 0,
        resumable=False,
        world_size=1,
        torch_version=torch.__version__,
        program_version=__version__,
        files=hash_files(folder, sorted(path.name for path in folder.iterdir())),
        tensors=table,
    ).write(folder)


class _StreamingPlanner(DefaultSavePlanner):
    """Hands each tensor to torch when its turn comes to be written."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._read(write_item.index.fqn.removeprefix(PREFIX))


def _stored_shape(
    folder: Path, stored: dict[str, Any], model: str | None, flavor: str | None, overrides: dict[str, Any]
) -> tuple[ModelSpec, ModelShape, str]:
    """Family, shape and flavor name of a checkpoint. stored: what its `model.json` says."""
    if not stored:
        if model is None or flavor is None:
            raise ConfigError(
                f"{folder} does not tell its shape (it has no {MODEL_SHAPE}, so another program wrote it): "
                f"name it, for example with --model llama3 --flavor 8B --override vocab_size=256"
            )
        spec = get_spec(model)
        shape = get_flavor(spec, flavor, overrides)
        return spec, shape, matching_flavor(spec, shape)

    try:
        spec, stored_flavor = get_spec(stored.pop("name")), stored.pop("flavor")
        shape = get_flavor(spec, next(iter(spec.flavors)), {**stored, **overrides})
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / MODEL_SHAPE} does not describe a model: {error}") from None

    if model is not None and get_spec(model) is not spec:
        raise ConfigError(f"--model {model}: {folder} holds a {spec.name}; use --model {spec.name}")
    if flavor not in (None, stored_flavor):
        raise ConfigError(
            f"flavor {flavor}: {folder} holds a {spec.name} {stored_flavor}; name that one, or none"
        )
    return spec, shape, stored_flavor


def job_config(folder: Path) -> Mapping[str, Any] | None:
    """{section: {key: value}} of the run that saved a checkpoint, if it was one of ours.
    Raises CheckpointError.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
