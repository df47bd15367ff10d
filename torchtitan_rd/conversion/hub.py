"""Models on the Hugging Face hub: an exported folder is pushed there, a released one is fetched."""

from pathlib import Path

from torchtitan_rd.conversion.huggingface import CONFIG_JSON
from torchtitan_rd.conversion.tokenizer_files import GENERATION_CONFIG, NAMES
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.log import logger

# The top folder alone, and never a .py file: our copy of a family's code is run, or none.
_FETCHED = [CONFIG_JSON, GENERATION_CONFIG, *NAMES, "*.safetensors", "*.safetensors.index.json"]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def check_push(repo_name: str | None, push: bool) -> None:
    """What can be known before the export. Raises ConfigError; asks nothing over the network."""
    if not push and repo_name is None:
        return
    if repo_name is None:
        raise ConfigError("--push_to_hub needs --hf_repo_name: the repository to push to, as OWNER/NAME")
    if not push:
        raise ConfigError(
            f"--hf_repo_name {repo_name} does nothing without --push_to_hub: add it, or leave both out"
        )
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_name)
    except HFValidationError as error:
        raise ConfigError(
            f"--hf_repo_name {repo_name!r} is no name of a repository, as OWNER/NAME: {error}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push_to_hub cannot work while HF_HUB_OFFLINE is set: unset it, or push later")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            "--push_to_hub needs a token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repo_name: str, path_in_repo: str | None) -> str:
    """Uploads the files of `folder` into the repository, which is made if it is not there;
    returns its address.

    path_in_repo: a folder there; None: the top. Raises CheckpointError if the hub is out of reach or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo_name, repo_type="model", exist_ok=True))
        api.upload_folder(
            folder_path=folder,
            repo_id=repo_name,
            repo_type="model",
            path_in_repo=path_in_repo,
            commit_message=f"Upload {path_in_repo or folder.name}",
        )
    except Exception as error:  # of the hub and the network, whose classes differ between versions
        raise CheckpointError(
            f"the push to {repo_name} failed ({type(error).__name__}: {error}), but the export itself is "
            f"complete in {folder}: push it later, for example with `hf upload {repo_name} {folder}"
            f"{f' {path_in_repo}' if path_in_repo else ''}`"
        ) from error
    return f"{address}/tree/main/{path_in_repo}" if path_in_repo else address


def fetch_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model's repository, OWNER/NAME: weights, configuration and tokenizer; the hub's cache
    keeps it. Pickled weights are fetched only where there are no others.

    revision: the commit, branch or tag; None: the newest commit. Raises CheckpointError if it cannot be had.
    """
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )

    try:
        folder = fetch(_FETCHED)
        if not any(folder.glob("*.safetensors")):
            folder = fetch([*_FETCHED, *_PICKLED])
    except Exception as error:  # of the hub and the network, whose classes differ between versions
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} does not exist here, and as a repository on the Hugging Face hub it cannot be had "
            f"({type(error).__name__}: {reason}): name a folder, or fetch it where the hub can be reached"
        ) from error
    logger.info("%s is read at commit %s", name, folder.name)
    return folder
