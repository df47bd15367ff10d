"""Llama as Meta releases it: `params.json` and `consolidated.NN.pth`, one file a tensor-parallel rank.

Names and rotary pairs are ours already. A tensor is put together from its pieces when it is read.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion.pth import named_tensors, open_pth
from torchtitan_rd.conversion.weights import Weights, check_shapes, matching_flavor, model_tensors
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.shape import LlamaShape

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")
_NUMBERS = (*_INTEGERS, "norm_eps", "rope_theta", "rope_scaling_factor")
# The tensors tell the width of the feed-forward; the last three size the buffers of Meta's own program.
_NOT_NEEDED = ("ffn_dim_multiplier", "multiple_of", "max_seq_len", "max_batch_size", "model_parallel_size")
# Llama 3.2's two text sizes (dim, layers), whose params.json does not tell their factor from
# that of Llama 3.1.
_LLAMA_3_2 = ((2048, 16), (3072, 28))

# The context, which params.json does not tell, by the rotary base: Llama 2, Llama 3, Code Llama.
_CONTEXT = {10_000.0: 4096, 500_000.0: 8192, 1_000_000.0: 16_384}
_SCALED_CONTEXT = 131_072

Pieces: TypeAlias = Mapping[str, list[torch.Tensor]]  # by name, of rank 0, 1, ...


def open_meta(folder: Path) -> Weights:
    """The weights in a folder of Meta's, or in its subfolder `original`.

    Raises ConfigError for a params.json of another model, CheckpointError for files or tensors that are
    missing, left over, damaged or of another shape; all of it before any data is read. Copies of a norm that
    differ between the shards are found when it is read.
    """
    root = folder if any(folder.glob("consolidated.*.pth")) else folder / "original"
    paths = _shard_files(root if root.is_dir() else folder)
    params = _read_params(root / PARAMS)

    shards = [named_tensors(open_pth(path), str(path)) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        shard.pop("rope.freqs", None)
        for name in sorted(shards[0].keys() ^ shard.keys()):
            raise CheckpointError(f"{name} is not in both of {paths[0]} and {path}: one of them is damaged")

    pieces = {name: [shard[name] for shard in shards] for name in shards[0]}
    dims = {name: _split_dim(name, parts, params["dim"]) for name, parts in pieces.items()}
    found = {name: _merged_info(name, parts, dims[name], root) for name, parts in pieces.items()}

    shape = _shape(params, found, root)
    spec = get_spec("llama3")
    wanted, tied = model_tensors(spec, shape)
    try:
        check_shapes(found, {name: size for name, size in wanted.items() if name not in tied}, str(root))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; put together from {', '.join(path.name for path in paths)}: is a shard missing?"
        ) from None

    tokenizer = root / TOKENIZER
    return Weights(
        spec=spec,
        shape=shape,
        flavor=matching_flavor(spec, shape),
        tensors={name: found[tied.get(name, name)] for name in wanted},
        read=lambda name: _read(pieces, dims, tied.get(name, name), root),
        origin=str(folder),
        files={TOKENIZER: tokenizer.read_bytes()} if tokenizer.is_file() else {},
    )


def _read(pieces: Pieces, dims: Mapping[str, int | None], name: str, root: Path) -> torch.Tensor:
    first, *others = parts = pieces[name]
    dim = dims[name]
    if dim is not None:
        return torch.cat(parts, dim) if others else first
    if not all(torch.equal(first, other) for other in others):
        raise CheckpointError(
            f"{root}: {name} is not the same in all shards: one of them is damaged or foreign"
        )
    return first


def _shard_files(root: Path) -> list[Path]:
    """Sorted by rank. Raises CheckpointError unless they are numbered 00, 01, ..."""
    names = {path.name: path for path in root.glob("consolidated.*.pth")}
    if not names:
        raise CheckpointError(
            f"{root} holds no consolidated.00.pth: give the folder that Meta's download made"
        )
    for name in names:
        if not re.fullmatch(r"consolidated\.\d\d\.pth", name):
            raise CheckpointError(f"{root / name} is no shard (consolidated.NN.pth): move it away")
    wanted = [f"consolidated.{rank:02}.pth" for rank in range(int(max(names).split(".")[1]) + 1)]
    for name in wanted:
        if name not in names:
            raise CheckpointError(f"{root / name} is missing, while {max(names)} is there: download it again")
    return [names[name] for name in wanted]


def _read_params(path: Path) -> dict[str, Any]:
    """The values that are not null. Raises ConfigError for what this Llama does not compute."""
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path} is missing: it comes with the weights") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it again") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds no table of settings: download it again")

    params = {key: value for key, value in params.items() if value is not None}
    for key, value in params.items():
        if key not in (*_NUMBERS, "use_scaled_rope", *_NOT_NEEDED):
            raise ConfigError(
                f"{path}: {key} = {value!r} is not supported: it may change what the model computes"
            )
        wanted = int if key in _INTEGERS else bool if key == "use_scaled_rope" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise ConfigError(f"{path}: {key} = {value!r} has the wrong type")

    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in params:
            raise ConfigError(f"{path}: {key} is missing")
    return params


def _split_dim(name: str, parts: list[torch.Tensor], dim: int) -> int | None:
    """The dimension along which the ranks share a tensor; None: each holds all of it."""
    layer = f".{name}".split(".")[-2]
    if layer == "tok_embeddings":  # Llama 3 shares the vocabulary, its forerunners the width
        return 0 if parts[0].shape[-1:] == (dim,) else 1
    return _SPLIT_DIM.get(layer)


def _merged_info(name: str, parts: list[torch.Tensor], dim: int | None, root: Path) -> TensorInfo:
    if dim is not None and parts[0].ndim != 2:
        raise CheckpointError(f"{root}: {name} has shape {tuple(parts[0].shape)}, which is no matrix")
    shape = list(parts[0].shape)
    for part in parts[1:]:
        alike = part.dtype == parts[0].dtype and part.ndim == parts[0].ndim
        if not alike or any(part.shape[i] != parts[0].shape[i] for i in range(part.ndim) if i != dim):
            kinds = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
            raise CheckpointError(
                f"{root}: {name} is not alike in all shards ({kinds}): one of them is foreign"
            )
        if dim is not None:
            shape[dim] += part.shape[dim]
    return TensorInfo(torch.Size(shape), parts[0].dtype)


def _shape(params: Mapping[str, Any], found: Mapping[str, TensorInfo], root: Path) -> LlamaShape:
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in found:
            raise CheckpointError(f"{root} lacks {name}: this is no Llama, or a damaged file")
    scaling = _scaling(params)
    theta = float(params.get("rope_theta", 10_000.0))
    vocab_size = params.get("vocab_size", -1)
    if vocab_size == -1:  # as Llama 1 and 2 write, whose program asks the tokenizer
        vocab_size = found["tok_embeddings.weight"].shape[0]
    try:
        # head_dim stays dim / n_heads, as in Meta's own program: taken from wq it would hide a missing shard.
        return LlamaShape(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads", params["n_heads"]),
            vocab_size=vocab_size,
            ffn_dim=found["layers.0.feed_forward.w1.weight"].shape[0],
            norm_eps=params["norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings="output.weight" not in found,
            max_seq_len=_SCALED_CONTEXT if scaling else _CONTEXT.get(theta, 4096),
        )
    except ConfigError as error:
        raise ConfigError(f"{root / PARAMS}: {error}") from None


def _scaling(params: Mapping[str, Any]) -> RopeScaling | None:
    if not params.get("use_scaled_rope", False):
        return None
    if "rope_scaling_factor" in params:
        factor, why = params["rope_scaling_factor"], "rope_scaling_factor says so"
    elif (params["dim"], params["n_layers"]) in _LLAMA_3_2:
        factor, why = 32, f"dim {params['dim']} with {params['n_layers']} layers is Llama 3.2, which has 32"
    else:
        factor, why = 8, "it does not say, and Llama 3.1 has 8"
    logger.info("%s: rotary scaling by %s: %s", PARAMS, factor, why)
    return RopeScaling(factor=float(factor))
