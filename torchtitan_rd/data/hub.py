"""Which commit of a repository on the Hugging Face hub is read: asked once in a run's life, by one rank."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.tokenizer import Tokenizer, download_tokenizer, is_hub_name
from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin_revision(
    config: DatasetKeys,
    hub: str | None,
    states: Iterable[Path],
    split: str = "train",
    source: str | None = None,
) -> str | None:
    """The commit to read on all ranks; None for data that is not on the hub.
    For one rank, which alone asks the hub.

    hub: the repository of the data set's row. source: its name in a mixture. states: the `state.json` of the
    run's checkpoints, newest first, of which the first that can be read decides, so that a resumed run reads
    what it has read. Without one, a hub that cannot be reached leaves None too: then the copy in its cache is
    read, and that one's commit noted. Raises DataError if training.dataset_revision names what the hub does
    not have.
    """
    name = repository(config, hub, split)
    if name is None or _COMMIT.fullmatch(config.dataset_revision or ""):
        return config.dataset_revision
    if config.dataset_revision is None and (noted := _noted(name, states, source=source)):
        logger.info("data: %s is read at commit %s, which the checkpoint notes", name, noted)
        return noted
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=config.dataset_revision, timeout=30.0).sha
    except RevisionNotFoundError as error:
        raise DataError(
            f"training.dataset_revision = {config.dataset_revision!r}: {name} on the hub has no such branch, "
            f"tag or commit"
        ) from error
    except Exception as error:  # of the hub and the network: a library boundary
        if config.dataset_revision is not None:
            raise DataError(
                f"training.dataset_revision = {config.dataset_revision!r}: "
                f"the hub cannot be asked which commit of {name} this is ({type(error).__name__}); "
                "name the commit itself, which a cache may hold"
            ) from error
        logger.warning(
            "data: the hub cannot be asked for %s (%s): a cached copy is read", name, type(error).__name__
        )
        return None


def hub_tokenizer(path: str, states: Iterable[Path] = ()) -> str:
    """The folder of a tokenizer on the hub, fetched at the commit that the run's checkpoints note, else the
    newest one; any other `model.tokenizer_path` as it is. For one rank of a node, which alone asks the hub.

    Raises ConfigError if it cannot be had.
    """
    if not is_hub_name(path):
        return path
    noted = _noted(path, states, "tokenizer_revision")
    if noted is not None:
        logger.info("data: the tokenizer %s is read at commit %s, which the checkpoint notes", path, noted)
    return str(download_tokenizer(path, noted))


def tokenizer_revision(tokenizer: Tokenizer) -> dict[str, dict[str, str]]:
    """For the fingerprint: repository and commit of one in the hub's cache, nothing for any other."""
    owned = re.search(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", str(tokenizer.folder))
    return (
        {"tokenizer_revision": {"repository": f"{owned[1]}/{owned[2]}", "commit": owned[3]}} if owned else {}
    )


def repository(config: DatasetKeys, hub: str | None, split: str = "train") -> str | None:
    """The repository on the hub that is read, None for data that lies here.
    Raises DataError as `check_path`.
    """
    if config.dataset_path is None:
        return hub
    found = check_path(config.dataset_path, split)
    return None if found.files or found.saved else config.dataset_path


def check_revision(name: str, table: Any, wanted: str | None) -> str | None:
    """The commit that a table or stream of the hub holds, if that is known.

    Where the hub cannot be reached, the datasets library reads the newest copy in its cache,
    whatever was asked for; the commit is the name of the copy's folder. Raises DataError if that is
    another one than `wanted`.
    """
    files = getattr(table, "cache_files", None) or []
    held = {folder for entry in files if _COMMIT.fullmatch(folder := Path(entry["filename"]).parent.name)}
    if wanted is not None and held - {wanted}:
        raise DataError(
            f"{name}: commit {wanted} of the data is to be read, "
            "but the hub cannot be reached and its cache holds "
            f"{', '.join(sorted(held))}: reach the hub, or set training.dataset_revision for a run of its own"
        )
    return wanted or next(iter(held), None)


def cached_commit(name: str, subset: str | None) -> str | None:
    """The commit of the copy in the cache, which a stream reads where the hub cannot be asked."""
    import datasets

    try:
        commit = Path(datasets.load_dataset_builder(name, subset).cache_dir).name
    except Exception:  # of the hub and the network: a library boundary
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _noted(name: str, states: Iterable[Path], key: str = "revision", source: str | None = None) -> str | None:
    """What the first state that can be read notes, of a mixture's `source`; the checkpoints of one run
    agree.
    """
    for path in states:
        try:
            fingerprint = json.loads(path.read_text())["data"]["fingerprint"]
            if source is not None:
                fingerprint = fingerprint["sources"][source]
            noted = fingerprint.get(key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return noted["commit"] if noted and noted["repository"] == name else None
    return None
