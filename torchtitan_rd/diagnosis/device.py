"""What computes: GPUs or the CPU, its attention kernels, tried forward and backward, and the compiler."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import psutil
import torch

from torchtitan_rd.diagnosis.disk import GIB
from torchtitan_rd.diagnosis.finding import Finding, Mark
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import child_environment
from torchtitan_rd.metrics.devices import peak_flops
from torchtitan_rd.model_spec import AttentionShape
from torchtitan_rd.models.attention import Requested, activate, choose_backend, probe

HEADS = AttentionShape(32, 8, 128)
"""The attention of an 8B Llama, which kernels are tried with."""

BACKENDS: tuple[Requested, ...] = ("sdpa", "fa3", "fa4", "flex")
FEW_FILES = 4096


def look_at_devices() -> list[Finding]:
    """GPUs and their libraries; the host's cores, memory and limits."""
    found = _gpus() if torch.cuda.is_available() else [_no_gpu()]
    memory = psutil.virtual_memory()
    own = getattr(os, "sched_getaffinity", None)
    cores = len(own(0)) if own else os.cpu_count()
    host = f"{cores} cores, {memory.total / GIB:.0f} GiB of memory, {memory.available / GIB:.0f} available"
    found.append(Finding(Mark.GOOD, "host", host))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        most = hard if hard != resource.RLIM_INFINITY else 1 << 20
        remedy = f"ulimit -n {most} (scripts/launch.sh does it)"
        found.append(Finding(Mark.ABSENT, "open files", f"{limit}: few for hundreds of ranks", remedy))
    else:
        found.append(Finding(Mark.GOOD, "open files", f"{limit} in a process"))
    return found


def _no_gpu() -> Finding:
    if torch.version.cuda or torch.version.hip:
        text = "torch is built for one and sees none: training would run on the CPU"
        return Finding(Mark.WRONG, "GPU", text, "look at nvidia-smi or rocm-smi, and at CUDA_VISIBLE_DEVICES")
    remedy = "where there is a GPU: install the torch that is built for its CUDA or ROCm (pytorch.org)"
    return Finding(Mark.ABSENT, "GPU", "this torch is built for the CPU alone", remedy)


def _gpus() -> list[Finding]:
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        peak = peak_flops(torch.device("cuda", number))
        known = f"{peak / 1e12:.0f} TFLOP/s in bfloat16" if peak else "of unknown peak: no MFU is logged"
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {known}"
        found.append(Finding(Mark.GOOD, f"GPU {number}", text))
    if torch.distributed.is_nccl_available():
        found.append(Finding(Mark.GOOD, "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        found.append(
            Finding(Mark.WRONG, "NCCL", "this torch has none", "install a torch that is built with it")
        )
    return found


def look_at_attention(device: torch.device) -> list[Finding]:
    """Each backend in bfloat16, forward and backward, against float32; then with a document mask."""
    return [
        *(_tried(name, name, device, document_mask=False) for name in BACKENDS),
        _tried("document mask", "auto", device, document_mask=True),
    ]


def _tried(what: str, name: Requested, device: torch.device, document_mask: bool) -> Finding:
    begun = time.perf_counter()
    try:
        backend = choose_backend(name, device, torch.bfloat16, document_mask)
    except ConfigError as error:
        reason, _, remedy = str(error).partition("; ")
        return Finding(Mark.ABSENT, what, re.sub(r"^model\.attention_backend = '\w+':? ", "", reason), remedy)
    try:
        activate(backend)
        kernel = probe(backend, HEADS, device, torch.bfloat16, document_mask)
    except ConfigError as error:
        return Finding(Mark.WRONG, what, str(error), "model.attention_backend = another one")
    seconds = time.perf_counter() - begun
    return Finding(
        Mark.GOOD, what, f"{backend.name}, kernel {kernel}: right forward and backward ({seconds:.1f} s)"
    )


_COMPILED = """
import torch
@torch.compile
def f(x):
    return torch.nn.functional.silu(x).square().sum()
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.linspace(-2, 2, 1024, device=device, requires_grad=True)
f(x).backward()
y = x.detach().requires_grad_()
torch.nn.functional.silu(y).square().sum().backward()
assert torch.allclose(x.grad, y.grad, atol=1e-5), "wrong gradient"
"""


def look_at_compile(seconds: float) -> Finding:
    """torch.compile with its default back end, in a process of its own with empty caches."""
    what, remedy = "torch.compile", "train with compile.enable = false"
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = child_environment(TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
        command = [sys.executable, "-c", _COMPILED]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return Finding(Mark.ABSENT, what, f"not done after {seconds:.0f} s (--limit)", remedy)

    if done.returncode == 0:
        took = time.perf_counter() - begun
        return Finding(Mark.GOOD, what, f"right forward and backward ({took:.0f} s from nothing)")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        remedy = "install a C++ compiler (apt-get install g++, module load gcc), or compile.enable = false"
    return Finding(Mark.ABSENT, what, said[-1][:200] if said else "fails without a word", remedy)
