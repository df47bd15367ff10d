"""What a step does, seen from outside: FLOPs, memory that forward holds for backward,
and types at the collectives.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS, SECONDS_BETWEEN_LOOKS = 8, 0.03


class Watch(TorchDispatchMode):
    """A context around whole steps. Sees every operation of forward, backward and update on plain tensors.

    operations: how often each was called, by its name without overload. matmul_flops: of matrix products.
    collective_types: (name of the collective, type of what it moves) of each that reached torch.distributed.
    held: bytes of all that lived at the end of the last forward of `model` and was made since
        this context began.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.matmul_flops = 0
        self.collective_types: set[tuple[str, torch.dtype]] = set()
        self.held = 0
        self._made: dict[int, StorageWeakRef] = {}
        # After those of FSDP, which frees what it has gathered.
        self._hook = model.register_forward_hook(self._note_what_is_held)

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it takes the operation apart, and its parts come by here
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else function.__name__
        self.operations[name] += 1
        if name == "mm":
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            self.matmul_flops += 2 * rows * inner * columns
        if getattr(function, "namespace", "") in ("c10d", "_c10d_functional"):
            self.collective_types |= {(name.strip("_"), tensor.dtype) for tensor in tensors_in(args)}
        for tensor in tensors_in([result]):
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = StorageWeakRef(storage)
        return result

    def _note_what_is_held(self, *_: object) -> None:
        """The least of some looks: a thread of gloo lets go of its tensors a moment after the wait."""
        self.held = self._bytes_alive()
        for _look in range(LOOKS):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.held = min(self.held, self._bytes_alive())

    def _bytes_alive(self) -> int:
        alive = [ref.cdata for ref in self._made.values() if not ref.expired()]
        return sum(torch.UntypedStorage._new_with_weak_ptr(cdata).nbytes() for cdata in alive)


def tensors_in(values: Sequence[Any]) -> list[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found
