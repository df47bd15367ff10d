"""What a position in the data depends on; compared over the ranks before the first step, and on every resume.

A fingerprint is a dict of plain values: the settings that choose the windows, and digests of the rows (or,
for a stream of local files, of the files) and of the tokenizer. `files`, `skip_ranges` and
`tokenizer_revision` explain; they refuse nothing. That of a mixture holds under `sources` one of each source,
by name.
"""

from collections.abc import Sequence
from typing import Any

from torchtitan_rd.data.content import changed_files, changed_rows
from torchtitan_rd.data.mixture import MIXTURE
from torchtitan_rd.errors import DataError, listed
from torchtitan_rd.log import logger

_EXPLAINING = ("files", "skip_ranges", "tokenizer_revision", "sources")
_OF_DATA = ("num_samples", "rows", "content", "tokenizer", "file_borders")
# Settings that only some runs note, with what all others have.
_DEFAULTS = {"lane_per_file": False}


def check_fingerprint(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raises DataError, naming what changed and the remedy,
    unless a position in the one is a position in the other.
    """
    _check_settings(saved, present)
    there, here = saved.get("sources", {}), present.get("sources", {})
    if gone := sorted({*there} - {*here}):
        raise DataError(
            "the position in the data cannot be continued: training.mixture has no source "
            f"{', '.join(gone)}, which the checkpoint holds; to read no more of it, keep it with weight = 0"
        )
    for name, fingerprint in here.items():
        if name not in there:
            logger.warning("data: training.mixture.%s is new and begins at its start", name)
            continue
        try:
            _check_settings(there[name], fingerprint)
        except DataError as error:
            raise DataError(f"training.mixture.{name}: {error}") from error


def _check_settings(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """The same of one data set, or of what the sources of a mixture share."""
    saved = _completed(_of_full_batches(saved, present), present)
    changed = differences(saved, present)
    if changed:
        key = changed[0]
        raise DataError(
            f"the position in the data cannot be continued: what changed is {describe(key, saved, present)}; "
            f"{_remedy(key, saved, present)}"
        )

    # What follows moves no row, and is only told.
    if not present.get("rows", {"whole": True})["whole"] and "files" in saved:
        for line in changed_files(saved["files"], present["files"]):
            logger.warning(
                "data: %s; of data of this size only a sample is compared, and that is the same", line
            )
    if "rows" in present and "revision" in saved and saved["revision"] != present.get("revision"):
        logger.warning(
            "data: was read at %s and is now %s: the rows are the same",
            saved["revision"],
            present.get("revision"),
        )

    if (was := saved.get("skip_ranges", [])) != present.get("skip_ranges", []):
        logger.warning(
            "data: training.skip_ranges was %s and is now %s: all other rows keep their place",
            was,
            present.get("skip_ranges", []),
        )


def _remedy(key: str, saved: dict[str, Any], present: dict[str, Any]) -> str:
    """How to go on where `key` of a fingerprint changed."""
    was = _value(saved, key)
    if key == "dataset" and MIXTURE in (was, present[key]):
        return "a run that began with [[training.mixture]] goes on with it, and one without goes on without"
    if key == "global_batch_size":
        which = "which any number of ranks that divides it can continue"
        return f"set training.global_batch_size = {was}, {which}"
    if key in _OF_DATA:
        return "put the former data (and tokenizer) back, or begin a new run from the checkpoint's weights"
    if key == "revision":
        return f"set training.dataset_revision = {saved[key]['commit']!r}, or begin a new run"
    if key == "cut":
        return "begin a new run from the checkpoint's weights"
    return f"set training.{key} = {was!r} as before, or begin a new run from the checkpoint's weights"


def check_same_data(fingerprints: Sequence[dict[str, Any]]) -> None:
    """Raises one DataError, the same on every rank, if not all read the same.
    fingerprints: in the order of ranks.
    """
    lines = []
    for rank, fingerprint in enumerate(fingerprints):
        found = [
            name + describe(key, there, here)
            for name, there, here in _pairs(fingerprints[0], fingerprint)
            for key in differences(there, here)
        ]
        if found:
            lines.append(f"rank {rank}: {'; '.join(found)}")
    if lines:
        more = f"\n  and {len(lines) - 8} more ranks" if len(lines) > 8 else ""
        raise DataError(
            "these data ranks read other data than data rank 0 (was: there, now: here); "
            "is a copy or a cache of their "
            "machines older?\n  " + "\n  ".join(lines[:8]) + more
        )


def _pairs(first: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of two ranks of one run: what is to be compared with what, and what it is called."""
    sources = first.get("sources", {})
    return [
        ("", first, other),
        *((f"{name}: ", sources[name], own) for name, own in other.get("sources", {}).items()),
    ]


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The keys that refuse a position, in the order of the fingerprint."""
    keys = [*present, *(key for key in _DEFAULTS if key not in present)]
    changed = [
        key for key in keys if _refuses(key, saved, present) and _value(saved, key) != _value(present, key)
    ]
    # Digests are of ranges of rows, which are others where there are more or fewer rows.
    return [key for key in changed if not (key == "rows" and "num_samples" in changed)]


def _value(fingerprint: dict[str, Any], key: str) -> Any:
    return fingerprint.get(key, _DEFAULTS.get(key))


def _refuses(key: str, saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Rows that were compared decide, whatever their commit; an older checkpoint notes none."""
    if key == "revision":
        return "rows" not in present and key in saved
    return key not in _EXPLAINING


def describe(key: str, saved: dict[str, Any], present: dict[str, Any]) -> str:
    """What changed, in words."""
    was, now = _value(saved, key), _value(present, key)
    files = changed_files(saved["files"], present["files"]) if "files" in saved and "files" in present else []
    named = f" ({listed(files, 4)})" if files else ""
    if key == "rows" and was is not None and now is not None:
        return f"the data: {changed_rows(was, now, present['num_samples'])}{named}"
    if key == "num_samples":
        return f"num_samples, the number of rows (was {was}, now {now}){named}"
    if key == "content":
        return f"the content of the files{named}"
    if key == "tokenizer":
        template = " or its chat template" if "chat_loss" in present else ""
        return f"the tokenizer's content{template} (digest was {was}, is now {now})"
    if key == "file_borders":
        return f"how many rows lie in which file{named}"
    if key == "cut":
        return f"where small samples are cut into pieces (was {was!r}, now {now!r})"
    return f"{key} (was {was!r}, now {now!r})"


def _of_full_batches(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    """Of a run whose batch grows: an older checkpoint noted the rows of one stage as the batch."""
    stages = present.get("batch_ramp_stages")
    if stages is None or "batch_ramp_stages" in saved:
        return saved
    size = saved["global_batch_size"]
    return {**saved, "batch_ramp_stages": stages, "global_batch_size": size if size == -1 else size * stages}


def _completed(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of an older checkpoint, which noted ids of the first and last sample
    alone, as one of today.

    Only what it noted can be compared. Recordings were cut anywhere, which is another position.
    """
    if "cut" in saved or "cut" not in present:
        return saved
    logger.warning(
        "data: this checkpoint is of a version that did not note all rows: "
        "a change of the data or of the tokenizer since then is not seen, one after the next checkpoint is"
    )
    unknown: dict[str, Any] = {
        key: present[key] for key in ("rows", "content", "tokenizer") if key in present
    }
    return {**saved, **unknown, "cut": None if present.get("cut") is None else "tokens"}
