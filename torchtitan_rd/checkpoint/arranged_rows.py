"""Checkpoints hold the rows of every matrix in the order of the model; a run may have arranged them
otherwise (parallelism/row_order.py). So of an arranged matrix a rank writes, and reads, several pieces, each
of neighbouring rows, where torch knows one piece a rank. Nothing is copied and no rank is asked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan_rd.parallelism.row_order import RowOrder

RowOrders = Mapping[str, RowOrder]
"""Parameter name -> how its rows are arranged, and those of what an optimizer keeps of it."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Neighbouring rows of this rank: `rows` of its part, which stand at `chunk` in the checkpoint."""

    chunk: ChunkStorageMetadata
    rows: slice


class ArrangedSavePlanner(DefaultSavePlanner):
    """Writes matrices in the order of the model."""

    def __init__(self, orders: RowOrders):
        super().__init__()
        self.orders = orders

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        pieces = pieces_of(self.state_dict, self.orders)
        items = [item for item in plan.items if item.index.fqn not in pieces]
        for key, of_key in pieces.items():
            items += [_write_item(key, self.state_dict[key], piece.chunk) for piece in of_key]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return _piece(super().lookup_object(index), index, self.state_dict, self.orders)


class ArrangedLoadPlanner(DefaultLoadPlanner):
    """Reads matrices that are stored in the order of the model."""

    def __init__(self, orders: RowOrders):
        super().__init__()
        self.orders = orders

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        pieces = pieces_of(self.state_dict, self.orders)
        items = [item for item in plan.items if item.dest_index.fqn not in pieces]
        metadata: Any = self.metadata  # known by now, and a tensor's of each of these
        for key, of_key in pieces.items():
            stored = metadata.state_dict_metadata[key]
            items += create_read_items_for_chunk_list(key, stored, [piece.chunk for piece in of_key])
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _piece(super().lookup_tensor(index), index, self.state_dict, self.orders)


def pieces_of(tensors: Mapping[str, Any], orders: RowOrders) -> dict[str, list[Piece]]:
    """Key -> the pieces of this rank, of the tensors that are arranged.
    tensors: by flat keys, `model.<parameter>` or `optimizer.<parameter>.<state>`.
    """
    found = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        order = orders.get(name if group == "model" else name.rpartition(".")[0])
        if order is not None and isinstance(tensor, DTensor) and tensor.ndim:
            found[key] = _pieces(tensor, order)
    return found


def _pieces(tensor: DTensor, order: RowOrder) -> list[Piece]:
    (rows, *others), (first, *offsets) = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return [
        Piece(
            ChunkStorageMetadata(torch.Size([run.original, *offsets]), torch.Size([run.length, *others])),
            slice(run.arranged - first, run.arranged - first + run.length),
        )
        for run in order.runs(first, first + rows)
    ]


def _write_item(key: str, tensor: DTensor, chunk: ChunkStorageMetadata) -> WriteItem:
    properties = TensorProperties.create_from_tensor(tensor.to_local())
    return WriteItem(
        index=MetadataIndex(key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=tensor.size()),
    )


def _piece(own: Any, index: MetadataIndex, tensors: Mapping[str, Any], orders: RowOrders) -> Any:
    """own: this rank's part of the tensor that `index` names -> the piece that it means."""
    key = index.fqn
    pieces = pieces_of({key: tensors[key]}, orders)
    if key not in pieces:
        return own
    (rows,) = (piece.rows for piece in pieces[key] if piece.chunk.offsets == index.offset)
    return own[rows]
