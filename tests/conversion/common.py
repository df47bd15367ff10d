"""Tiny models in every kind of folder that the converters read."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tests.models import tiny as llama
from tests.models.raven import tiny as raven
from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion import cli
from torchtitan_rd.conversion.weights import Weights
from torchtitan_rd.log import logger
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.layers import RopeScaling

ROOT = Path(__file__).parent.parent.parent
SCALING = RopeScaling(factor=4.0, original_max_position_embeddings=16)
LLAMAS = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "wide heads": {"head_dim": 16},
}
RAVENS = {
    "huginn": {},
    "untied": {"tie_word_embeddings": False},
    "post-norm": {"block": "post", "qk_bias": False, "init_strategy": "scaled", "injection": "add"},
    "grouped keys": {"n_kv_heads": 2, "qk_bias": False},
    "pre-norm, all options": {"block": "pre", "n_kv_heads": 2, "qk_norm": True, "clip_qkv": 1.0},
    "retrofitted": raven.RETROFITTED,
    "no prelude, no coda": {"n_layers_prelude": 0, "n_layers_coda": 0},
}


def tiny(family: str, **fields) -> nn.Module:
    """A model with norms off their initial 1, so that a swap of them is seen."""
    model = llama.tiny_llama(**fields) if family != "raven" else raven.tiny_raven(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()))
    return model


def weights_of(model: nn.Module, family: str = "llama3", **fields) -> Weights:
    """A model in memory as weights."""
    tensors = model.state_dict()
    infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return Weights(get_spec(family), model.shape, "custom", infos, tensors.__getitem__, "memory", **fields)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the safetensors files of a folder hold."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
        for name in expected
    )


def script(name: str):
    """convert/<name>.py as a function of command-line arguments, which returns the exit status."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "convert" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> int:
        on_term, handlers = signal.getsignal(signal.SIGTERM), logger.handlers[:]
        try:
            return cli.run(module.main, [str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, on_term)
            logger.handlers[:] = handlers  # the script's own writes to a stream that pytest closes

    return run


def run_script(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs convert/<script> as a user does."""
    return subprocess.run(
        [sys.executable, ROOT / "convert" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
    )
