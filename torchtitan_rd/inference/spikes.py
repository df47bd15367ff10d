"""Continuing recordings: spike counts of neurons as tokens (data/spikes.py has the layout).

A time bin is the separator and one count a neuron. So every (n + 1)-th token is forced to be the separator,
and no other may be one. Names: n neurons, T time bins.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data import DATASETS, DatasetKeys
from torchtitan_rd.data.raster import draw
from torchtitan_rd.data.sources import build_encoder, open_source
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.generation import Constraint
from torchtitan_rd.whole_file import whole_file

_SPIKING = 0.1  # of the neurons, in bin 0 of a recording from nothing


@dataclass(frozen=True)
class SpikePrompt:
    """name: of the file that is written, without what was generated. counts: (n, T), T at least 1. truth: (n,
    T'), T' >= T, what was recorded in these bins and in those to come, as far as there are any; None if
    nothing was recorded.
    """

    name: str
    counts: np.ndarray
    truth: np.ndarray | None

    @property
    def neurons(self) -> int:
        return len(self.counts)


def conditional(
    dataset: str,
    *,
    path: str | None,
    split: str,
    index: int,
    ctx_t: int,
    gen_t: int,
    vocab_size: int,
    seed: int,
) -> SpikePrompt:
    """The first ctx_t time bins of row `index`, with gen_t more as the truth.

    dataset: a row of the table of data sets, of kind spikes. path: where to read it instead.
    Raises ConfigError, DataError.
    """
    row = DATASETS.get(dataset)
    if row is None or row.kind != "spikes":
        known = [name for name, other in DATASETS.items() if other.kind == "spikes"]
        raise ConfigError(f"--dataset {dataset} is no data set of spikes{nearest(dataset, known)}")
    keys = DatasetKeys.model_validate({"dataset": dataset, "dataset_path": path})
    source, _ = open_source(keys, row, build_encoder(keys, row.kind, None, vocab_size), seed, split)
    if not 0 <= index < len(source):
        raise ConfigError(f"--data-idx {index}: {dataset} has the rows 0 to {len(source) - 1}")
    counts = counts_of(source.tokens(index), vocab_size - 1)
    if counts.shape[1] < ctx_t:
        raise ConfigError(f"--ctx-t {ctx_t}: row {index} of {dataset} has {counts.shape[1]} time bins only")
    name = f"{dataset}-{split}-sample-{index}-{ctx_t}"
    return SpikePrompt(name, counts[:, :ctx_t], counts[:, : ctx_t + gen_t])


def unconditional(neurons: int, seed: int) -> SpikePrompt:
    """One bin in which a tenth of the neurons, drawn from the seed, spike once."""
    counts = np.zeros((neurons, 1), np.int64)
    chosen = np.random.default_rng(seed).choice(neurons, round(neurons * _SPIKING), replace=False)
    counts[chosen] = 1
    return SpikePrompt(f"unconditional-sample-{neurons}", counts, None)


def ids_of(counts: np.ndarray, separator: int) -> list[int]:
    """(n, T) -> T (n + 1) ids."""
    return np.concatenate((np.full((1, counts.shape[1]), separator), counts)).T.reshape(-1).tolist()


def counts_of(ids: Sequence[int] | np.ndarray, separator: int) -> np.ndarray:
    """Inverse of `ids_of` -> (n, T) int64."""
    ids = np.asarray(ids, np.int64)
    bins = int((ids == separator).sum())
    return ids.reshape(bins, -1)[:, 1:].T


def bins_of(neurons: int, separator: int, vocab_size: int) -> Constraint:
    """Lets the separator be at the start of each time bin, after a prompt of whole bins, and nowhere else.
    Rows of the vocabulary beyond the separator (padding) may be nowhere.
    """

    def constrain(number: int, logits: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
        if number % (neurons + 1) == 0:
            allowed[separator] = True
        else:
            allowed[:separator] = True
        return logits.masked_fill(~allowed, -torch.inf)

    return constrain


def make_folder(folder: Path) -> None:
    """For `save`. Raises ConfigError if nothing can be written there: before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} is no folder to write to: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {folder} may not be written: its permissions forbid it")


def save(
    folder: Path, prompt: SpikePrompt, generated: Sequence[int], gen_t: int, separator: int, suffix: str = ""
) -> Path:
    """Writes ids as the ancestor of this program does: prompt, gen,
    gt (all in token order; gt without recording: empty) and n_neurons, to <name>-<gen_t>.npz. Raises
    ConfigError if it cannot be written, and leaves no part of it.
    """
    path = folder / f"{prompt.name}-{gen_t}{suffix}.npz"
    truth = [] if prompt.truth is None else ids_of(prompt.truth, separator)
    with whole_file(path, "the generated ids") as part:
        np.savez(
            part,
            prompt=np.array(ids_of(prompt.counts, separator)),
            gen=np.array(generated),
            gt=np.array(truth, dtype=np.int64),
            n_neurons=prompt.neurons,
        )
    return path


def raster(path: Path, prompt: SpikePrompt, generated: np.ndarray) -> None:
    """A PNG of the counts (neurons by time bins): prompt and generated (n, T),
    and below it what was recorded.
    """
    shown = {"prompt and generated": np.concatenate((prompt.counts, generated), axis=1)}
    if prompt.truth is not None:
        shown["recorded"] = prompt.truth
    # A recording says what counts are usual; a poor model's largest would leave nothing of it to be seen.
    most = int(shown.get("recorded", shown["prompt and generated"]).max())
    axis = "time bin (right of the line: to be predicted)"
    draw(path, shown, most=most, label=axis, line=prompt.counts.shape[1] - 0.5)
