"""Work that is shared out to processes and comes back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from torchtitan_rd.errors import DataError
from torchtitan_rd.job import keep_tokenizers_on_one_core

Job = TypeVar("Job")

# In a process of a pool: what does its jobs.
_worker: Callable[[Any], Any] | None = None


@contextmanager
def ordered_results(
    make_worker: Callable[..., Callable[[Job], Any]], arguments: tuple, jobs: Iterable[Job], processes: int
) -> Iterator[Iterator[Any]]:
    """`make_worker(*arguments)(job)` of every job, in order, computed ahead in so many processes.

    With one, the work is done here. At most two jobs a process are ahead of what was taken, which bounds
    memory. A process ends with this one, however that ends. Raises what a worker raises; DataError if one of
    them is killed.
    """
    keep_tokenizers_on_one_core()
    if processes == 1:
        worker = make_worker(*arguments)
        yield (worker(job) for job in jobs)
        return

    pool = ProcessPoolExecutor(
        processes,
        mp_context=_context(make_worker.__module__),
        initializer=_begin,
        initargs=(make_worker, arguments),
    )
    try:
        yield _in_order(pool, jobs, ahead=2 * processes)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes documents was killed (out of memory?); run the same line again with "
            "fewer --processes: it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _context(module: str) -> multiprocessing.context.BaseContext:
    """How processes are begun: forked from one that has imported `module` and does nothing else.

    A fork of this process would copy locks that threads of arrow and torch hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Any], ahead: int) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    left = iter(jobs)
    waiting.extend(pool.submit(_work, job) for job in islice(left, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(_work, job) for job in islice(left, 1))
        yield result


def _begin(make_worker: Callable[..., Callable[[Any], Any]], arguments: tuple) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make_worker(*arguments)


def _end_with_parent() -> None:
    """Else a process would wait for work for ever once the first one was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Any) -> Any:
    if _worker is None:
        raise RuntimeError("a job came before the worker was made")
    return _worker(job)
