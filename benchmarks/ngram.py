"""How much faster `eval ngram` counts and scores than a plain dictionary of tuples does, in CPU seconds.

python benchmarks/ngram.py [--tokens 1000000] [--n 1 2 3]

Half of the ids of a made-up recording (40 neurons, 0.4 spikes a bin) are counted, the other half is scored.
The fast one is the best of three rounds, the reference runs once; their losses must be the same.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from torchtitan_rd.inference.ngram import NGram, Score

VOCAB_SIZE = 256


def recording(bins: int, neurons: int = 40, seed: int = 0) -> np.ndarray:
    """Ids (bins * (neurons + 1),) with the separator 255 before each time bin."""
    counts = np.random.default_rng(seed).poisson(0.4, (bins, neurons))
    return np.concatenate((np.full((bins, 1), 255), counts), axis=1).reshape(-1).astype(np.uint8)


def plain(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], n: int, vocab_size: int, alpha: float
) -> Score:
    """The loss of add-alpha smoothed counts, token by token: what inference/ngram.py must give."""
    seen: Counter[tuple[int, ...]] = Counter()
    contexts: Counter[tuple[int, ...]] = Counter()
    for sample in train:
        ids = sample.tolist()
        for i in range(len(ids) - n + 1):
            seen[tuple(ids[i : i + n])] += 1
            contexts[tuple(ids[i : i + n - 1])] += 1

    nats, tokens = 0.0, 0
    for sample in test:
        ids = sample.tolist()
        for i in range(len(ids) - n + 1):
            likely = seen[tuple(ids[i : i + n])] + alpha
            p = likely / (contexts[tuple(ids[i : i + n - 1])] + alpha * vocab_size)
            nats, tokens = nats - math.log(p), tokens + 1
    return Score(nats, tokens)


def fast(train: Sequence[np.ndarray], test: Sequence[np.ndarray], n: int) -> Score:
    model = NGram(n, VOCAB_SIZE)
    model.count(train)
    return model.score(test)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 3])
    chosen = parser.parse_args()
    ids = recording(chosen.tokens // 41 + 1)[: chosen.tokens]
    train, test = [ids[: chosen.tokens // 2]], [ids[chosen.tokens // 2 :]]

    for n in chosen.n:
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            found = fast(train, test, n)
            seconds.append(time.process_time() - begun)
        begun = time.process_time()
        expected = plain(train, test, n, VOCAB_SIZE, 1.0)
        reference = time.process_time() - begun

        if found.tokens != expected.tokens or not math.isclose(found.nats, expected.nats, rel_tol=1e-9):
            raise SystemExit(f"n = {n}: {found} is not the reference's {expected}")
        print(f"n = {n}: {min(seconds):.4f} s, reference {reference:.2f} s: {reference / min(seconds):.0f}x")


if __name__ == "__main__":
    main()
