"""Every attention backend, forward and backward: its error against float32, and how fast it is."""

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.machine import device, seconds_of
from benchmarks.gpu.record import Row
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import AttentionShape
from torchtitan_rd.models import attention

BACKENDS: tuple[attention.BackendName, ...] = ("sdpa", "fa3", "fa4", "flex")
DTYPE = torch.bfloat16
ERRORS_AT = 1024
"""Tokens: the reference holds all pairs in float32."""


def cases(tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    shape = AttentionShape(4, 2, 16) if tiny else AttentionShape(32, 8, 128)
    lengths = (64, 128) if tiny else (8192, 131072)
    for name in BACKENDS:
        for length in lengths:
            yield f"{name}, {length}", lambda name=name, length=length: _measure(name, shape, length, tiny)


def _measure(name: attention.BackendName, shape: AttentionShape, length: int, tiny: bool) -> Row:
    try:
        backend = attention.choose_backend(name, device(), DTYPE, document_mask=False)
    except ConfigError as error:
        return {"not here": str(error)}
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        attention.activate(backend)
        return _figures(backend, shape, length, tiny)
    finally:
        attention._deactivate(cudnn)
        attention.activate(attention.Backend("sdpa", "back to torch's own"))


def _figures(backend: attention.Backend, shape: AttentionShape, length: int, tiny: bool) -> Row:
    row: Row = {"kernel": attention.probe(backend, shape, device(), DTYPE, document_mask=False)}
    row |= _errors(shape, min(length, ERRORS_AT))

    q, k, v, grad = _tensors(shape, length)
    mask = attention.build_mask(torch.zeros(1, length, dtype=torch.int64, device=device()), None)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    runs = {"warm_up": 1, "times": 2 if tiny else 5}
    forward = seconds_of(lambda: attention.attend(q, k, v, mask), **runs)
    output = attention.attend(q, k, v, mask)
    backward = seconds_of(lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True), **runs)

    # Two products of S x S x D a head, of which the causal mask leaves half; backward has five.
    flops = 2 * 2 * shape.n_heads * length**2 * shape.head_dim / 2
    return row | {
        "forward ms": 1e3 * forward,
        "backward ms": 1e3 * backward,
        "forward TFLOP/s": flops / forward / 1e12,
        "backward TFLOP/s": 2.5 * flops / backward / 1e12,
    }


def _tensors(shape: AttentionShape, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)
    return [
        torch.randn(1, count, length, shape.head_dim, generator=generator).to(device(), DTYPE)
        for count in heads
    ]


def _errors(shape: AttentionShape, length: int) -> Row:
    """Relative, in the Frobenius norm, of the output and of each gradient."""
    q, k, v, grad = _tensors(shape, length)
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device())
    mask = attention.build_mask(tokens, None)
    found = attention._gradients(lambda q, k, v: attention.attend(q, k, v, mask), q, k, v, grad)

    allowed = torch.ones(length, length, dtype=torch.bool, device=device()).tril()[None, None]
    exact = [t.float() for t in (q, k, v, grad)]
    expected = attention._gradients(lambda q, k, v: attention._reference(q, k, v, allowed), *exact)
    names = ("output", "dq", "dk", "dv")
    return {
        f"error of {name}": float((a.float() - b).norm() / b.norm())
        for name, a, b in zip(names, found, expected, strict=True)
    }
