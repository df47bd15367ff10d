"""What a run takes from the checkpoint folder that was chosen: its documents, and tensors: all of them to
resume, some of them as initial weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tomli
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan_rd.checkpoint import contract
from torchtitan_rd.checkpoint.arranged_rows import ArrangedLoadPlanner, RowOrders
from torchtitan_rd.checkpoint.folders import CONFIG, MANIFEST, MODEL_ONLY, STATE, STEP, step_of
from torchtitan_rd.checkpoint.manifest import (
    Manifest,
    TensorEntry,
    read_manifest,
    second_look,
    tensor_table,
)
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.checkpoint.safe_reader import METADATA, MODEL_SHAPE, TensorInfo
from torchtitan_rd.errors import CheckpointError, listed
from torchtitan_rd.log import logger

# What a folder of weights holds that Hugging Face's library, or Meta, wrote.
RELEASED = ("config.json", "params.json")
Tensors = Mapping[str, Mapping[str, Tensor]]


class TensorReader(Protocol):
    """A `storage_reader` of torch.distributed.checkpoint that also tells what it holds.

    tensors: shapes and types by key (`model.<name>`). model_shape: fields of the model's shape;
    empty if not known.
    """

    def model_shape(self) -> dict[str, Any]: ...

    def tensors(self) -> dict[str, TensorInfo]: ...

    def read_metadata(self) -> Metadata: ...


def read_documents(path: Path) -> tuple[Manifest, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest, model shape, config and state. Raises CheckpointError if only a model is there."""
    manifest = read_manifest(path)
    if not manifest.resumable:
        raise CheckpointError(f"{path} holds only the model: name it in checkpoint.initial_load_path instead")
    try:
        shape = json.loads(_text(path / MODEL_SHAPE))
        config = tomli.loads(_text(path / CONFIG))
        state = json.loads(_text(path / STATE))
    except OSError as error:
        raise CheckpointError(
            f"{error}: run the same command again once the storage answers; "
            f"if it stays so, rename {path} and an older checkpoint is used"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; checkpoint.verify_hashes = true falls back to an older one"
        ) from None
    return manifest, shape, config, state


def _text(path: Path) -> str:
    return second_look(lambda: path.read_text(encoding="utf-8"))


def select(tensors: Tensors, excluded: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """`tensors` without the excluded names."""
    return {
        group: {
            name: t for name, t in members.items() if not contract.is_excluded(f"{group}.{name}", excluded)
        }
        for group, members in tensors.items()
    }


def read_tensors(
    reader: TensorReader, tensors: Tensors, ranks: RankGroup, row_orders: RowOrders | None = None
) -> None:
    """Fills `tensors` in place; collective. Each rank reads only its own shards."""

    ranks.agree_on_own(reader.read_metadata)  # torch's own collectives would bury its error
    wanted = {group: dict(members) for group, members in tensors.items()}
    planner = ArrangedLoadPlanner(row_orders or {})
    ranks.agree(lambda: dcp.load(wanted, storage_reader=reader, planner=planner, process_group=ranks.group))


def initial_candidates(own_folder: Path | None, initial_load_path: str | None) -> list[Path]:
    """The folders to try for initial weights, in order: our own seed, the folder named,
    or its step folders.
    """
    if own_folder is not None and (own_folder / "step-0").is_dir():
        if initial_load_path is not None:
            logger.warning("checkpoint.initial_load_path is not used: %s has a seed", own_folder)
        return [own_folder / "step-0"]
    if initial_load_path is None:
        return []

    path = Path(initial_load_path).resolve()
    if not path.is_dir():
        raise CheckpointError(f"checkpoint.initial_load_path = {initial_load_path!r} is not a folder")
    if (path / METADATA).exists():
        return [path]

    named = (STEP, MODEL_ONLY)
    steps = [p for p in path.iterdir() if any(n.fullmatch(p.name) for n in named) and (p / METADATA).exists()]
    if not steps and any((path / name).exists() for name in RELEASED):
        return [path]
    if not steps:
        raise CheckpointError(
            f"checkpoint.initial_load_path = {initial_load_path!r} is neither a checkpoint (no {METADATA}) "
            f"nor a folder of checkpoints (no step-N), nor released weights (no {' or '.join(RELEASED)})"
        )
    return sorted(steps, key=lambda p: (step_of(p.name), p.name), reverse=True)


def has_checksums(path: Path) -> bool:
    """Whether a folder of initial weights can be verified.
    One of ours that lost its manifest counts, and fails.
    """
    return (path / MANIFEST).exists() or (path / MODEL_SHAPE).exists()


def load_initial_weights(
    reader: TensorReader,
    path: Path,
    model: Mapping[str, Tensor],
    excluded: Sequence[str],
    ranks: RankGroup,
    row_orders: RowOrders | None = None,
) -> None:
    """Fills `model` from the `model.*` tensors that `reader` finds in `path`;
    see Checkpointer.load_initial.
    """
    saved = {key: TensorEntry.of(info) for key, info in ranks.from_rank0(reader.tensors).items()}

    excluded = [name for name in excluded if contract.is_excluded(name, ["model"])]
    wanted = tensor_table({"model": dict(model)})
    contract.check_exclusions(excluded, wanted, "the model")
    taken = contract.plan_initial_load(saved, wanted, excluded, str(path))
    read_tensors(
        reader,
        {"model": {key.removeprefix("model."): model[key.removeprefix("model.")] for key in taken}},
        ranks,
        row_orders,
    )

    # Nothing of it is silent: what stays, what is cast and what is left over.
    for key in sorted({*wanted} - {*taken}):
        reason = "excluded by checkpoint.exclude_from_loading" if key in saved else f"not in {path}"
        logger.warning("%s keeps its initial value: %s", key, reason)
    if converted := [key for key in taken if saved[key].dtype != wanted[key].dtype]:
        logger.warning("converted from %s: %s", saved[converted[0]].dtype, listed(converted))
    if unused := sorted({*saved} - {*wanted}):
        logger.warning("%s also holds %s, which this model does not have", path, listed(unused))
    logger.info("initial weights: %d of %d tensors from %s", len(taken), len(wanted), path)


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
