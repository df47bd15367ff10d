"""Ends a rank whose launcher has died: nobody would signal it, restart it or take its place any more.

torchrun that is killed (kill -9, out of memory) leaves its ranks behind: they train on, or wait in a
collective, and hold their GPUs, the folder's lock and the rendezvous' port. A thread asks for the parent of
this process, which changes when the parent dies. It needs nothing of the system but getppid, and works while
the main thread waits in C.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.5
GRACE_SECONDS = 8.0
"""For the step that is under way and its checkpoint; after it the process ends whatever it is doing."""


@contextmanager
def launcher_watched(
    ask: Callable[[str], None], end: Callable[[str], None], is_launched: bool = True
) -> Iterator[Callable[[], str | None]]:
    """Within it the death of this process's parent ends the process, in a thread. Gives what says, when it is
    called, that the parent has died, or None.

    is_launched: without a launcher nobody is watched.
    ask: told the reason at once; asks the main thread to end. end: told it again after GRACE_SECONDS; ends
    the process.
    """
    if not is_launched:
        yield lambda: None
        return
    launcher, closing = os.getppid(), threading.Event()

    def look() -> str | None:
        return None if os.getppid() == launcher else f"the launcher (process {launcher}) has died"

    def watch() -> None:
        while (reason := look()) is None:
            if closing.wait(POLL_SECONDS):
                return
        ask(reason)
        if not closing.wait(GRACE_SECONDS):
            end(reason)

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield look
    finally:
        closing.set()
        thread.join()
