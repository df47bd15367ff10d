"""What the `datasets` library writes beside its data, which is not read as data."""

import json
from pathlib import Path

LIBRARY_JSON = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

SAVED = ("dataset_dict.json", "state.json")
"""A folder with one of these is of `save_to_disk`, and is read as a whole."""

CACHES = ("cache-", "tmp")
"""How the names of files begin that it keeps of a `map` or `shuffle`, or was writing when it was stopped."""


class LibraryFiles:
    """Tells arrow files that are data from those that the library wrote beside them."""

    def __init__(self) -> None:
        self._listed: dict[Path, set[str] | None] = {}

    def reason(self, file: Path) -> str | None:
        """Why an arrow file is not read, None if it is data.

        state.json says which files a data set is made of. The caches of what was computed from them hold the
        same rows once more.
        """
        if file.suffix.lower() != ".arrow":
            return None
        if file.parent not in self._listed:
            self._listed[file.parent] = _files_of_state(file.parent / "state.json")
        listed = self._listed[file.parent]
        if listed is not None:
            return None if file.name in listed else "not among the files that state.json lists"
        return "a cache of the datasets library" if file.name.startswith(CACHES) else None


def _files_of_state(path: Path) -> set[str] | None:
    """The data files that a state.json of `save_to_disk` lists; None if it is none."""
    try:
        return {entry["filename"] for entry in json.loads(path.read_text(encoding="utf-8"))["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
