"""Lets torch.distributed.checkpoint load `Weights` into a sharded model, each rank taking its part."""

from dataclasses import asdict
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.checkpoint.safe_reader import PlainReader
from torchtitan_rd.conversion.weights import Weights
from torchtitan_rd.parallelism.local_part import narrowed

PREFIX = "model."


class WeightsReader(PlainReader):
    """A `storage_reader` for `torch.distributed.checkpoint.load`,
    with the keys of our checkpoints (`model.<name>`).

    Each rank reads every whole tensor that it holds a part of, one at a time: rows change places on the way.
    """

    def __init__(self, weights: Weights):
        self.weights = weights

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and type of every tensor by its key."""
        return {PREFIX + name: info for name, info in self.weights.tensors.items()}

    def model_shape(self) -> dict[str, Any]:
        return asdict(self.weights.shape)

    def read_metadata(self) -> Metadata:
        entries: dict[str, STORAGE_TYPES] = {}
        storage: dict[MetadataIndex, None] = {}
        for key, (shape, dtype) in self.tensors().items():
            start = torch.Size([0] * len(shape))
            chunks = [ChunkStorageMetadata(start, shape)]
            entries[key] = TensorStorageMetadata(TensorProperties(dtype), shape, chunks)
            storage[MetadataIndex(key, start)] = None
        return Metadata(entries, storage_data=storage)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_key: dict[str, list] = {}
        for item in plan.items:
            by_key.setdefault(item.storage_index.fqn, []).append(item)
        for key, items in by_key.items():
            whole = self.weights.read(key.removeprefix(PREFIX))
            for item in items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(narrowed(whole, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
