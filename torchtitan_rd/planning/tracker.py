"""What operations make, as they pass by: bytes that live, FLOPs, collectives. Nothing need be computed
for it: tensors that have a size and no numbers (FakeTensor) tell the same.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchtitan_rd.parallelism.tiled_mlp import backward_in_tiles, forward_in_tiles

Pass = Literal["forward", "without gradient", "recompute", "backward", "update"]

# What bytes belong to, in the order of the report.
PARAMETERS = "sharded parameters"
GRADIENTS = "sharded gradients"
OPTIMIZER = "optimizer state"
GATHERED = "gathered units"
REDUCED = "gradients of gathered units"
SAVED = "saved activations"
HEAD = "head and loss"
BACKWARD = "working memory of backward"
ATTENTION = "attention's workspace"
UPDATE = "the update"
OTHER = "everything else"
HOST = "activations in host memory"
COMPONENTS = (
    PARAMETERS,
    GRADIENTS,
    OPTIMIZER,
    GATHERED,
    REDUCED,
    SAVED,
    HEAD,
    BACKWARD,
    ATTENTION,
    UPDATE,
    OTHER,
)

_aten, _fsdp = torch.ops.aten, torch.ops.fsdp
# Operations whose inside no mode sees, and plain functions that do the same.
_OPAQUE: dict[Any, Callable] = {
    torch.ops.torchtitan_rd.tiled_swiglu.default: forward_in_tiles,
    torch.ops.torchtitan_rd.tiled_swiglu_backward.default: backward_in_tiles,
}
_ATTENTION_FORWARD = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
_COMPOSITE = (_aten.matmul.default, _aten.linear.default)
_FORWARD_ALONE = (*_ATTENTION_FORWARD, torch.ops.torchtitan_rd.tiled_swiglu.default)


@dataclass
class Made:
    """One storage. label: what it belongs to, which may be learnt later than it was made."""

    size: int
    label: str
    alive: Any = None


class Collective(NamedTuple):
    """calls, and the bytes of the whole messages: what an all-gather makes, what a reduce-scatter takes."""

    calls: int
    bytes: int


class Inside(NamedTuple):
    """What an opaque operation holds at most beyond its inputs, and its FLOPs."""

    peak: int
    flops: int


@dataclass
class Peak:
    """The moment at which most bytes lived. extra: of kernels, beside what `made` has."""

    bytes: int = 0
    moment: str = ""
    made: list[tuple[Made, int]] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)

    def by_label(self) -> dict[str, int]:
        sums = Counter(self.extra)
        for made, size in self.made:
            sums[made.label] += size
        return {label: sums[label] for label in COMPONENTS if sums[label]}


class Tracker(TorchDispatchMode):
    """A context around operations on plain tensors.

    peak: since it began. saved: bytes of forward that lived when backward began, by label.
    flops: (pass, "matmul" or "attention") -> FLOPs; attention counts all S x S pairs.
    collectives: name -> Collective.
    moment: which part of a step it is; set by whoever knows.
    """

    def __init__(self, *, gpu_kernels: bool = False, off_device: Iterable[str] = ()):
        """gpu_kernels: add what a GPU's attention kernel takes for itself. off_device: labels that are not in
        the device's memory.
        """
        super().__init__()
        self.gpu_kernels = gpu_kernels
        self.off_device = frozenset((HOST, *off_device))
        self.moment = "forward"
        self.without_gradient, self.in_head = False, False

        self.flops: Counter[tuple[Pass, str]] = Counter()
        self.collectives: dict[str, Collective] = {}
        self.saved: dict[str, int] = {}
        self.peak = Peak()

        self._live: dict[int, Made] = {}
        self._bytes = 0
        self._inside: dict[Any, Inside] = {}
        self._backward_began = False

    def begin(self) -> None:
        """Counts anew; what lives goes on living."""
        self.flops, self.collectives = Counter(), {}
        self.saved, self.peak = {}, Peak()
        self._backward_began = False

    def label(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Says what these belong to. Those that are not known yet are known from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            made = self._live.get(storage._cdata)
            if made is None:
                self._note(storage, label)
                continue
            if (made.label in self.off_device) != (label in self.off_device):
                self._bytes += made.size if made.label in self.off_device else -made.size
            made.label = label

    def bytes_of(self, label: str) -> int:
        """What lives under it now."""
        return sum(made.size for made in self._live.values() if made.label == label)

    @contextmanager
    def sees_resizing(self) -> Iterator[None]:
        """FSDP frees and fills what it has gathered by resizing storages, which is no operation."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = original(storage, size)
            made = self._live.get(storage._cdata)
            if made is not None:
                self._count(made, size - made.size)
                made.size = size
            return result

        with replaced(torch.UntypedStorage, "resize_", resize):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it takes the operation apart, and its parts come by here
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default and isinstance(args[0], torch._subclasses.FakeTensor):
            return _some_number(args[0].dtype)

        if func in _COMPOSITE:  # as it comes where autograd, which takes it apart, is off
            with self:
                return func.decompose(*args, **kwargs)

        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._backward_began:
            self._backward_began = True
            self.saved = self._by_label()
        extra = self._inside_of(func, args) if func in _OPAQUE else 0
        result = func(*args, **kwargs)

        # Everything new is of this moment, unless it is known better.
        label = self._label_now(in_backward)
        outputs = list(tensors_in([result]))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                self._note(storage, label)
        if extra:  # its outputs are inside of it
            extra -= sum(tensor.untyped_storage().nbytes() for tensor in outputs)

        self._relabel(func, args, kwargs, result)
        self._note_flops(func, args, kwargs, result, in_backward)
        workspace = _workspace(args) if self.gpu_kernels and func in _ATTENTION_BACKWARD else 0
        self._look(in_backward, {label: max(extra, 0), ATTENTION: workspace})
        return result

    def _label_now(self, in_backward: bool) -> str:
        if self.in_head:
            return HEAD
        if in_backward:
            return BACKWARD
        if self.moment == "forward":
            return SAVED
        return UPDATE if self._backward_began else OTHER

    def _note(self, storage: torch.UntypedStorage, label: str) -> None:
        made = Made(0, label)
        key = storage._cdata

        def forget(_: Any) -> None:
            if self._live.get(key) is made:
                del self._live[key]
                self._count(made, -made.size)

        made.alive = weakref.ref(storage, forget)
        self._live[key] = made
        self._count(made, storage.nbytes())
        made.size = storage.nbytes()

    def _count(self, made: Made, change: int) -> None:
        if made.label not in self.off_device:
            self._bytes += change

    def _look(self, in_backward: bool, extra: dict[str, int]) -> None:
        now = self._bytes + sum(extra.values())
        if now <= self.peak.bytes:
            return
        made = [(one, one.size) for one in self._live.values() if one.label not in self.off_device]
        moment = "backward" if in_backward else self.moment
        self.peak = Peak(now, moment, made, {label: size for label, size in extra.items() if size})

    def _by_label(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for made in self._live.values():
            sums[made.label] += made.size
        return dict(sums)

    def _relabel(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """FSDP's buffers are known by the operations that use them."""
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace == "fsdp":
            is_reduction = name == "chunk_cat"
            used = args if is_reduction else ()
            self.label(tensors_in([*used, kwargs.get("out", ())]), REDUCED if is_reduction else GATHERED)
        elif namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            moved = list(tensors_in([*args, result]))
            name = name.strip("_")
            before = self.collectives.get(name, Collective(0, 0))
            size = max((tensor.nbytes for tensor in moved), default=0)
            self.collectives[name] = Collective(before.calls + 1, before.bytes + size)
            # The functional ones move activations.
            if namespace == "c10d" and name.startswith("allgather"):
                self.label(moved, GATHERED)
            elif namespace == "c10d" and name.startswith("reduce_scatter"):
                self.label(moved, REDUCED)

    def _note_flops(self, func: Any, args: tuple, kwargs: dict, result: Any, in_backward: bool) -> None:
        kind = "matmul"
        if func in _OPAQUE:
            flops = self._inside[_key(func, args)].flops
        elif func in _ATTENTION_FORWARD or func in _ATTENTION_BACKWARD:
            kind, flops = "attention", _attention_flops(func, args)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        else:
            return
        self.flops[self._pass_now(func, in_backward), kind] += flops

    def _pass_now(self, func: Any, in_backward: bool) -> Pass:
        if not in_backward and self.moment != "forward" and self._backward_began:
            return "update"  # of a matrix as a whole: Muon
        if not in_backward:
            return "without gradient" if self.without_gradient else "forward"
        # Recomputation records a graph again, and some operations belong to it alone.
        return "recompute" if torch.is_grad_enabled() or func in _FORWARD_ALONE else "backward"

    def _inside_of(self, func: Any, args: tuple) -> int:
        key = _key(func, args)
        if key not in self._inside:
            inner = Tracker()
            inner.label(tensors_in(args), HOST)  # else a view of an input would be a storage more
            with inner, torch.no_grad():
                _OPAQUE[func](*args)
            self._inside[key] = Inside(inner.peak.bytes, sum(inner.flops.values()))
        return self._inside[key].peak


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner` with another attribute of that name."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _some_number(dtype: torch.dtype) -> bool | int | float:
    """For a number that the host reads and that nobody has: bytes and FLOPs do not depend on it. A count is
    2, so that no update is the first.
    """
    if dtype == torch.bool:
        return False
    return 2.0 if dtype.is_floating_point else 2


def _key(func: Any, args: tuple) -> tuple:
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(args))
    return (func, shapes, *(value for value in args if isinstance(value, int)))


def _attention_flops(func: Any, args: tuple) -> int:
    """2 products of all S x S pairs forward and, scores repeated, 5 backward; counted as 4, as a model's
    FLOPs are (FlashAttention-2, arXiv 2307.08691, section 4.1).
    """
    backward = func in _ATTENTION_BACKWARD
    q, k = args[1:3] if backward else args[:2]
    batch, heads, length, head_dim = q.shape
    return (4 if backward else 2) * 2 * batch * heads * length * k.shape[2] * head_dim


def _workspace(args: tuple) -> int:
    """Bytes that FlashAttention's backward allocates for itself: the gradient of the queries in float32 and
    one float32 a query and head; and with fewer kv heads the gradients of keys and values for each query
    head, before they are summed. Rounded up to 128 queries. Source: `mha_bwd` of flash-attention 2, which
    torch has inside.
    """
    _, q, k = args[:3]
    batch, heads, length, head_dim = q.shape
    rounded = -(-length // 128) * 128
    own = 4 * batch * heads * rounded * (head_dim + 1)
    copies = 2 * batch * heads * k.shape[2] * head_dim * k.itemsize if k.shape[1] != heads else 0
    return own + copies
