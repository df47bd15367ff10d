"""`training.lane_per_file`: which rows lie in which file, and whether files and global batch agree."""

from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.batch_dims import BatchDims
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import FileOrder
from torchtitan_rd.data.files import FileList
from torchtitan_rd.errors import ConfigError, DataError

_SHOWN = 8


def check_file_lanes(config: DatasetKeys, dims: BatchDims, split: str = "train") -> None:
    """Nothing unless `training.lane_per_file` is set. Looks at the names of files alone.

    Raises ConfigError where files cannot be told apart, or their number and the global batch do not agree.
    """
    if not config.lane_per_file or config.dataset_path is None:
        return
    found = check_path(config.dataset_path, split)
    if not found.files or found.builder() not in ("parquet", "arrow"):
        raise ConfigError(
            f"training.lane_per_file: {config.dataset_path} is not a folder, glob or file of .parquet or "
            ".arrow files that lie here; download or convert it, or set lane_per_file = false"
        )

    files, batch = len(found.files), dims.global_batch_size
    if files % batch:
        raise ConfigError(
            f"training.lane_per_file: the {files} files of {config.dataset_path} are not a multiple of the "
            f"{batch} rows of training.global_batch_size; {_sizes_that_work(files, dims)}"
        )


def file_order(config: DatasetKeys, found: FileList, num_rows: int, num_lanes: int) -> FileOrder | None:
    """The order of files in lanes, None unless `training.lane_per_file` is set.

    num_rows: of all files. Raises DataError for a file without rows, or one that changed since it was
    converted.
    """
    if not config.lane_per_file:
        return None
    rows = found.rows
    if 0 in rows:
        raise DataError(f"training.lane_per_file: {found.files[rows.index(0)]} holds no rows; remove it")
    if sum(rows) != num_rows:
        raise DataError(
            f"training.lane_per_file: the files of {found.path} hold {sum(rows)} rows, but {num_rows} were "
            "read; did one change meanwhile? Begin again"
        )
    return FileOrder(rows, num_lanes)


def _sizes_that_work(files: int, dims: BatchDims) -> str:
    """Those nearest to the present one, of the sizes that so many ranks and stages can share out."""
    shares = dims.data_degree * dims.stages
    sizes = [size for size in range(shares, files + 1, shares) if files % size == 0]
    if not sizes:
        return f"no size works on {dims.data_degree} data ranks, which must divide the number of files"
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - dims.global_batch_size))[:_SHOWN])
    which = f"of {', '.join(map(str, nearest))}" if len(nearest) > 1 else f"{nearest[0]}"
    return f"on {dims.data_degree} data ranks a global batch {which} works (local_batch_size must divide it)"
