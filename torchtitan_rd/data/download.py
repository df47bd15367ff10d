"""Files of a data set on the Hugging Face hub, fetched into its cache ahead of training."""

from collections.abc import Sequence
from pathlib import Path

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data import DATASETS
from torchtitan_rd.data.files import HUB_NAME
from torchtitan_rd.errors import ConfigError, DataError

CARD = "README.md"  # names the subsets to the datasets library


def files_on_hub(name: str, patterns: Sequence[str] | None) -> tuple[str, list[str] | None]:
    """-> (repository, patterns of the files to fetch, None: all) of a row of the table of data sets, or of a
    repository OWNER/NAME.

    Of a row with a subset, the files in the folder of that name, where a repository has it (fineweb's
    sample-100BT is sample/100BT), and the card. Raises ConfigError.
    """
    if name not in DATASETS:
        if not HUB_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is neither OWNER/NAME on the hub nor a data set{nearest(name, DATASETS)}"
            )
        return name, list(patterns) if patterns else None
    row = DATASETS[name]
    if row.hub is None:
        raise ConfigError(f"the data set {name!r} is not on the hub: there is nothing to download")
    if patterns or row.subset is None:
        return row.hub, list(patterns) if patterns else None
    return row.hub, [f"{row.subset}/*", f"{row.subset.replace('-', '/')}/*", CARD]


def download(
    repository: str, patterns: list[str] | None, revision: str | None = None, link: Path | None = None
) -> Path:
    """The folder with the files; what the cache has is not fetched again.

    link: becomes a symbolic link to it; another link that stands there is replaced, anything else refused.
    Raises ConfigError, DataError.
    """
    if link is not None and link.exists() and not link.is_symlink():
        raise ConfigError(f"--symlink_to {link} exists and is no link: name another path")
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )
    except Exception as error:  # of the hub and the network: a library boundary
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise DataError(
            f"{repository} cannot be fetched from the hub ({reason}); run the same "
            "command again where the hub can be reached: what is complete is kept"
        ) from error
    if not any(path.is_file() and path.name != CARD for path in folder.rglob("*")):
        raise DataError(f"{repository} has no file that matches {', '.join(patterns or ['*'])}")

    if link is not None:
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError as error:
            raise ConfigError(f"--symlink_to {link}: {error.strerror}") from None
    return folder
