"""download-dataset fetches the files that training reads, from a stand-in for the hub with its rules."""

from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.utils import filter_repo_objects

from torchtitan_rd.__main__ import main

FILES = {
    "HuggingFaceFW/fineweb-edu": [
        "README.md",
        "sample/100BT/000.parquet",
        "sample/10BT/000.parquet",
        "data/a.parquet",
    ],
    "Salesforce/wikitext": ["README.md", "wikitext-2-raw-v1/train.parquet", "wikitext-103-v1/train.parquet"],
    "some/data": ["README.md", "a/x.parquet", "b/x.parquet"],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """-> the calls. A snapshot is a folder of links to blobs, as in the real cache."""
    calls = []

    def snapshot_download(repository, *, repo_type, revision, allow_patterns):
        calls.append((repository, repo_type, revision))
        folder = tmp_path / "cache" / repository.replace("/", "--") / "snapshots" / "0"
        for name in filter_repo_objects(FILES[repository], allow_patterns=allow_patterns):
            blob = tmp_path / "cache" / "blobs" / f"{repository}-{name}".replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            texts = {"text": [f"a text of {name}, number {i}" for i in range(20)]}
            pyarrow.parquet.write_table(pyarrow.table(texts), blob)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(blob)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def fetched(tmp_path):
    snapshots = tmp_path / "cache"
    return sorted(
        str(path.relative_to(folder))
        for folder in snapshots.glob("*/snapshots/0")
        for path in folder.rglob("*.*")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fineweb-edu"], ["README.md", "sample/100BT/000.parquet"]),
        ([], ["README.md", "sample/100BT/000.parquet"]),
        (["wikitext"], ["README.md", "wikitext-2-raw-v1/train.parquet"]),
        (["fineweb-edu", "--allow_pattern", "sample/10BT/*"], ["sample/10BT/000.parquet"]),
        (["some/data"], ["README.md", "a/x.parquet", "b/x.parquet"]),
        (
            ["some/data", "--allow_pattern", "a/*", "--allow_pattern", "README.md"],
            ["README.md", "a/x.parquet"],
        ),
    ],
)
def test_what_is_fetched_is_the_subset_that_training_reads_or_what_matches(
    arguments, expected, hub, tmp_path, capsys
):
    assert main(["download-dataset", *arguments]) == 0
    assert fetched(tmp_path) == expected
    assert f"{len(expected)} files" in capsys.readouterr().out
    assert hub[0][1] == "dataset"


def test_the_link_is_a_path_that_training_reads_without_the_hub(hub, tmp_path, capsys):
    link = tmp_path / "data" / "edu"
    for _ in range(2):  # again: the link that stands there is replaced
        assert main(["download-dataset", "fineweb-edu", "--symlink_to", str(link)]) == 0
    assert link.is_symlink() and str(link) in capsys.readouterr().out
    keys = ["--training.dataset=fineweb-edu", f"--training.dataset_path={link}", "--training.seq_len=8"]
    assert main(["data", "check", *keys, "--model.tokenizer_path=bytes"]) == 0
    assert "20 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fineweb-eduu"], "did you mean 'fineweb-edu'?"),
        (["synthetic"], "not on the hub"),
        (["some/data", "--allow_pattern", "c/*"], "no file that matches c/*"),
        (["some/data", "--symlink_to", "taken"], "exists and is no link"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    assert main(["download-dataset", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_hub_out_of_reach_is_one_line_with_the_remedy(monkeypatch, capsys):
    def unreachable(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert main(["download-dataset", "some/data"]) == 1
    err = capsys.readouterr().err
    assert (
        "ConnectionError: no network)" in err and err.count("\n") == 1 and "run the same command again" in err
    )
