"""A small corpus and a tokenizer that was trained on it, once for all tests."""

import pytest

from tests.preparation.common import run, write_corpus


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Converted files of these tests go where they are removed again."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    assert (
        run("train-tokenizer", corpus, "--vocab-size", 600, "--chat-template", "huginn", "--output", folder)
        == 0
    )
    return folder
