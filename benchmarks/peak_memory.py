"""The memory that one layer takes at most at 131072 tokens, counted on the meta device: nothing is computed.

    python benchmarks/peak_memory.py

Shapes of the 8B Llama (dim 4096, feed-forward 14336), bfloat16, one sequence; the head with Llama 3's
vocabulary of 128256. What was there before is not counted; outputs and gradients are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_rd.chunked_loss import ChunkedLoss
from torchtitan_rd.loss import cross_entropy_sums
from torchtitan_rd.parallelism.tiled_mlp import backward_in_tiles, forward_in_tiles

TOKENS, DIM, WIDTH, VOCAB = 131072, 4096, 14336, 128256
GIB = 2**30


class Peak(TorchDispatchMode):
    """A context. bytes: the most that lived at one time of what operations in it have made; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in _tensors_in(args)}
        result = func(*args, **(kwargs or {}))

        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for tensor in _tensors_in([result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self._made.values()))
        return result


def _tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
    return found


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def head(chunk_tokens: int | None) -> int:
    """Bytes of head and loss, forward and backward, all tokens at once or `chunk_tokens` at a time."""
    hidden, weight = on_meta(1, TOKENS, DIM), on_meta(VOCAB, DIM)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    with Peak() as peak:
        if chunk_tokens is None:
            sums = cross_entropy_sums((hidden @ weight.T).float(), labels)
        else:
            sums = ChunkedLoss(labels, chunk_tokens)(hidden, weight)
        sums.objective.backward()
    return peak.bytes


def feed_forward(tile_tokens: int | None) -> int:
    """Bytes of one block's feed-forward, forward and backward."""
    x, dy, down = on_meta(TOKENS, DIM), on_meta(TOKENS, DIM), on_meta(DIM, WIDTH)
    gate_up = [on_meta(WIDTH, DIM), on_meta(WIDTH, DIM)]
    with Peak() as peak:
        if tile_tokens is None:
            y = (F.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T
            y.backward(dy.detach())
        else:
            # As plain functions: the operation that torch knows would hide what is in it.
            with torch.no_grad():
                y = forward_in_tiles(x, gate_up, down, tile_tokens)
                gradients = backward_in_tiles(dy, x, gate_up, down, tile_tokens)
                del y, gradients
    return peak.bytes


def main() -> None:
    rows: list[tuple[str, str, float, float]] = []
    for name, measure, sizes in (
        ("head and loss", head, (1024, 4096)),
        ("feed-forward of a block", feed_forward, (1024, 2048, 8192)),
    ):
        plain = measure(None)
        rows.append((name, "all", plain / GIB, 1.0))
        for size in sizes:
            found = measure(size)
            rows.append((name, str(size), found / GIB, found / plain))
    headers = ("what", "tokens at a time", "GiB", "of the plain one")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
