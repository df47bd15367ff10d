"""Writes a .safetensors file one tensor at a time; the library's own writer needs all of them in memory.

Format: 8 bytes of little-endian length, a JSON header of that length, then the tensors' bytes in the header's
order (documentation of the safetensors library). Reading is the library's.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from torchtitan_rd.checkpoint import TensorInfo

DTYPES_BY_NAME = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> None:
    """A new file with floating-point `tensors`, whose data `read` gives.
    Costs the memory of the largest one.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        start, end = end, end + info.shape.numel() * info.dtype.itemsize
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            tensor = read(name).contiguous()
            if (tensor.shape, tensor.dtype) != (info.shape, info.dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {info}")
            if tensor.numel():
                tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)
