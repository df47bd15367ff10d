"""conversion/hub.py: mistakes are found before the export; a push that fails leaves the export."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from torchtitan_rd.conversion.hub import check_push, push_folder
from torchtitan_rd.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def online_with_a_token(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")


@pytest.fixture
def calls(monkeypatch):
    """A hub that takes everything."""
    made = []

    class Api:
        def create_repo(self, repo_id, **options):
            made.append(("create_repo", repo_id, options))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            made.append(("upload_folder", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return made


def test_a_push_that_can_work_and_none_at_all_are_fine():
    check_push(None, False)
    check_push("owner/name", True)
    check_push("name", True)


@pytest.mark.parametrize(
    ("repo_name", "push", "message"),
    [
        (None, True, "--push_to_hub needs --hf_repo_name"),
        ("owner/name", False, "--hf_repo_name owner/name does nothing without --push_to_hub"),
        ("", True, "--hf_repo_name '' is no name"),
        ("a/b/c", True, "--hf_repo_name 'a/b/c' is no name of a repository, as OWNER/NAME"),
        ("owner/two words", True, "is no name of a repository"),
    ],
)
def test_wrong_arguments_are_found_before_the_export(repo_name, push, message):
    with pytest.raises(ConfigError, match=message):
        check_push(repo_name, push)


def test_a_missing_token_is_found_before_the_export(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="`hf auth login`, or set HF_TOKEN"):
        check_push("owner/name", True)
    check_push(None, False)


def test_an_offline_machine_is_found_before_the_export(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_push("owner/name", True)


@pytest.mark.parametrize(
    ("place", "address"),
    [(None, "https://hub/owner/name"), ("step-5", "https://hub/owner/name/tree/main/step-5")],
)
def test_a_folder_is_pushed_into_a_repository_that_is_made_if_need_be(calls, place, address, tmp_path):
    assert push_folder(tmp_path, "owner/name", place) == address
    assert calls[0] == ("create_repo", "owner/name", {"repo_type": "model", "exist_ok": True})
    name, options = calls[1]
    assert name == "upload_folder" and options.pop("commit_message")
    assert options == {
        "folder_path": tmp_path,
        "repo_id": "owner/name",
        "repo_type": "model",
        "path_in_repo": place,
    }


def test_the_calls_have_the_arguments_of_the_real_hub(calls, tmp_path, monkeypatch):
    import inspect

    push_folder(tmp_path, "owner/name", "step-5")
    monkeypatch.undo()
    api = huggingface_hub.HfApi
    inspect.signature(api.create_repo).bind(None, calls[0][1], **calls[0][2])
    inspect.signature(api.upload_folder).bind(None, **calls[1][1])


def test_a_push_that_fails_says_that_the_export_is_complete(tmp_path, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(CheckpointError) as caught:
        push_folder(tmp_path, "owner/name", "step-5")
    message = str(caught.value)
    assert f"ConnectionError: no route), but the export itself is complete in {tmp_path}" in message
    assert f"`hf upload owner/name {tmp_path} step-5`" in message


def test_a_push_of_the_real_library_fails_in_the_same_way_when_it_is_offline(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    # As the variable sets it when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(CheckpointError) as caught:
        push_folder(tmp_path, "owner/name", None)
    assert "the push to owner/name failed (Offline" in str(caught.value)
    assert f"the export itself is complete in {tmp_path}" in str(caught.value)
