"""Windows: how the ids of samples become rows of a batch. They are cut, packed and shifted here,
whoever reads them.

Cut: a window holds `seq_len + 1` ids, and the next one begins where it ends (`cut`). Packed: parts of several
samples follow one another without a gap (`pack`). Shifted: the first `seq_len` ids are a row's inputs, the
last `seq_len` its labels (`to_batch`).

An id that the model reads and must not learn to predict (padding, what a user says) is stored as its
complement, `~id`, which is negative. So it travels as ids do, through samples, pieces, caches and windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan_rd.batch import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Window:
    """ids: (S + 1,) integers, those that are no labels as complements; document_ids: (S,) int32 or None;
    position: of the window after this one.
    """

    ids: np.ndarray
    document_ids: np.ndarray | None
    position: object


def cut(take: Callable[[int], np.ndarray], seq_len: int) -> list[np.ndarray]:
    """The next `seq_len + 1` ids, as parts of samples.

    take: count -> that many ids of the present sample, or fewer (none too) at its end;
    moves on by what it gives.
    """
    parts, needed = [], seq_len + 1
    while needed:
        part = take(needed)
        needed -= len(part)
        if len(part):
            parts.append(part)
    return parts


def pack(parts: list[np.ndarray], position: object, document_mask: bool, border_id: int | None) -> Window:
    """One window of consecutive parts of samples. Documents are the parts, or end at `border_id` if that is
    given, at its complement too: what is read as an end is one.
    """
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not document_mask:
        return Window(ids, None, position)
    if border_id is not None:
        starts = np.zeros(len(ids) - 1, np.int32)
        starts[1:] = (ids[:-2] == border_id) | (ids[:-2] == ~border_id)
        return Window(ids, np.cumsum(starts, dtype=np.int32), position)
    documents = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return Window(ids, documents[:-1], position)


def to_batch(windows: Sequence[Window]) -> Batch:
    """One microbatch: complements are ids in the inputs, and IGNORE_INDEX in the labels."""
    stored = torch.from_numpy(np.stack([window.ids for window in windows]).astype(np.int64))
    inputs, labels = stored[:, :-1], stored[:, 1:]
    inputs = torch.where(inputs < 0, ~inputs, inputs)
    labels = labels.masked_fill(labels < 0, IGNORE_INDEX)
    # Of all or of none.
    documents = [window.document_ids for window in windows if window.document_ids is not None]
    return Batch(inputs, labels, torch.from_numpy(np.stack(documents)) if documents else None)


def has_label(ids: np.ndarray) -> bool:
    """Whether anything is learned of one window's ids, of which the first is no label."""
    return bool((ids[1:] >= 0).any())
