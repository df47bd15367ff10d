"""[activation_checkpoint] offload: the inputs of recomputed blocks wait for backward in host memory.

The copy out runs beside the block that the input is for, the copy back beside the recomputation of the block
behind it: each on a stream of its own, so that no kernel waits for the bus while there is other work. On a
CPU there is one stream, and the copies are plain ones.

The host issues work long before a GPU does it, and torch gives memory away by what was issued. So what the
copies use is memory of the computing stream, which waits for a copy before that memory is let go: then the
GPU holds what the host's order says, one input on its way out and one on its way back. Had the memory been
marked as used by both streams (`record_stream`), torch would take new memory for every block that the host
is ahead.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# Torch rounds page-locked memory up to a power of two: 2.6 GiB of a raven's state would take 4.
PIECE_BYTES = 64 * 2**20


class OnHost:
    """One tensor away from its device. before: the one that was sent before it, which backward needs next."""

    def __init__(self, tensor: torch.Tensor, before: "OnHost | None", stream: "torch.cuda.Stream | None"):
        """stream: of both copies; None on a CPU. `let_go` must be called before `tensor` is dropped."""
        self.device = tensor.device
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.before = None if before is None else weakref.ref(before)
        self.stream = stream
        self.back: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

        self.source: torch.Tensor | None = tensor.detach().contiguous()
        parts = self._parts(self.source)
        self.host = [torch.empty_like(part, device="cpu", pin_memory=part.is_cuda) for part in parts]
        self.copied = self._copy(parts, self.host)

    def let_go(self) -> None:
        """Makes what is issued from now on wait for the copy out, whose source may then be written over."""
        self._wait_for(self.copied)
        self.source = None

    def fetch(self) -> torch.Tensor:
        """Starts the copy back, once."""
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.arrived = self._copy(self.host, self._parts(self.back))
        return self.back

    def take(self) -> torch.Tensor:
        """The tensor on its device, for the current stream. Once: nothing of it is kept here."""
        back = self.fetch()
        self._wait_for(self.arrived)
        self.back = None
        return back

    def __del__(self) -> None:
        # Fetched for a backward that did not come to it: the copy must be over before others get the memory.
        if self.back is not None:
            self._wait_for(self.arrived)

    @staticmethod
    def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return tensor.view(-1).split(math.ceil(PIECE_BYTES / tensor.itemsize))

    def _copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> "torch.cuda.Event | None":
        """-> what comes when it is done. It begins after all that has been issued, of which some may still
        write the source, or use what the target's memory was before.
        """
        context: AbstractContextManager[Any] = nullcontext()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            context = torch.cuda.stream(self.stream)
        with context:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        return None if self.stream is None else self.stream.record_event()

    def _wait_for(self, event: "torch.cuda.Event | None") -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Offload:
    """What of one model is in host memory, from forward to backward."""

    def __init__(self) -> None:
        self._last: weakref.ref[OnHost] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def around(self, call: Callable) -> Callable:
        """`call(x, *args)`, of which x goes to host memory where backward will want it."""

        def offloaded_call(x: torch.Tensor, *args: Any) -> Any:
            storage = x.untyped_storage()._cdata
            sent: list[OnHost] = []

            def pack(saved: torch.Tensor) -> Any:
                # Rotary tables, masks and a raven's embedded input are the same for many blocks: they stay.
                if saved.untyped_storage()._cdata != storage:
                    return saved
                sent.append(self._send(saved))
                return sent[-1]

            with saved_tensors_hooks(pack, self._unpack):
                output = call(x, *args)
            # The whole block was there to copy its input, which is in memory till here in any case.
            while sent:
                sent.pop().let_go()
            return output

        return offloaded_call

    def _send(self, tensor: torch.Tensor) -> OnHost:
        before = self._last() if self._last is not None else None
        sent = OnHost(tensor, before, self._stream(tensor.device))
        self._last = weakref.ref(sent)
        return sent

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, OnHost):
            return saved
        tensor = saved.take()
        # Backward comes to it next, and meanwhile recomputes this block.
        before = saved.before() if saved.before is not None else None
        if before is not None:
            before.fetch()
        return tensor

    def _stream(self, device: torch.device) -> "torch.cuda.Stream | None":
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def apply_offload(regions: Sequence[nn.Module], is_on: bool) -> None:
    """regions: what is recomputed as one, after activation checkpointing and compile."""
    if not is_on:
        return
    offload = Offload()
    for region in regions:
        # Outside of compiled code, which saves its inputs as plain code does.
        if region._compiled_call_impl is not None:
            region._compiled_call_impl = offload.around(region._compiled_call_impl)
        else:
            region.forward = offload.around(region.forward)
