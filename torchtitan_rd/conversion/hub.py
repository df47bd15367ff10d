"""Pushes an exported folder to the Hugging Face hub."""

from pathlib import Path

from torchtitan_rd.errors import CheckpointError, ConfigError


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
