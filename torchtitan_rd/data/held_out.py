"""Whether held-out data is other data than what was trained on: told by the names of files before anything
is read, and by the rows once both are open.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.files import FileList, some
from torchtitan_rd.data.opening import DataSet
from torchtitan_rd.errors import ConfigError, DataError

_REMEDY = "name other data with validation.dataset, validation.dataset_path or validation.split"


def check_held_out(trained: Sequence[DataSet], held: DataSet, split: str) -> None:
    """Raises ConfigError where held-out data is what one of `trained` reads, DataError for a path that is
    not there. Looks at the names of files alone. Samples that are made here, of which there may be no other
    part, are left to a warning of the run (validation.py); who skips rows may hold them out so.
    """
    if held.row.samples:
        return
    for one in trained:
        if one.keys.skip_ranges:
            continue
        if what := shared_data(one, "train", held, split):
            name = "training" if one.name is None else f"training.mixture.{one.name}"
            raise ConfigError(
                f"validation.split = {split!r}: the held-out set would be {what}, which {name} reads too: "
                f"{_REMEDY}"
            )


def shared_data(one: DataSet, split: str, other: DataSet, other_split: str) -> str | None:
    """What two data sets both read, in words; None where that cannot be told without reading them.

    Samples that are made here have no splits, whatever `split` says, and neither has a single file. Raises
    DataError for a path that is not there.
    """
    if one.row.samples or other.row.samples:
        same = one.keys.dataset == other.keys.dataset
        return f"{one.keys.dataset!r}, which is made here and has no splits" if same else None

    found, others = (_files(*pair) for pair in ((one, split), (other, other_split)))
    if found is None or others is None:
        places = [(each.keys.dataset_path or each.row.hub, _subset(each)) for each in (one, other)]
        on_hub = found is others and places[0] == places[1] and split == other_split
        return f"split {split!r} of {places[0][0]}" if on_hub else None
    if found.saved or others.saved:
        root = Path(found.path)
        same = found.saved and others.saved and root.samefile(others.path)
        has_splits = (root / "dataset_dict.json").is_file()
        return f"all of {found.path}" if same and (split == other_split or not has_splits) else None

    facts = {(fact.st_dev, fact.st_ino) for fact in (file.stat() for file in found.files)}
    shared = [file for file in others.files if (file.stat().st_dev, file.stat().st_ino) in facts]
    return f"{len(shared)} files ({some([others.name(file) for file in shared])})" if shared else None


def check_other_rows(trained: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    """Raises DataError where held-out rows are those of training, or lie in a copy of one of its files.

    The two are fingerprints (fingerprint.py); that of a mixture holds one for each source.
    """
    for one in trained.get("sources", {"": trained}).values():
        files = {_content(fact) for fact in one.get("files", {}).values()} - {None}
        copies = [name for name, fact in held.get("files", {}).items() if _content(fact) in files]
        facts = ("num_samples", "rows")
        if copies or ("rows" in held and all(one.get(fact) == held[fact] for fact in facts)):
            which = f"{some(copies)}: holds" if copies else "the held-out set holds"
            raise DataError(f"validation: {which} the very rows that training reads: {_REMEDY}")


def _files(data: DataSet, split: str) -> FileList | None:
    """None for data on the hub."""
    path = data.keys.dataset_path
    found = None if path is None else check_path(path, split)
    return found if found is not None and (found.files or found.saved) else None


def _subset(data: DataSet) -> str | None:
    return None if data.keys.dataset_path else data.row.subset


def _content(fact: Mapping[str, Any]) -> tuple[int, str] | None:
    """Of a file that is converted; one that is mapped has no digest."""
    return (fact["size"], fact["digest"]) if fact["size"] and "digest" in fact else None
