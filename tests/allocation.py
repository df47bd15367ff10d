"""How much memory tensors take at most, on any device, also on the meta device, which computes nothing."""

from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.watching import tensors_in


class Peak(TorchDispatchMode):
    """A context. bytes: the most that lived at one time of all that operations in it have made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
        result = function(*args, **(kwargs or {}))

        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for tensor in tensors_in([result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self._made.values()))
        return result
