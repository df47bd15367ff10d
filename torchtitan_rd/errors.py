"""The mistakes a user can make, one class a kind. Each message names the key, file or row and the remedy."""

import difflib
import errno
import traceback
from collections.abc import Iterable


class TorchtitanRDError(Exception):
    """Base of every error that the command line prints as one message, without a traceback."""


class ConfigError(TorchtitanRDError):
    """A setting is unknown, of the wrong type, out of range or at odds with another one or
    with this machine.
    """


class DataError(TorchtitanRDError):
    """A data set is missing, unreadable, or holds values that the model cannot take."""


class CheckpointError(TorchtitanRDError):
    """A checkpoint is missing, damaged, unsafe, or does not belong to this run."""


class ClusterError(TorchtitanRDError):
    """The machines do not work together: a collective gives a wrong result or none."""


class TrainingError(TorchtitanRDError):
    """Training itself must stop: a non-finite loss or gradient under `training.on_nonfinite = "stop"`,
    or a block that would be compiled again under `compile.fail_on_recompile`.
    """


class RestartLoopError(TorchtitanRDError):
    """One step fails each time that it is reached: another start would only fail again."""


def report(error: BaseException, rank: int) -> str:
    """What the command line says of `error`: a user's mistake is one message,
    any other a traceback naming the rank.
    """
    if isinstance(error, TorchtitanRDError):
        return f"{type(error).__name__}{f' on rank {rank}' if rank else ''}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"rank {rank}: {error}: free some space or move job.dump_folder"
    return f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for a close match, else the list of what is known."""
    known = list(known)
    by_lower = {str(other).lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else f"; known: {', '.join(map(str, known))}"


def listed(names: Iterable[object], limit: int = 6) -> str:
    """`a, b, c and 12 more`."""
    all_names = [str(name) for name in names]
    shown = ", ".join(all_names[:limit])
    return shown if len(all_names) <= limit else f"{shown} and {len(all_names) - limit} more"
