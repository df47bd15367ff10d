"""Writes one checkpoint: staging folder, shards, hashes, manifest, rename; in any thread, on any ranks."""

import dataclasses
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from torchtitan_rd import __version__
from torchtitan_rd.checkpoint.arranged_rows import ArrangedSavePlanner, RowOrders
from torchtitan_rd.checkpoint.folders import CheckpointFolder, write_durably
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.manifest import FileTable, Manifest, TensorTable, hash_files, verify
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.checkpoint.safe_reader import METADATA
from torchtitan_rd.checkpoint.save_errors import LostRankError
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger
from torchtitan_rd.parallelism.local_part import local

# Without a process group torch says at each save and load that it assumes a single process, which is so.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class Snapshot:
    """What is to be written, fixed at the moment of the save.

    tensors: {group: {name: tensor or DTensor}}, which nobody changes until the write has ended.
    aliases: `group.name` of a further name of a tensor -> the `group.name` in `tensors`;
        its bytes are written once.
    table: names, shapes and types of all, aliases too. documents: name -> text of the small files beside
    them, written by rank 0. own_documents: those of this rank alone, with names that begin with `__RANK_`.
    """

    name: str
    step: int
    resumable: bool
    tensors: dict[str, dict[str, Tensor]]
    aliases: dict[str, str]
    table: TensorTable
    documents: dict[str, str]
    own_documents: dict[str, str]

    def stored_bytes(self) -> int:
        """Bytes of all tensors together, each counted once whatever its sharding."""
        entries = (entry for key, entry in self.table.items() if key not in self.aliases)
        return sum(
            torch.Size(entry.shape).numel() * getattr(torch, entry.dtype).itemsize for entry in entries
        )


def find_aliases(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """`group.name` of each tensor that lies in the same memory as an earlier one of its
    group -> that one's name.

    A head that is tied to the embedding has two names. Ask rank 0: another rank may hold no row of either.
    """
    found: dict[str, str] = {}
    for group, members in tensors.items():
        first: dict[tuple, str] = {}
        for name, tensor in members.items():
            own = local(tensor)
            if own.numel() == 0:
                continue
            place = (own.data_ptr(), own.dtype, own.stride(), tuple(own.shape), tuple(tensor.shape))
            if place in first:
                found[f"{group}.{name}"] = f"{group}.{first[place]}"
            first.setdefault(place, name)
    return found


class _AliasWriter(FileSystemWriter):
    """Lists each alias in `.metadata` at the place of the tensor that was written,
    so that any reader finds both.
    """

    def __init__(self, folder: Path, aliases: Mapping[str, str]):
        super().__init__(folder, sync_files=True, overwrite=False)
        self.aliases = aliases

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        again = []
        for alias, source in self.aliases.items():
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[source]
            metadata.planner_data[alias] = tuple(alias.split(".", 1))
            again += [
                dataclasses.replace(
                    result, index=MetadataIndex(alias, result.index.offset, result.index.index)
                )
                for result in written
                if result.index.fqn == source
            ]
        super().finish(metadata, [*results, again])


def writer_thread() -> ThreadPoolExecutor:
    """One thread, which is waited for at interpreter exit, so that a run that ends without close() keeps its
    save. A new thread would otherwise open a CUDA context on device 0, whichever device this rank uses.
    """
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1, "checkpoint")
    return ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (torch.cuda.current_device(),))


@dataclass(eq=False)
class Writer:
    """Writes snapshots into `folder`, one at a time. Rank 0 holds `lock`."""

    folder: CheckpointFolder
    ranks: RankGroup
    lock: FolderLock | None
    keep_latest_k: int
    row_orders: RowOrders

    def write(self, snapshot: Snapshot) -> None:
        """Collective. Returns after the commit, or raises CheckpointError on every rank with
        nothing committed.
        """
        ranks, where = self.ranks, self.folder.root / snapshot.name
        try:
            staging = ranks.from_rank0(lambda: self.folder.new_staging(snapshot.name))
            try:
                ranks.agree(lambda: self._write_shards(snapshot, staging))
                hashes = ranks.agree(lambda: self._hash_own_files(staging))
                ranks.from_rank0(lambda: self._commit(snapshot, staging, hashes))
            except CheckpointError:
                ranks.from_rank0(lambda: self.folder.discard(staging))
                raise
        except CheckpointError as error:
            raise CheckpointError(f"{where} was not saved ({self._room()}): {error}") from error
        except RuntimeError as error:  # of gloo: a rank died or was silent for too long
            raise LostRankError(f"{where} was not saved: lost contact with another rank: {error}") from error

    def _room(self) -> str:
        try:
            return f"{self.folder.free_bytes():,} bytes are free there"
        except OSError as error:
            return f"the folder is out of reach: {error.strerror}"

    def _write_shards(self, snapshot: Snapshot, staging: Path) -> None:
        writer = _AliasWriter(staging, snapshot.aliases)
        planner = ArrangedSavePlanner(self.row_orders)
        dcp.save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=self.ranks.group)
        for name, text in snapshot.own_documents.items():
            write_durably(staging / name, text)

    def _hash_own_files(self, staging: Path) -> FileTable:
        names = sorted(path.name for path in staging.glob(f"__{self.ranks.rank}_*"))
        return hash_files(staging, names + ([METADATA] if self.ranks.rank == 0 else []))

    def _commit(self, snapshot: Snapshot, staging: Path, hashes: list[FileTable]) -> None:
        """On rank 0. Every shard is on storage already: torch forces each to storage as it writes."""
        files = {name: entry for table in hashes for name, entry in table.items()}
        for name, entry in files.items():
            if not (staging / name).is_file() or (staging / name).stat().st_size != entry.size:
                raise CheckpointError(
                    f"rank 0 does not see {staging / name}: the folder must be shared by all nodes"
                )

        for name, text in snapshot.documents.items():
            write_durably(staging / name, text)
        manifest = Manifest(
            step=snapshot.step,
            resumable=snapshot.resumable,
            world_size=self.ranks.world_size,
            torch_version=torch.__version__,
            program_version=__version__,
            files=files | hash_files(staging, list(snapshot.documents)),
            tensors=snapshot.table,
        )
        manifest.write(staging)

        # A run that was suspended may have lost the folder to another one meanwhile.
        if self.lock is not None:
            self.lock.require_held()
        self.folder.set_aside_from(snapshot.step, snapshot.name)
        self.folder.commit(staging, snapshot.name)
        logger.info("saved %s (%.1f MB)", self.folder.root / snapshot.name, snapshot.stored_bytes() / 1e6)

        try:
            self.folder.purge(self.keep_latest_k, lambda path: not verify(path, hashes=False))
        except OSError as error:  # the new checkpoint is safe; the next save tries again
            logger.warning("cannot remove an old checkpoint: %s", error)
