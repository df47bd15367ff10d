"""The arrays of an .npz file, arrays of objects too, without running what a pickle names.

NumPy stores an array of objects as a pickle, which may run any code when it is loaded, so `numpy.load`
refuses it unless it is told to trust the file. Spike trains of unequal lengths are stored so all the same.
Here such a pickle may hold arrays of numbers and Python's lists and numbers, and nothing else.
"""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchtitan_rd.errors import DataError

# The function that a pickled array names, wherever this version of NumPy keeps it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Name -> array, in the order of the file. Raises DataError where it is no such file,
    or does not hold arrays alone.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    arrays[member.removesuffix(".npy")] = _read(stream)
    except Exception as error:  # of zipfile, zlib, numpy and pickle, of any bytes: a library boundary
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise DataError(f"{file}: is no .npz file of plain arrays: {reason}") from None
    if not arrays:
        raise DataError(f"{file}: holds no arrays")
    return arrays


def _read(stream: IO[bytes]) -> np.ndarray:
    """One member of the archive. An array of objects is found by its header."""
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if not dtype.hasobject:
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
    array = _ArraysOnly(stream).load()
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError("the array of objects does not fit its header")
    return array
