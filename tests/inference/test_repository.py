"""A model named by its repository on the Hugging Face hub: fetched once a node, at one commit, no code."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from tests.conversion.common import tiny, weights_of
from tests.ranks import run_on_ranks
from torchtitan_rd.__main__ import main
from torchtitan_rd.conversion.huggingface import write_hf
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files

COMMIT = "c" * 40
GENERATE = ["generate", "some/raven", "--prompt", "ab", "--max-new-tokens", "4", "--ignore-eos", "--json"]
MEASURE = ["eval", "hf-ppl", "some/raven", "--dataset_name", "pydoc-validation", "--seq_len", "8"]
MEASURE += ["--batch_size", "1", "--num_batches", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What the hub holds: an export, with a file in a folder, and pickled weights beside the others."""
    folder = tmp_path_factory.mktemp("repository")
    files = tokenizer_files("bytes").files
    write_hf(weights_of(tiny("raven", vocab_size=258, max_seq_len=64), "raven", files=files), folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"another")
    return folder


def stand_in(patch: pytest.MonkeyPatch, repository: Path, cache: Path) -> list[str | None]:
    """snapshot_download from `repository`; returns the revisions that are asked for."""
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        asked.append(revision)
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        names = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / file, folder / file)
        return str(folder)

    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def called(rank, world_size, repository, cache, arguments):
    """-> exit status, what was printed, and the revisions that this rank has asked for."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        asked = stand_in(patch, repository, cache)
        return main(arguments), out.getvalue(), asked


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("arguments", [GENERATE, MEASURE], ids=["generate", "hf-ppl"])
def test_a_repository_is_the_model_in_it_and_fetched_by_one_rank_of_the_node(
    repository, tmp_path, capsys, arguments, world_size
):
    assert main([str(repository) if part == "some/raven" else part for part in arguments]) == 0
    local = capsys.readouterr().out
    found = run_on_ranks(
        world_size, called, repository, tmp_path, [*arguments, "--revision", "main"], timeout=300
    )
    assert [status for status, _, _ in found] == [0] * world_size
    assert found[0][1] == local and len(local) > 20
    assert [asked for _, _, asked in found] == [["main"], []][:world_size]


def test_code_pickles_and_folders_of_a_repository_stay_there(repository, tmp_path):
    status, out, asked = called(0, 1, repository, tmp_path, GENERATE)
    assert status == 0 and len(json.loads(out)["ids"]) == 4 and asked == [None]
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".py", ".bin")) for name in names)
    assert not any(path.name == "original" for path in tmp_path.rglob("*"))


def test_pickled_weights_are_fetched_where_there_are_no_others(repository, tmp_path, capsys):
    pickled = shutil.copytree(repository, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    status, _, asked = called(0, 1, pickled, tmp_path / "cache", GENERATE)
    assert status == 1 and asked == [None, None]  # the stand-in's are damaged
    assert "pytorch_model.bin" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [GENERATE, MEASURE], ids=["generate", "hf-ppl"])
def test_a_hub_that_cannot_be_reached_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    """Of the real library; a folder that is not there reads the same."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "CheckpointError: some/raven does not exist here" in error[0]
    assert "name a folder, or fetch it where the hub can be reached" in error[0]
