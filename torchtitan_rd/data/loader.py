"""From positions to batches: reader processes or none, one thread that assembles ahead, an exact position."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.data
from torchdata.nodes import Batcher, IterableWrapper, Mapper, PinMemory, Prefetcher

from torchtitan_rd.batch import Batch
from torchtitan_rd.data.batch_dims import BatchDims
from torchtitan_rd.data.cursor import Reader
from torchtitan_rd.data.fingerprint import check_fingerprint, check_same_data
from torchtitan_rd.data.mixture import Mixture, describe
from torchtitan_rd.data.windows import Window, to_batch
from torchtitan_rd.errors import DataError, TorchtitanRDError
from torchtitan_rd.log import logger

_STAGES_AHEAD = 2
_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class _Stage:
    batches: list[Batch]
    positions: list[Any]

    def pin_memory(self) -> "_Stage":
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class BatchLoader:
    """Endless steps of one rank, as many microbatches each as its share of the global batch has (`dims`).

    readers: one a row of this rank's share of a stage, or one for all of them (a stream).
    start: the position at which each reader begins.
    fingerprint: what the position depends on; compared on resume.
    record: what is read and what is not, for the folder of the run.
    mixture: whose readers these are.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        start: Sequence[Any],
        dims: BatchDims,
        *,
        fingerprint: dict[str, Any],
        num_workers: int = 0,
        pin_memory: bool = False,
        restart_on_rank_change: bool = False,
        record: dict[str, Any] | None = None,
        mixture: Mixture | None = None,
    ):
        self._mixture = mixture
        self.record = record or {}
        self.fingerprint = fingerprint
        self.dims = dims
        self.num_workers = _workers_for(len(readers), num_workers)
        self._readers = list(readers)
        self._start = list(start)
        self._positions = list(start)
        self._pin_memory = pin_memory
        self._restart_on_rank_change = restart_on_rank_change
        self._epochs = self._latest_epochs()
        self._stages: Iterator[_Stage | TorchtitanRDError] | None = None
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._source: _Feed | None = None

    def next_step(self, stages: int | None = None) -> list[Batch]:
        """This rank's share of the next global batch, as microbatches. Raises DataError.

        stages: how much of it to read (`BatchDims.stages_at`); None: all of it.
        """
        stages = self.dims.stages if stages is None else stages
        batches = [batch for _ in range(stages) for batch in self._next_stage()]
        return [replace(batch, rows=self.dims.rows_of(number)) for number, batch in enumerate(batches)]

    def _next_stage(self) -> list[Batch]:
        if self._stages is None:
            self._stages = self._open()
        stage = next(self._stages)
        if isinstance(stage, TorchtitanRDError):
            raise stage
        self._positions = stage.positions
        self._report_epoch()
        return stage.batches

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that `next_step` returned, JSON-able; see `merge_states`."""
        return {
            "fingerprint": self.fingerprint,
            "positions": [p if isinstance(p, dict) else list(p) for p in self._positions],
        }

    def describe(self, gather: Callable[[list[float]], list[list[float]] | None]) -> dict[str, float]:
        """For a row of metrics: what each source of a mixture has given (`Mixture.row`), on the rank to which
        `gather` brings the numbers of all; elsewhere, and without a mixture, nothing. Collective.
        """
        return describe(self._mixture, self._positions, gather)

    def repeats(self) -> bool:
        """Whether something of the data has been read more than once, in this rank's rows."""
        return any(_is_in_a_second_epoch(position) for position in self._positions)

    def load_state_dict(self, merged: dict[str, Any]) -> None:
        """Continues from what `merge_states` made of the states of all ranks, of any number of them.

        Raises DataError if the position has no meaning here.
        """
        self.close()
        check_fingerprint(merged["fingerprint"], self.fingerprint)
        positions, readers = merged["positions"], len(self._readers)
        rank, degree = self.dims.data_rank, self.dims.data_degree
        if len(positions) == readers * degree:
            self._positions = positions[rank * readers : (rank + 1) * readers]
        elif self._restart_on_rank_change:
            logger.warning(
                "data: the position of a stream of %d ranks has no meaning on %d: beginning the data anew",
                len(positions),
                degree,
            )
            self._positions = list(self._start)
        else:
            raise DataError(
                f"the data was streamed on {len(positions)} data ranks and cannot be continued on {degree}: "
                f"use {len(positions)}, or set training.on_rank_change = 'restart' to begin the data anew, "
                f"or prepare it on disk (training.stream = false) in a new run"
            )
        self._epochs = self._latest_epochs()

    def close(self) -> None:
        """Ends reader processes and threads; a later `next_step` starts them again where this one stood."""
        if self._source is not None:
            self._source.close()
        self._stages = self._source = None
        for reader in self._readers:
            reader.close()
        for worker in self._workers:
            if worker.is_alive():
                with contextlib.suppress(RuntimeError):  # torch reports a killed worker from a signal handler
                    worker.kill()
                    worker.join()
        self._workers = set()
        atexit.unregister(self.close)

    def _open(self) -> Iterator[_Stage | TorchtitanRDError]:
        # A process that ends without close() would wait for its workers for ever,
        # or abort in a stream's thread.
        atexit.register(self.close)
        windows = _Windows(self._readers, self._positions)

        if self.num_workers:
            # What was read ahead in this process would only be copied into each worker.
            for reader in self._readers:
                reader.close()
            # Ours are those that appear below: torch keeps its list to itself, and close() must end them.
            others = set(multiprocessing.active_children())
            source: Iterator[Window | TorchtitanRDError] = iter(
                torch.utils.data.DataLoader(
                    windows,
                    batch_size=None,
                    num_workers=self.num_workers,
                    prefetch_factor=max(2, _STAGES_AHEAD * self.dims.rows_per_rank // self.num_workers),
                    collate_fn=_as_is,  # arrays travel by pipe: no shared memory segment a row
                    worker_init_fn=_begin_worker,
                )
            )
            self._workers = set(multiprocessing.active_children()) - others
        else:
            source = iter(windows)

        self._source = _Feed(source)
        node = Mapper(Batcher(IterableWrapper(self._source), self.dims.rows_per_rank), self._assemble)
        if self._pin_memory:
            return PinMemory(node, pin_memory_device="cuda", snapshot_frequency=0)
        return Prefetcher(node, prefetch_factor=_STAGES_AHEAD, snapshot_frequency=0)

    def _assemble(self, windows: list[Window | TorchtitanRDError]) -> _Stage | TorchtitanRDError:
        good: list[Window] = []
        for window in windows:
            if isinstance(window, TorchtitanRDError):
                return window
            good.append(window)

        size = self.dims.local_batch_size
        batches = [to_batch(good[i : i + size]) for i in range(0, len(good), size)]
        return _Stage(batches, [window.position for window in good[-len(self._readers) :]])

    def _report_epoch(self) -> None:
        epochs = self._latest_epochs()
        for name, epoch in epochs.items():
            if epoch > self._epochs.get(name, 0):
                logger.info("data: epoch %d of %s begins (the first is 0)", epoch, name)
        self._epochs = epochs

    def _latest_epochs(self) -> dict[str, int]:
        """Of each data set, the epoch of the lane that is furthest."""
        latest: dict[str, int] = {}
        for position in self._positions:
            for name, epoch in _epochs_at(position, self.fingerprint["dataset"]).items():
                latest[name] = max(epoch, latest.get(name, 0))
        return latest


class _Feed:
    """Rows for torchdata's thread, until `close`, which waits for the read that is under way.

    So no thread is inside a reader, or waits for a worker process, when these are taken down.
    """

    def __init__(self, rows: Iterator):
        self._rows: Iterator | None = rows
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator:
        while True:
            with self._reading:
                if self._rows is None:
                    return
                row = next(self._rows)
            yield row

    def close(self) -> None:
        idle = self._reading.acquire(timeout=_CLOSE_SECONDS)
        if not idle:
            logger.warning(
                "data: a read has been hanging for %.0f s; closing regardless of it", _CLOSE_SECONDS
            )
        self._rows = None  # the last reference to torch's loader, which ends its workers here
        if idle:
            self._reading.release()


class _Windows(torch.utils.data.IterableDataset):
    """The windows of the readers in turn, endlessly. In a worker process, those of its share of the readers.

    Worker w of W takes the readers w, w + W, ...: torch asks the workers in turn, which restores the order.
    An error of ours is handed on as a row, again and again, so that it arrives with its own words.
    """

    def __init__(self, readers: list[Reader], positions: list[Any]):
        self.readers, self.positions = readers, positions

    def __iter__(self) -> Iterator[Window | TorchtitanRDError]:
        worker = torch.utils.data.get_worker_info()
        share = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        readers, positions = self.readers[share], self.positions[share]
        try:
            while True:
                for i, reader in enumerate(readers):
                    row = reader.read(positions[i])
                    positions[i] = row.position
                    yield row
        except TorchtitanRDError as error:
            while True:
                yield error


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all data ranks, in rank order -> the one state of the run,
    for `BatchLoader.load_state_dict`.
    """
    check_same_data([state["fingerprint"] for state in states])
    return {
        "fingerprint": states[0]["fingerprint"],
        "positions": [position for state in states for position in state["positions"]],
    }


def _epochs_at(position: Any, name: str) -> dict[str, int]:
    """By data set: of a lane's cursor, of a stream's position (both of data set `name`), of a mixture's."""
    if not isinstance(position, dict):
        return {name: position[0]}
    if "sources" in position:
        return {source: cursor[0] for source, cursor in position["sources"].items()}
    return {name: position["epoch"]}


def _is_in_a_second_epoch(position: Any) -> bool:
    """Whether it has begun: a cursor stands at its beginning as soon as the first one ends."""
    if not isinstance(position, dict):
        return tuple(position[:3]) > (1, 0, 0)
    if "sources" in position:
        return any(map(_is_in_a_second_epoch, position["sources"].values()))
    return position["epoch"] > 0


def _workers_for(readers: int, wanted: int) -> int:
    """The largest number of workers, at most `wanted`, that share the readers evenly."""
    workers = max((n for n in range(1, wanted + 1) if readers % n == 0), default=0)
    if workers != wanted:
        logger.info(
            "data: %d of training.num_workers = %d readers used: they serve whole rows", workers, wanted
        )
    return workers


def _begin_worker(worker: int) -> None:
    """A signal to the process group is the trainer's to answer (it saves):
    reader processes go on until it ends.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    """torch's own watchdog does not see a killed parent while a worker waits to hand over a row."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _as_is(window: Any) -> Any:
    return window
