"""How fast `torchtitan-rd data tokenize` makes packed rows, beside what the tokenizers library alone encodes.

    python benchmarks/preparation.py [--megabytes 16] [--rounds 3] [--processes 2]

Writes different documents of English words as parquet into a temporary folder and trains a BPE tokenizer of
4096 ids on a part of them. Then, round by round, in turn:
  library    `encode_batch` of the tokenizers library on 64 documents at a time, one thread; nothing is kept
  1, N       the whole of `tokenize` in 1 and in N processes: read, encode, pack, write, sha256
Each is done on half of the documents and on all of them, and the rate is of the difference: what starting
costs (imports of the processes, opening files) is no part of it and is printed by itself. Ratios are between
neighbours of one round; the median of the rounds is printed, in wall time and in CPU time. With N processes
the CPU time is that of the first, which packs what the others encode: so many of them can it serve.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan_rd.job import keep_tokenizers_on_one_core
from torchtitan_rd.preparation.documents import Documents, Source
from torchtitan_rd.preparation.manifest import Output, Recipe
from torchtitan_rd.preparation.tokenize import Packing, tokenize
from torchtitan_rd.preparation.tokenizer_training import Wanted, train_tokenizer

AT_ONCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    keep_tokenizers_on_one_core()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = make_sources(folder, chosen.megabytes)
        tokenizer = str(folder / "tokenizer")
        output = Output.open(Path(tokenizer), Recipe("train-tokenizer", {}, {}))
        train_tokenizer(Documents([sources[1]]), Wanted(vocab_size=4096), output, max_characters=2000)

        ways = {
            "library": lambda source: by_library(source, tokenizer),
            "1 process": lambda source: by_us(source, tokenizer, folder, 1),
            f"{chosen.processes} processes": lambda source: by_us(
                source, tokenizer, folder, chosen.processes
            ),
        }
        rounds = [{way: rate(work, sources) for way, work in ways.items()} for _ in range(chosen.rounds)]
        report(rounds, list(ways))


def make_sources(folder: Path, megabytes: float) -> list[Source]:
    """A few of the documents, half of them, and all."""
    words = " ".join(topics.values()).split(" ")
    generator, texts, size = random.Random(0), [], 0.0
    while size < megabytes * 1e6:
        start = generator.randrange(len(words) - 2000)
        texts.append(" ".join(words[start : start + generator.randrange(50, 1000)]))
        size += len(texts[-1])

    found = []
    for part in (texts[:100], texts[: len(texts) // 2], texts):
        file = folder / f"{len(part)}.parquet"
        pq.write_table(pa.table({"text": part}), file)
        cache = str(folder / "cache")
        table = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=cache)
        found.append(Source(file.name, table))
    return found


def by_library(source: Source, tokenizer: str) -> int:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    texts = list(source.read(range(len(source))))
    return sum(
        len(encoding)
        for i in range(0, len(texts), AT_ONCE)
        for encoding in backend.encode_batch(texts[i : i + AT_ONCE], add_special_tokens=False)
    )


def by_us(source: Source, tokenizer: str, folder: Path, processes: int) -> int:
    packing = Packing(tokenizer, block_size=4096, val_share=0.05, files=4)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Output.open(Path(place, "packed"), Recipe("tokenize", {}, {}))
        done = tokenize(Documents([source], parts=4), packing, output, processes=processes)
        (counts,) = done["sources"].values()
        # The library was not asked for bos and eos.
        return counts["train_tokens"] + counts["val_tokens"] - 2 * counts["documents"]


def rate(work: Callable[[Source], int], sources: list[Source]) -> tuple[float, float, float]:
    """Tokens a second of the second half, in wall and in CPU time of this process; seconds to start."""
    tokens, walls, cpus = [], [], []
    few, *parts = sources
    work(few)  # what is imported once and for all
    for source in parts:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens.append(work(source))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    more = tokens[1] - tokens[0]
    wall = (walls[1] - walls[0]) / more
    return 1 / wall, more / (cpus[1] - cpus[0]), walls[0] - tokens[0] * wall


def report(rounds: list[dict[str, tuple[float, float, float]]], ways: list[str]) -> None:
    library, one, several = ways
    for way in ways:
        of = [round_[way] for round_ in rounds]
        walls, starts = [each[0] / 1e3 for each in of], [each[2] for each in of]
        spread = f"{min(walls):.0f}..{max(walls):.0f}"
        print(f"{way:<12} {statistics.median(walls):8.0f} k tokens/s ({spread}), start {min(starts):.1f} s")
    comparisons = (
        (f"1 process / {library}, wall", one, library, 0),
        (f"1 process / {library}, CPU", one, library, 1),
        (f"{several} / 1 process, wall", several, one, 0),
        (f"first of {several} / 1 process, CPU", several, one, 1),
    )
    for title, some, other, clock in comparisons:
        ratios = [round_[some][clock] / round_[other][clock] for round_ in rounds]
        print(f"{title:<40} {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")


if __name__ == "__main__":
    main()
