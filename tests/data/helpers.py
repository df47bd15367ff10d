"""Loaders of several data ranks in one process, and what they read."""

import json
import random
from pathlib import Path

import torch

from torchtitan_rd.data import BatchDims, DatasetKeys, build_dataloader, load_tokenizer, merge_states


def build(config: DatasetKeys, rank=0, degree=1, vocab_size=258, tokenizer_path="bytes", seed=0):
    return build_dataloader(
        config,
        BatchDims.resolve(config, rank, degree),
        tokenizer=load_tokenizer(tokenizer_path),
        vocab_size=vocab_size,
        seed=seed,
        pin_memory=False,
    )


def documents_of_letters(folder: Path, number: int, longest: int) -> Path:
    """A file of documents of 20 to `longest` letters and blanks, always the same."""
    path = folder / "documents.jsonl"
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=letters.randint(20, longest))) for _ in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Ranks:
    """All data ranks of a run; `with` closes them."""

    def __init__(self, config: DatasetKeys, degree=1, **options):
        self.loaders = [build(config, rank, degree, **options) for rank in range(degree)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for loader in self.loaders:
            loader.close()

    def read(self, steps: int) -> list[torch.Tensor]:
        """The global batches as windows (G, S + 1), rows in order."""
        return [self._global_batch() for _ in range(steps)]

    def save(self) -> dict:
        return json.loads(json.dumps(merge_states([loader.state_dict() for loader in self.loaders])))

    def load(self, state: dict) -> "Ranks":
        for loader in self.loaders:
            loader.load_state_dict(state)
        return self

    def _global_batch(self) -> torch.Tensor:
        batches = [batch for loader in self.loaders for batch in loader.next_step()]
        for batch in batches:
            assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])
        return torch.cat([torch.cat([b.inputs[:, :1], b.labels], dim=1) for b in batches])


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
