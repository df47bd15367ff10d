"""A bare state dict by our names in a file of torch.save, as `dcp_to_llama --format pth` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion.pth import named_tensors, open_pth
from torchtitan_rd.conversion.weights import Weights, check_shapes, matching_flavor, model_tensors
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.models import get_flavor, get_spec


def open_state_dict(
    file: Path, *, model: str, flavor: str, overrides: Mapping[str, Any] | None = None
) -> Weights:
    """The weights of a file that holds the tensors alone, or under the key "model".

    model, flavor, overrides: the shape, which such a file does not tell. Raises ConfigError for one that
    there is not, CheckpointError for tensors that are missing, left over or of another shape.
    """
    spec = get_spec(model)
    shape = get_flavor(spec, flavor, overrides)
    found = open_pth(file)
    inner = found.get("model") if isinstance(found, dict) else None
    held = inner if isinstance(inner, dict) else found
    if isinstance(held, dict):
        # Before anything is asked of them: a rotary table of complex numbers is no tensor to the reader.
        held = {name: value for name, value in held.items() if name not in spec.derived}
    tensors = named_tensors(held, str(file))

    wanted, tied = model_tensors(spec, shape)
    present: dict[str, torch.Tensor] = {}
    for name in wanted:
        source = name if name in tensors else tied.get(name, name)
        if source in tensors:
            present[name] = tensors[source]

    surplus = {name: tensor for name, tensor in tensors.items() if name not in wanted}
    check_shapes({**present, **surplus}, wanted, str(file))
    for name, first in tied.items():
        if not torch.equal(present[name], present[first]):
            raise CheckpointError(f"{file}: {spec.name} {flavor} is tied, but {name} is not {first}")

    return Weights(
        spec=spec,
        shape=shape,
        flavor=matching_flavor(spec, shape),
        tensors={name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in present.items()},
        read=present.__getitem__,
        origin=str(file),
    )
