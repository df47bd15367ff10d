"""n-gram counts with add-alpha smoothing: the baseline that a model of spikes has to beat.

P(t | c) = (N(c t) + alpha) / (N(c) + alpha V), c the n - 1 tokens before t, N counts in the training
data, V the size of the vocabulary (Jurafsky and Martin, Speech and Language Processing, chapter 3).
Tokens at the start of a sample that have fewer than n - 1 before them are neither counted nor scored, and
no n-gram spans two samples.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from torchtitan_rd.errors import ConfigError, DataError

_DENSE = 1 << 22  # entries of a table of all n-grams; beyond, n-grams are sorted
_AT_ONCE = 1 << 24  # tokens that are counted together


class Counts(NamedTuple):
    """codes: of different n-grams, ascending: their tokens as the digits of a number in base V.
    counts: how often.
    """

    codes: np.ndarray
    counts: np.ndarray

    def of(self, codes: np.ndarray) -> np.ndarray:
        """How often each of these was counted; 0 for those that were not."""
        if not len(self.codes):
            return np.zeros(len(codes), np.int64)
        place = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return np.where(self.codes[place] == codes, self.counts[place], 0)


class Score(NamedTuple):
    """nats: the summed loss of `tokens` tokens."""

    nats: float
    tokens: int


class NGram:
    """n: tokens of an n-gram, 1 or more. Raises ConfigError."""

    def __init__(self, n: int, vocab_size: int, alpha: float = 1.0):
        if n < 1 or vocab_size**n >= 2**63:
            raise ConfigError(
                f"n = {n} must be at least 1, and {vocab_size} to its power below 2^63: lower it"
            )
        if not 0 < alpha < float("inf"):
            raise ConfigError(f"alpha = {alpha} must be above 0")
        self.n = n
        self.vocab_size = vocab_size
        self.alpha = alpha
        self._seen = self._contexts = Counts(np.empty(0, np.int64), np.empty(0, np.int64))

    def count(self, samples: Iterable[np.ndarray]) -> int:
        """Adds the n-grams of some samples (T,) of ids -> how many there were."""
        found = [self._seen]
        for part in _parts(samples):
            found.append(count_ngrams(part, self.n, self.vocab_size))
            if len(found) > 1:
                found = [_merged(found)]
        before = int(self._seen.counts.sum())
        self._seen = found[0]
        contexts, start = np.unique(self._seen.codes // self.vocab_size, return_index=True)
        totals = np.add.reduceat(self._seen.counts, start) if len(start) else self._seen.counts
        self._contexts = Counts(contexts, totals)
        return int(self._seen.counts.sum()) - before

    def score(self, samples: Iterable[np.ndarray]) -> Score:
        """The loss on some samples. Raises DataError if none is long enough."""
        nats, tokens = 0.0, 0
        for part in _parts(samples):
            found = count_ngrams(part, self.n, self.vocab_size)  # each different n-gram is looked up once
            seen = self._seen.of(found.codes) + self.alpha
            context = self._contexts.of(found.codes // self.vocab_size) + self.alpha * self.vocab_size
            nats += float((found.counts * (np.log(context) - np.log(seen))).sum())
            tokens += int(found.counts.sum())
        if not tokens:
            raise DataError(f"no sample to score has {self.n} tokens")
        return Score(nats, tokens)


def count_ngrams(samples: Sequence[np.ndarray], n: int, vocab_size: int) -> Counts:
    """samples: ids (T,), each on its own."""
    samples = [sample for sample in samples if len(sample) >= n]
    if not samples:
        return Counts(np.empty(0, np.int64), np.empty(0, np.int64))
    ids = np.concatenate(samples)
    # Of all ids few occur (spike counts are small), so a table of the n-grams of those that do
    # is small and quick.
    present = np.flatnonzero(np.bincount(ids, minlength=vocab_size))
    base = len(present)
    if base**n > _DENSE:
        return Counts(*np.unique(_codes(ids, samples, n, vocab_size), return_counts=True))
    rank = np.zeros(vocab_size, np.int32)
    rank[present] = np.arange(base)
    table = np.bincount(_codes(rank[ids], samples, n, base), minlength=base**n)
    found = np.flatnonzero(table)
    codes, rest = np.zeros(len(found), np.int64), found
    for power in range(n):  # the same digits in base V: the order stays
        rest, digit = np.divmod(rest, base)
        codes += present[digit] * vocab_size**power
    return Counts(codes, table[found])


def _codes(ids: np.ndarray, samples: Sequence[np.ndarray], n: int, base: int) -> np.ndarray:
    """The code of the n-gram at each place where one fits. ids: the samples one after the other."""
    kind = np.int32 if base**n < 2**31 else np.int64
    ids = ids.astype(kind, copy=False)
    count = len(ids) - n + 1
    codes = ids[:count]
    for place in range(1, n):
        codes = codes * kind(base) + ids[place : place + count]
    if n == 1 or len(samples) == 1:
        return codes
    ends = np.cumsum([len(sample) for sample in samples])[:-1]
    inside = np.ones(count, bool)
    inside[(ends[:, None] - np.arange(1, n)).reshape(-1)] = False  # would reach over the end
    return codes[inside]


def _merged(parts: Sequence[Counts]) -> Counts:
    filled = [part for part in parts if len(part.codes)]
    if len(filled) < 2:
        return filled[0] if filled else parts[0]
    codes, place = np.unique(np.concatenate([part.codes for part in filled]), return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, place, np.concatenate([part.counts for part in filled]))
    return Counts(codes, counts)


def _parts(samples: Iterable[np.ndarray]) -> Iterable[list[np.ndarray]]:
    """Samples in lists of about so many tokens. A longer one is a list of its own."""
    held, tokens = [], 0
    for sample in samples:
        held.append(np.asarray(sample))
        tokens += len(held[-1])
        if tokens >= _AT_ONCE:
            yield held
            held, tokens = [], 0
    if held:
        yield held
