"""Whether the data lasts for a run, as far as that can be told without reading it."""

from dataclasses import dataclass
from pathlib import Path

from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import DataSet
from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.errors import DataError
from torchtitan_rd.run_plan import RunPlan


@dataclass(frozen=True)
class Supply:
    """name: of the data set. rows: those that are read. files, rows, epochs: None where they are not known.
    note: why.
    """

    name: str
    files: int | None = None
    rows: int | None = None
    epochs: float | None = None
    note: str = ""


def supplies(config: JobConfig, plan: RunPlan, rows_needed: int) -> list[Supply]:
    """rows_needed: sequences of the whole run. Looks at files here, asks no hub, reads no sample."""
    sets = plan.sets
    return [_supply(one, rows_needed if len(sets) == 1 else None) for one in sets]


def _supply(one: DataSet, rows_needed: int | None) -> Supply:
    name = one.name or one.keys.dataset
    if one.row.samples:
        return Supply(name, note="made here")
    if not one.keys.dataset_path:
        return Supply(name, note=f"on the hub ({one.row.hub}), which was not asked")
    try:
        found = check_path(one.keys.dataset_path, "train")
    except DataError as error:
        return Supply(name, note=str(error))

    files = sorted(Path(file) for file in found.files)
    if one.keys.source_dataset:
        note = f"its rows of {one.keys.source_dataset} are only counted by reading: see `data check`"
        return Supply(name, len(files), note=note)
    rows = _rows(files)
    if rows is None:
        return Supply(
            name, len(files), note="rows of these files are only counted by reading: see `data check`"
        )

    rows -= _skipped(one.keys.skip_ranges, rows)
    if one.row.kind != "packed" or rows_needed is None:
        return Supply(name, len(files), rows, note="a row is a sample of any length: see `data check`")
    return Supply(name, len(files), rows, rows_needed / rows if rows else None, "a row is a sequence")


def _skipped(ranges: list[list[int]], rows: int) -> int:
    """How many of so many rows lie in ranges (first, last), which may overlap and go beyond."""
    skipped = behind = 0
    for first, last in sorted(ranges):
        end = min(last + 1, rows)
        skipped += max(end - max(first, behind), 0)
        behind = max(behind, end)
    return skipped


def _rows(files: list[Path]) -> int | None:
    """From the footers of Parquet files; None for others."""
    if not files or any(file.suffix != ".parquet" for file in files):
        return None
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)
