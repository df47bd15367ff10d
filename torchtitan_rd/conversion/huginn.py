"""Training files of Huginn's own program: `step-<microbatch>-<run>_<rank>.pth`.

Each holds the whole model beside the optimizer, the state of the data loader and other objects,
of which nothing is read but the step and the shape.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion.pth import Inert, named_tensors, open_pth
from torchtitan_rd.conversion.weights import Weights, check_shapes, matching_flavor, model_tensors
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.models.raven.released import (
    BLOCK_OF,
    COMPUTED,
    NOT_BUILT,
    OPTIONS,
    REQUIRED,
    ROTARY,
    SIZES,
    Option,
)
from torchtitan_rd.models.raven.shape import RavenShape

MODEL_CONFIG = "model_config.json"
_WRAPPED = re.compile(r"(_orig_mod\.)?_original_module\.")  # by compile and by the training fabric
# Tables that follow from the shape, and factors that none of the supported blocks applies.
_DERIVED = re.compile(r"(.*\.)?(freqs_cis|res_scale|skip_scale)")
_IN_LOOP = re.compile(r"^transformer\.(?=(adapter|core_block)\.)")
_ROPE = "rope_settings"
# What its configuration can say beyond our model: key -> the values that mean what ours computes,
# the default first.
_ONLY: dict[str, tuple] = {
    "architecture_class_name": ("RecurrentGPT",),
    "norm_class_name": ("RMSNorm_llama", "RMSNorm", "TorchRMSNorm", "FusedRMSNorm"),
    "init_strategy": COMPUTED["init_strategy"],
    **NOT_BUILT,
    **{f"{_ROPE}.{key}": known for key, known in ROTARY.items()},
}


def open_huginn(file: Path, flavor: str | None = None) -> Weights:
    """The weights in a training file of Huginn's.

    The shape is that of `model_config` in the file, else of model_config.json in its folder or the one above,
    else of `flavor`. Raises ConfigError for a shape that is unknown or not ours, CheckpointError for a
    damaged file and for tensors that are missing, left over or of another shape; all before any data is read,
    but for a tied head that is stored apart from the embedding, which must be equal to it.
    """
    spec = get_spec("raven")
    state = open_pth(file)
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"{file} is no training file of Huginn's: it holds no 'model'")
    tensors = _our_tensors(named_tensors(state["model"], f"{file}: model"))
    shape = _find_shape(file, state.get("model_config"), flavor)
    wanted, tied = model_tensors(spec, shape)
    given = {name: tensors.pop(name) for name in tied if name in tensors}
    check_shapes(tensors, {name: size for name, size in wanted.items() if name not in tied}, str(file))
    for name, tensor in given.items():
        first = tensors[tied[name]]
        # Saved as one storage, as tied weights are, they need no reading.
        if tensor.data_ptr() != first.data_ptr() and not torch.equal(tensor, first):
            raise CheckpointError(f"{file}: tie_embeddings is set, but {name} is not {tied[name]}")
    whole = {name: tensors[tied.get(name, name)] for name in wanted}
    return Weights(
        spec=spec,
        shape=shape,
        flavor=matching_flavor(spec, shape),
        tensors={name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in whole.items()},
        read=whole.__getitem__,
        origin=str(file),
        step=_step(state, file.name),
    )


def _our_tensors(model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By our names. The wrapped module lists each tensor twice;
    the names that count are those of the original.
    """
    names = {key: key[match.end() :] for key in model if (match := _WRAPPED.match(key))} or {
        key: key for key in model
    }
    return {
        _IN_LOOP.sub("transformer.recurrence.iteration.", name): model[key]
        for key, name in names.items()
        if not _DERIVED.fullmatch(name)
    }


def _find_shape(file: Path, stored: Any, flavor: str | None) -> RavenShape:
    besides = [
        path for path in (file.parent / MODEL_CONFIG, file.parent.parent / MODEL_CONFIG) if path.is_file()
    ]

    if stored is not None:
        shape, place = _shape(_table(stored), f"{file}: model_config"), str(file)
    elif besides:
        try:
            fields = json.loads(besides[0].read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{besides[0]} is no JSON: {error}") from None
        shape, place = _shape(_table(fields), str(besides[0])), str(besides[0])
    elif flavor is None:
        raise ConfigError(
            f"{file} does not tell the model's shape, nor does a {MODEL_CONFIG} there: pass --flavor"
        )
    else:
        return get_flavor(get_spec("raven"), flavor)

    if flavor is not None and get_flavor(get_spec("raven"), flavor) != shape:
        logger.warning(
            "%s: the shape is taken from %s; it is not that of flavor %s", file.name, place, flavor
        )
    return shape


def _table(fields: Any) -> dict[str, Any]:
    """A configuration as a table, with the nested `rope_settings` flattened;
    it may be an object of a lost class.
    """
    table = dict(vars(fields)) if isinstance(fields, Inert) else fields
    if not isinstance(table, dict):
        raise CheckpointError("the model's configuration is no table of settings")
    rope = table.get(_ROPE, {})
    rope = vars(rope) if isinstance(rope, Inert) else rope
    return table | {
        f"{_ROPE}.{key}": value for key, value in (rope if isinstance(rope, dict) else {}).items()
    }


def _shape(fields: Mapping[str, Any], place: str) -> RavenShape:
    for key, only in _ONLY.items():
        if fields.get(key, only[0]) not in only:
            wanted = " or ".join(map(repr, only))
            raise ConfigError(f"{place}: {key} = {fields[key]!r} is not supported, only {wanted}")
    block = fields.get("block_class_name")
    if block not in BLOCK_OF:
        raise ConfigError(
            f"{place}: block_class_name = {block!r} is not supported, only {' or '.join(BLOCK_OF)}"
        )

    def get(key: str, kind: type | tuple[type, ...] = int, default: Any = None) -> Any:
        value = fields.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"{place}: {key} is {'missing' if value is None else f'{value!r}, of the wrong type'}"
            )
        return value

    def get_option(option: Option) -> Any:
        key = f"{_ROPE}.{option.name}" if option.name == "rope_base" else option.name
        default = None if option.trained is REQUIRED else option.trained
        if option.released is None and fields.get(key, default) is None:
            return None
        kind = type(option.released)
        return get(key, kind, default) if kind in (bool, int, str) else float(get(key, (int, float), default))

    heads = get("num_attention_heads")
    kv_heads = heads if fields.get("num_key_value_heads") is None else get("num_key_value_heads")
    if fields.get("padded_vocab_size") is None:
        multiple = get("padding_multiple", default=512)
        vocab = -(-get("vocab_size") // multiple) * multiple
    else:
        vocab = get("padded_vocab_size")
    try:
        return RavenShape(
            n_heads=heads,
            n_kv_heads=None if kv_heads == heads else kv_heads,
            vocab_size=vocab,
            block=BLOCK_OF[block],
            **{ours: get(theirs) for ours, theirs in SIZES.items()},
            **{ours: get_option(option) for ours, option in OPTIONS.items()},
        )
    except ConfigError as error:
        raise error if str(error).startswith(place) else ConfigError(f"{place}: {error}") from None


def _step(state: Mapping[str, Any], name: str) -> int | None:
    for key in ("optimizer_step", "microbatch_step"):
        if type(state.get(key)) is int:
            return state[key]
    match = re.match(r"step-(\d+)", name)
    return int(match[1]) if match else None
