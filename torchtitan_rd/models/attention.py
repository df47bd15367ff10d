"""The one place that picks the attention kernel, proves that it works, and calls it.

Shapes: B batch, H heads, S sequence, D head dim. `sdpa`, `fa3` and `fa4` all go through
F.scaled_dot_product_attention: torch dispatches it to FlashAttention 3 or 4 once that is activated. A
document mask goes through compiled flex attention on CUDA; flex has no backward on CPU, where the same mask
goes densely through SDPA.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.model_spec import AttentionShape
from torchtitan_rd.model_steps import KeyValues, grouped_attention, heads_for_kernel

Mask: TypeAlias = "torch.Tensor | BlockMask | KeyValues | None"
BackendName: TypeAlias = Literal["sdpa", "fa3", "fa4", "flex"]
Requested: TypeAlias = Literal["auto"] | BackendName


@dataclass(frozen=True)
class Backend:
    """The chosen kernel and why."""

    name: BackendName
    reason: str


@dataclass(frozen=True)
class _Flash:
    """An external FlashAttention: torch's name for it, the GPUs it runs on, and how to get it."""

    torch_name: Literal["FA3", "FA4"]
    capabilities: tuple[int, ...]
    gpus: str
    module: str
    remedy: str


_FLASH: dict[str, _Flash] = {
    "fa3": _Flash(
        "FA3",
        (9,),
        "Hopper",
        "flash_attn_interface",
        "build it from the `hopper` folder of the flash-attention repository",
    ),
    "fa4": _Flash(
        "FA4", (9, 10), "Hopper or Blackwell", "flash_attn.cute.interface", "pip install 'torchtitan_rd[fa4]'"
    ),
}
_PREFERRED: dict[int, BackendName] = {9: "fa3", 10: "fa4"}  # by major compute capability

# Relative error in the Frobenius norm against float32: twice what rounding gives,
# far below what a wrong kernel gives.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}

# Whether flex attention is used without a document mask too. One for the process, as torch's own choice of
# a flash kernel is: `activate` sets it before training, `build_mask` reads it in each forward. No model
# has to hand it through.
_flex_without_documents = False


def setup_attention(
    requested: Requested, shape: AttentionShape, device: torch.device, dtype: torch.dtype, document_mask: bool
) -> Backend:
    """Chooses, activates and probes the backend for the whole process, and logs the choice.

    requested: `model.attention_backend`. shape: the model shape's `attention_shape`. dtype: that of
    the activations. Raises ConfigError if the backend is not to be had here, cannot do what the run
    needs, or computes wrongly; but where `auto` took an installed FlashAttention that is broken, this
    warns and takes `sdpa`.
    """
    backend = choose_backend(requested, device, dtype, document_mask)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        activate(backend)
        kernel = probe(backend, shape, device, dtype, document_mask)
    except ConfigError as error:
        if requested != "auto" or backend.name not in _FLASH:
            raise
        logger.warning(
            "attention: auto takes sdpa, since %s is installed but broken here: %s", backend.name, error
        )
        _deactivate(cudnn)
        backend = Backend("sdpa", f"auto: {backend.name} is installed but broken, see the warning")
        kernel = probe(backend, shape, device, dtype, document_mask)

    logger.info("attention: %s (%s); probed forward and backward on %s", backend.name, backend.reason, kernel)
    if device.type == "cuda" and kernel == SDPBackend.MATH.name:
        logger.warning(
            "attention: no fused kernel of torch takes %s in %s on this GPU, so plain math runs: slow, and "
            "with all scores of S x S in memory (fused kernels take heads of up to 256)",
            *(shape, dtype),
        )
    return backend


def choose_backend(
    requested: Requested, device: torch.device, dtype: torch.dtype, document_mask: bool
) -> Backend:
    """Resolves `auto`, or checks that the requested backend is to be had here. Raises ConfigError."""
    on_cuda = device.type == "cuda"
    if requested == "flex" and not on_cuda:
        raise ConfigError("model.attention_backend = 'flex' trains on CUDA only; use 'auto' or 'sdpa' here")
    if requested in _FLASH:
        obstacle = _obstacle(_FLASH[requested], device, dtype)
        if obstacle:
            raise ConfigError(f"model.attention_backend = {requested!r}: {obstacle}")

    if document_mask and not on_cuda:
        return Backend("sdpa", "flex attention has no backward on CPU, so the document mask is a dense one")
    if document_mask and requested not in ("auto", "flex"):
        raise ConfigError(
            f"training.document_mask needs flex attention, but model.attention_backend = {requested!r}: "
            "set it to 'auto' or 'flex', or switch the mask off"
        )
    if document_mask:
        return Backend("flex", "training.document_mask")

    if requested != "auto":
        return Backend(requested, "as configured")
    if not on_cuda:
        return Backend("sdpa", f"auto: the only one that trains on {device.type}")

    preferred = _PREFERRED.get(_capability(device))
    if preferred is None:
        return Backend(
            "sdpa", f"auto: neither fa3 nor fa4 is preferred on {torch.cuda.get_device_name(device)}"
        )
    obstacle = _obstacle(_FLASH[preferred], device, dtype)
    if obstacle:
        return Backend("sdpa", f"auto: {preferred} would be preferred, but {obstacle}")
    return Backend(preferred, f"auto: installed, and the GPU is of the {_FLASH[preferred].gpus} generation")


def activate(backend: Backend) -> None:
    """Makes `attend` use the backend from now on, in the whole process (as torch's own registry does).

    Raises ConfigError if an installed FlashAttention does not load.
    """
    global _flex_without_documents
    _flex_without_documents = backend.name == "flex"
    if backend.name in _FLASH:
        try:
            activate_flash_attention_impl(_FLASH[backend.name].torch_name)
        except Exception as error:  # what is built for another torch may raise anything
            raise ConfigError(
                f"model.attention_backend: {backend.name} is installed but does not load: {error}; "
                f"reinstall it for this torch ({_FLASH[backend.name].remedy}), or use 'sdpa'"
            ) from error
        # SDPA may rank it above flash, and then FA3/FA4 never runs.
        torch.backends.cuda.enable_cudnn_sdp(False)


def _deactivate(cudnn: bool) -> None:
    """Undoes `activate`: torch's own flash kernel again, and cuDNN's as it was before."""
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def probe(
    backend: Backend, shape: AttentionShape, device: torch.device, dtype: torch.dtype, document_mask: bool
) -> str:
    """Runs a small forward and backward of `shape`, compares them with the math kernel in
    float32; -> kernel's name.

    Raises ConfigError with the errors if the kernel fails or is off by more than rounding.
    """
    length, batch = 256, 2
    generator = torch.Generator().manual_seed(0)  # not the global one, whose state belongs to the run
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    # Strided as in training: parts of one projection, whose heads become the second dimension.
    qkv, grad = (
        torch.randn(batch, length, h, shape.head_dim, generator=generator).to(device, dtype)
        for h in (sum(heads), shape.n_heads)
    )
    q, k, v, grad = (t.transpose(1, 2) for t in (*qkv.split(heads, dim=2), grad))
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    documents = (torch.arange(length, device=device) // 100).expand(batch, length) if document_mask else None
    allowed = _visible(tokens if documents is None else documents)

    where = f"model.attention_backend: {backend.name} on {device.type}, {dtype}, {shape}"
    try:
        kernel = (
            "flex" if backend.name == "flex" else _sdpa_kernel(q, k, v, allowed if document_mask else None)
        )
        found = _gradients(lambda q, k, v: attend(q, k, v, build_mask(tokens, documents)), q, k, v, grad)
    except Exception as error:  # a kernel may raise anything, and each is the same mistake to the user
        raise ConfigError(f"{where} fails: {error}; use another backend") from error
    if backend.name in _FLASH and kernel != SDPBackend.FLASH_ATTENTION.name:
        raise ConfigError(f"{where}: it is active, but torch takes {kernel} instead; use another backend")

    expected = _gradients(lambda q, k, v: _reference(q, k, v, allowed), *(t.float() for t in (q, k, v, grad)))
    names = ("output", "dq", "dk", "dv")
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    if not all(error <= _TOLERANCE[dtype] for error in errors):  # so that a nan fails too
        listed = ", ".join(f"{name} {error:.2e}" for name, error in zip(names, errors, strict=True))
        raise ConfigError(
            f"{where} is wrong: relative errors {listed} exceed {_TOLERANCE[dtype]:.0e}; use another backend"
        )
    return kernel


def build_mask(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> Mask:
    """What `attend` needs beside q, k and v: to be built once a forward. tokens and document_ids: (B, S)."""
    if document_ids is None:
        return _causal_block_mask(tokens.shape[1], tokens.device) if _flex_without_documents else None
    return _document_block_mask(document_ids) if document_ids.is_cuda else _visible(document_ids)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Causal attention of q (B, H, S, D) to k and v (B, H_kv, S, D) -> (B, H, S, D). mask: from `build_mask`,
    or what keeps the keys and values.
    """
    if isinstance(mask, KeyValues):
        return mask.attend(q, k, v)
    if isinstance(mask, BlockMask):
        # A block that is compiled as a whole takes flex in; nested compilation would break its graph.
        plain: Callable[..., Any] = flex_attention
        flex = plain if torch.compiler.is_compiling() else _compiled_flex(plain)
        return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return grouped_attention(q, k, v, mask, causal=mask is None)


@cache
def _compiled(function: Callable) -> Callable:
    """Flex attention and its mask must be compiled: eagerly they hold the whole S x S matrix."""
    return torch.compile(function)


@cache
def _compiled_flex(function: Callable) -> Callable:
    """As one operator that selective activation checkpointing sees and can keep;
    else it sees nothing of it.
    """
    return torch.compile(function, options={"wrap_inductor_compiled_regions": True})


def _document_block_mask(document_ids: torch.Tensor) -> BlockMask:
    def same_document(b, h, q, k):
        return (q >= k) & (document_ids[b, q] == document_ids[b, k])

    batch, length = document_ids.shape
    return _compiled(create_block_mask)(
        same_document, batch, None, length, length, device=document_ids.device
    )


@cache
def _causal_block_mask(length: int, device: torch.device) -> BlockMask:
    return _compiled(create_block_mask)(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def _visible(document_ids: torch.Tensor) -> torch.Tensor:
    """(B, S) -> (B, 1, S, S) bool: the keys (last axis) that each query may see."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def _gradients(
    function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor
) -> list:
    """-> [output, dq, dk, dv]."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The kernel that SDPA takes for such tensors when they need gradients, by torch's name for it."""
    q, k, v = (t.detach().requires_grad_() for t in (q, *heads_for_kernel(q, k, v, mask)))
    chosen = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return SDPBackend(chosen).name


def _obstacle(flash: _Flash, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this FlashAttention cannot run here, with the remedy; None if it can."""
    if device.type != "cuda" or _capability(device) not in flash.capabilities:
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{flash.torch_name} needs a {flash.gpus} GPU and this is {here}; use 'auto'"
    if dtype not in (torch.bfloat16, torch.float16):
        remedy = "set training.mixed_precision_param"
        return f"{flash.torch_name} computes in bfloat16 or float16, not {dtype}; {remedy}"
    if not _installed(flash.module):
        return f"{flash.torch_name} is not installed: {flash.remedy} (docs/attention.md)"
    return None


def _capability(device: torch.device) -> int:
    """Major compute capability; 0 on AMD GPUs, some of which number themselves 9 like Hopper."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def _installed(module: str) -> bool:
    """Whether a dotted module is there, without importing it or its parents."""
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not below:
        return spec is not None
    path = Path(*below)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / path).is_dir() or (folder / path).with_suffix(".py").is_file() for folder in folders)
