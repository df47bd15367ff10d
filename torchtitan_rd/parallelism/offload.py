"""[activation_checkpoint] offload: the inputs of recomputed blocks wait for backward in host memory.

The copy out runs beside the block that the input is for, the copy back beside the recomputation of the block
behind it: each on a stream of its own, so that no kernel waits for the bus while there is other work. On a
CPU there is one stream, and the copies are plain ones.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class OnHost:
    """One tensor away from its device. before: the one that was sent before it, which backward needs next."""

    def __init__(self, tensor: torch.Tensor, before: "OnHost | None", out: "torch.cuda.Stream | None"):
        """out: the stream of the copy; None on a CPU."""
        self.device = tensor.device
        self.before = None if before is None else weakref.ref(before)
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=out is not None)
        self.arrived: torch.cuda.Event | None = None
        self.back: torch.Tensor | None = None

        if out is not None:
            out.wait_stream(torch.cuda.current_stream(self.device))
            tensor.record_stream(out)
        with nullcontext() if out is None else torch.cuda.stream(out):
            self.host.copy_(tensor.detach(), non_blocking=True)

    def fetch(self, stream: "torch.cuda.Stream | None") -> torch.Tensor:
        """Starts the copy back, once. stream: the one that the copy out was on, so that it comes after it."""
        if self.back is None:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                self.back = self.host.to(self.device, non_blocking=True, copy=True)
                if stream is not None:
                    self.arrived = stream.record_event()
        return self.back

    def take(self, stream: "torch.cuda.Stream | None") -> torch.Tensor:
        """The tensor on its device, for the current stream. Once: nothing of it is kept here."""
        back = self.fetch(stream)
        self.back = None
        if self.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrived)
            back.record_stream(current)
        return back


class Offload:
    """What of one model is in host memory, from forward to backward."""

    def __init__(self) -> None:
        self._last: weakref.ref[OnHost] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def around(self, call: Callable) -> Callable:
        """`call(x, *args)`, of which x goes to host memory where backward will want it."""

        def offloaded_call(x: torch.Tensor, *args: Any) -> Any:
            storage = x.untyped_storage()._cdata

            def pack(saved: torch.Tensor) -> Any:
                # Rotary tables, masks and a raven's embedded input are the same for many blocks: they stay.
                if saved.untyped_storage()._cdata != storage:
                    return saved
                return self._send(saved)

            with saved_tensors_hooks(pack, self._unpack):
                return call(x, *args)

        return offloaded_call

    def _send(self, tensor: torch.Tensor) -> OnHost:
        before = self._last() if self._last is not None else None
        sent = OnHost(tensor, before, self._stream(tensor.device))
        self._last = weakref.ref(sent)
        return sent

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, OnHost):
            return saved
        stream = self._stream(saved.device)
        tensor = saved.take(stream)
        # Backward comes to it next, and meanwhile recomputes this block.
        before = saved.before() if saved.before is not None else None
        if before is not None:
            before.fetch(stream)
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
