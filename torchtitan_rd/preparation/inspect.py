"""What data looks like: rows as text, which tokens there are and how many, how often neurons spike.

Every function returns plain values, which `torchtitan-rd data inspect` prints as tables or as JSON.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_rd.data.arrow import (
    SOURCE_COLUMN,
    Encoder,
    SampleSource,
    TableSource,
    check_path,
    open_table,
    read_row,
)
from torchtitan_rd.data.chat import ChatEncoder
from torchtitan_rd.data.check import count_of, each_row
from torchtitan_rd.data.column_types import is_list
from torchtitan_rd.data.prepacked import PackedEncoder
from torchtitan_rd.data.raster import draw
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE, SpikeEncoder
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.errors import ConfigError, DataError

COLUMNS = ("spike_counts", "input_ids", "text")
_SOURCES = (SOURCE_COLUMN, "source")
_PROBLEMS = 5  # that are named
_CHARACTERS = 400  # of a row that is shown
_IDS = 20_000  # that are decoded for them: more than there can be in so many characters

Source = TableSource | SampleSource


def open_path(
    path: str, split: str, column: str | None, tokenizer: Tokenizer | None
) -> tuple[TableSource, Encoder]:
    """The rows of files, a folder or a repository on the hub, whose column says by its name and type what
    they are. tokenizer: of text; and of packed rows, where it is known.

    Raises ConfigError, DataError.
    """
    found = check_path(path, split)
    table = open_table(path, path, None, False, split, found)
    if column is None:
        column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None or column not in table.column_names:
        raise DataError(
            f"{path}: has no column {column or ' or '.join(COLUMNS)}, only {', '.join(table.column_names)}; "
            "name the one to look at with --column"
        )

    type_ = table.data.schema.field(column).type
    type_ = getattr(type_, "storage_type", type_)  # Array2D of `datasets` is an extension type
    encoder: Encoder
    if not is_list(type_):
        if tokenizer is None:
            raise ConfigError(
                f"{path}: column {column!r} is text: name a tokenizer, such as --tokenizer bytes"
            )
        encoder = TextEncoder(tokenizer, tokenizer.vocab_size, column)
    elif is_list(type_.value_type):
        encoder = SpikeEncoder(SPIKE_VOCAB_SIZE, column)
    else:
        # The rows' own length says how long they are; and any id may be there.
        encoder = PackedEncoder(0, tokenizer.vocab_size if tokenizer else 0, column=column)
    return TableSource(path, table, encoder, found), encoder


def look_at_tokens(source: Source, tokenizer: Tokenizer | None, *, shown: int, most_rows: int | None) -> dict:
    """Of text or packed rows: the first rows decoded, how long rows are, how often each token occurs.

    tokenizer: None where packed ids cannot be decoded; then the vocabulary is taken to end with the largest.
    """
    vocab_size = source.encoder.vocab_size or 0
    counts = np.zeros(vocab_size, np.int64)
    outside = 0
    lengths: list[int] = []
    rows: list[dict[str, Any]] = []
    problems: list[str] = []

    for index, read in islice(each_row(source), most_rows):
        try:
            ids = _ids_of(source.encoder, read(), source.where(index))
        except DataError as error:
            problems.append(str(error))
            continue
        fitting = ids[(ids >= 0) & (ids < vocab_size)] if vocab_size else ids[ids >= 0]
        outside += len(ids) - len(fitting)
        found = np.bincount(fitting, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        lengths.append(len(ids))
        if len(rows) < shown:
            rows.append({"row": index, "length": len(ids), "text": _decoded(ids, tokenizer)})

    return {
        **_about(source, most_rows, problems),
        "kind": "tokens",
        "tokens": int(sum(lengths)),
        "lengths": quantiles(lengths),
        "empty": sum(length == 0 for length in lengths),
        "vocabulary": len(counts),
        "used": int((counts > 0).sum()),
        "outside": outside,
        "most": _tokens(counts, tokenizer, np.argsort(-counts, kind="stable")[: shown_tokens(counts)]),
        "least": _tokens(counts, tokenizer, _rarest(counts)),
        "shown": rows,
    }


def look_at_spikes(source: Source, *, bin_ms: float, shown: int, most_rows: int | None) -> dict:
    """Of recordings: how many neurons and bins, how often each neuron spikes, and what cannot be a token.

    Rates are of each neuron of each row, in spikes per second. collisions: counts of 255 or more, which would
    be taken for the separator of time bins; negative: counts below 0. Neither can be trained on.
    """
    neurons: list[int] = []
    bins: list[int] = []
    rates: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    spikes = collisions = negative = largest = 0

    for index, read in islice(each_row(source), most_rows):
        try:
            counts = read()
        except DataError as error:
            problems.append(str(error))
            continue
        sums = counts.sum(axis=1, dtype=np.int64)
        spikes += int(sums.sum())
        collisions += int((counts >= SPIKE_VOCAB_SIZE - 1).sum())
        negative += int((counts < 0).sum())
        largest = max(largest, int(counts.max(initial=0)))

        neurons.append(counts.shape[0])
        bins.append(counts.shape[1])
        if counts.size:
            rates.append(sums / (counts.shape[1] * bin_ms / 1000))
        if len(rows) < shown:
            rows.append({"row": index, "neurons": neurons[-1], "bins": bins[-1], "spikes": int(sums.sum())})

    of_neurons = np.concatenate(rates) if rates else np.zeros(0)
    return {
        **_about(source, most_rows, problems),
        "kind": "spikes",
        "tokens": sum((n + 1) * b for n, b in zip(neurons, bins, strict=True) if n),
        "empty": sum(n * b == 0 for n, b in zip(neurons, bins, strict=True)),
        "neurons": quantiles(neurons),
        "bins": quantiles(bins),
        "bin_ms": bin_ms,
        "spikes": spikes,
        "rates_hz": quantiles(of_neurons),
        "neuron_rows": len(of_neurons),
        "silent": int((of_neurons == 0).sum()),
        "largest": largest,
        "collisions": collisions,
        "negative": negative,
        "shown": rows,
    }


def draw_row(source: Source, path: Path, *, row: int, most_bins: int) -> None:
    """A PNG of the first bins of one recording. Raises ConfigError, DataError."""
    if not 0 <= row < len(source):
        raise ConfigError(f"--row {row}: {source.name} has the rows 0 to {len(source) - 1}")
    where = source.where(row)
    if isinstance(source, TableSource):
        counts = read_row(source.table[row], source.encoder, where)
    else:
        counts = source.samples[row]
    if not counts.size:
        raise DataError(f"{where}: is empty, so that there is nothing to draw")
    shown = counts[:, :most_bins]
    title = f"{where}: {len(counts)} neurons, {shown.shape[1]} of {counts.shape[1]} time bins"
    draw(path, {title: shown}, most=int(shown.max()), label="time bin")


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, smallest, largest and what lies between; nothing of no values."""
    if not len(values):
        return {}
    cuts = dict(zip(("min", "5 %", "median", "95 %", "max"), (0, 0.05, 0.5, 0.95, 1), strict=True))
    return {"mean": float(np.mean(values))} | {
        name: float(np.quantile(values, share)) for name, share in cuts.items()
    }


def shown_tokens(counts: np.ndarray) -> int:
    """How many of the tokens that occur are listed at either end."""
    return min(10, int((counts > 0).sum()))


def _rarest(counts: np.ndarray) -> np.ndarray:
    """Of the tokens that occur, the ids of the rarest, rarest first."""
    used = np.flatnonzero(counts)
    return used[np.argsort(counts[used], kind="stable")][: shown_tokens(counts)]


def _tokens(counts: np.ndarray, tokenizer: Tokenizer | None, ids: np.ndarray) -> list[dict[str, Any]]:
    total = max(int(counts.sum()), 1)
    return [
        {
            "id": int(id_),
            "piece": tokenizer.decode([int(id_)]) if tokenizer else "",
            "count": int(counts[id_]),
            "share": int(counts[id_]) / total,
        }
        for id_ in ids
    ]


def _ids_of(encoder: Encoder, value: Any, where: str) -> np.ndarray:
    """Packed rows as they lie, of whatever length; all others as they are trained on, what is read and not
    learned of a conversation included.
    """
    if isinstance(encoder, PackedEncoder):
        return value
    ids = encoder.encode(value, where)
    return np.where(ids < 0, ~ids, ids) if isinstance(encoder, ChatEncoder) else ids


def _decoded(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids[: _CHARACTERS // 4].tolist()))
    known = ids[:_IDS][(ids[:_IDS] >= 0) & (ids[:_IDS] < tokenizer.vocab_size)]
    return tokenizer.decode(known)[:_CHARACTERS]


def _about(source: Source, most_rows: int | None, problems: list[str]) -> dict[str, Any]:
    """What holds of rows of every kind."""
    rows = count_of(source) if most_rows is None else min(count_of(source), most_rows)
    return {
        "name": source.name,
        "rows": rows,
        "rows_in_all": len(source),
        "sources": _sources(source, rows),
        "unreadable": len(problems),
        "problems": problems[:_PROBLEMS],
    }


def _sources(source: Source, rows: int) -> dict[str, int]:
    """Source -> rows, the largest first; nothing where rows do not say."""
    if not isinstance(source, TableSource):
        return {}
    column = next((name for name in _SOURCES if name in source.table.column_names), None)
    if column is None:
        return {}
    cells = source.table.with_format("arrow", columns=[column])[:rows].column(column)
    counts = {str(entry["values"]): entry["counts"] for entry in cells.value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
