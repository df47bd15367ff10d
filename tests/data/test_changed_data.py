"""Data or a tokenizer that changed is refused on resume with what changed,
and between ranks before the first step.
"""

import json
import logging
import shutil
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from tests.data.helpers import Ranks, build, merge_states
from tests.ranks import run_on_ranks
from torchtitan_rd import job, parts, train
from torchtitan_rd.data import DatasetKeys, content
from torchtitan_rd.data.content import Digest, digest_of_table
from torchtitan_rd.data.fingerprint import check_same_data
from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger

ROWS = 10_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows) -> DatasetKeys:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return keys(path)


def keys(path, **others):
    return DatasetKeys(dataset="text", dataset_path=str(path), seq_len=8, local_batch_size=2, **others)


def resume(config, state, **options):
    loader = build(config, **options)
    loader.load_state_dict(json.loads(json.dumps(merge_states([state]))))
    return loader


@pytest.mark.parametrize("stream", [False, True])
def test_one_changed_row_among_ten_thousand_is_refused_with_where_it_is(stream, tmp_path):
    rows = [f"row {i}" for i in range(ROWS)]
    path = tmp_path / "a.jsonl"
    write(path, rows)
    state = build(keys(path, stream=stream)).state_dict()
    resume(keys(path, stream=stream), state)
    rows[5000] = "Row 5000"
    write(path, rows)
    where = (
        "the content of the files"
        if stream
        else "the data: among rows 5000..5155 of 10000, some hold other data"
    )
    with pytest.raises(DataError, match=rf"what changed is {where}.*\(a\.jsonl has other content\)"):
        resume(keys(path, stream=stream), state)


def test_reordered_rows_are_refused_with_where_they_are(tmp_path):
    rows = [f"row {i:03}" for i in range(100)]
    state = build(write(tmp_path / "a.jsonl", rows)).state_dict()
    config = write(tmp_path / "a.jsonl", [rows[0], *reversed(rows[1:99]), rows[99]])
    with pytest.raises(
        DataError, match=r"among rows 1\.\.99 of 100, some hold other data or stand in another order"
    ):
        resume(config, state)


def test_one_changed_sample_of_those_made_here_is_refused_with_where_it_is(monkeypatch):
    from torchtitan_rd.data import DATASETS, Dataset

    def of(samples):
        monkeypatch.setitem(DATASETS, "pydoc", Dataset("text", samples=lambda seed: samples))
        return DatasetKeys(seq_len=8, local_batch_size=2)

    samples = [f"sample {i:03}" for i in range(100)]
    state = build(of(samples)).state_dict()
    resume(of(list(samples)), state)
    with pytest.raises(DataError, match=r"what changed is the data: among rows 50 of 100"):
        resume(of([*samples[:50], "Sample 050", *samples[51:]]), state)


def test_a_file_that_grew_is_refused_with_its_sizes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 10_000)
    state = build(keys(path)).state_dict()
    path.write_text("x" * 10_000 + "y" * 45_000)
    with pytest.raises(DataError, match=r"among rows 0 of 1, .*\(a\.txt had 10,000 bytes and has 55,000\)"):
        resume(keys(path), state)


def test_rows_that_were_added_are_refused_with_both_numbers(tmp_path):
    state = build(write(tmp_path / "a.jsonl", ["a", "b"])).state_dict()
    with pytest.raises(DataError, match=r"num_samples, the number of rows \(was 2, now 3\)"):
        resume(write(tmp_path / "a.jsonl", ["a", "b", "c"]), state)


def test_of_data_beyond_the_limit_lengths_count_and_times_are_warned_about(tmp_path, monkeypatch, caplog):
    import datasets

    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "SAMPLE_BYTES", 500)
    path = tmp_path / "saved"

    def save(rows):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(path))
        return keys(path)

    rows = ["x" * 1000] * 100
    state = build(save(rows)).state_dict()
    assert state["fingerprint"]["rows"]["whole"] is False
    logger.propagate = True
    with caplog.at_level(logging.WARNING, logger=logger.name):
        resume(save(rows), state)
    assert "data-00000-of-00001.arrow was written since" in caplog.text
    rows[50:52] = ["x" * 999, "x" * 1001]
    with pytest.raises(DataError, match=r"among rows 50\.\.5\d of 100"):
        resume(save(rows), state)


def test_data_that_moved_is_continued(tmp_path):
    config = write(tmp_path / "a.jsonl", ["first", "second"])
    with Ranks(config) as run:
        run.read(2)
        state, expected = run.save(), run.read(1)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a.jsonl", tmp_path / "elsewhere" / "b.jsonl")
    with Ranks(keys(tmp_path / "elsewhere" / "b.jsonl")) as run:
        assert run.load(state).read(1)[0].equal(expected[0])


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[U]": 2}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_is_told_by_its_content_and_not_by_its_path(tokenizer, tmp_path):
    config = write(tmp_path / "a.jsonl", ["a b a b"] * 64)
    state = build(config, tokenizer_path=str(tokenizer)).state_dict()
    shutil.copytree(tokenizer, tmp_path / "moved")
    resume(config, state, tokenizer_path=str(tmp_path / "moved"))
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=4))
    resume(config, state, tokenizer_path=str(tokenizer))
    changed = text.replace('"a": 0', '"c": 0').replace('"a":0', '"c":0')
    assert changed != text
    (tokenizer / "tokenizer.json").write_text(changed)
    with pytest.raises(DataError, match="what changed is the tokenizer's content"):
        resume(config, state, tokenizer_path=str(tokenizer))


def test_a_checkpoint_that_noted_the_ends_of_the_data_alone_goes_on_with_a_warning(tmp_path, caplog):
    import datasets

    config = write(tmp_path / "a.jsonl", ["a", "b"] * 40)
    state = build(config).state_dict()
    state["fingerprint"] = {k: v for k, v in state["fingerprint"].items() if k in _OLD} | {
        "content": "0123456789abcdef"
    }
    logger.propagate = True
    with caplog.at_level(logging.WARNING, logger=logger.name):
        resume(config, state)
    assert "did not note all rows" in caplog.text
    state["fingerprint"]["num_samples"] = 79
    with pytest.raises(DataError, match="num_samples"):
        resume(config, state)

    datasets.Dataset.from_dict({"spike_counts": [[[1] * 5] * 3] * 4}).save_to_disk(str(tmp_path / "spikes"))
    config = DatasetKeys(
        dataset="primate", dataset_path=str(tmp_path / "spikes"), seq_len=4, local_batch_size=2
    )
    state = build(config, vocab_size=256).state_dict()
    state["fingerprint"] = {k: v for k, v in state["fingerprint"].items() if k in _OLD}
    with pytest.raises(
        DataError, match=r"where small samples are cut .*'tokens', now 'time bins'.*begin a new run"
    ):
        resume(config, state, vocab_size=256)


_OLD = {"dataset", "stream", "seq_len", "global_batch_size", "shuffle_seed", "num_samples"}


def test_ranks_with_other_data_are_named_on_every_rank_before_the_first_step(tmp_path):
    for rank, word in enumerate("bB"):
        write(tmp_path / f"{rank}.jsonl", ["a", word, "c"])
    messages = run_on_ranks(2, _compare, str(tmp_path))
    assert len(set(messages)) == 1
    assert "rank 1: the data: among rows 1 of 3" in messages[0]

    same = build(keys(tmp_path / "0.jsonl")).fingerprint
    check_same_data([same] * 3)
    with pytest.raises(DataError) as caught:
        check_same_data([same, same, {**same, "tokenizer": "x"}, {**same, "num_samples": 4}])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["rank 2", "rank 3"]
    assert "tokenizer" in lines[1] and "was 3, now 4" in lines[2]


def test_the_trainer_compares_the_ranks_before_it_builds_the_model(monkeypatch, tmp_path, capsys):
    def gather(value):
        return [value, {**value, "num_samples": 5}] if isinstance(value, dict) else [value]

    monkeypatch.setattr(job, "gather", gather)
    monkeypatch.setattr(parts, "build_model", None)
    assert train.main([f"--job.dump_folder={tmp_path}", "--training.seq_len=8"]) == 1
    assert "rank 1: num_samples, the number of rows (was 79, now 5)" in capsys.readouterr().err


def test_a_run_notes_in_its_folder_what_it_reads(tmp_path):
    write(tmp_path / "a.jsonl", ["a"] * 40)
    write(tmp_path / "test.jsonl", ["b"])
    arguments = [f"--job.dump_folder={tmp_path / 'dump'}", "--training.dataset=text", "--training.steps=1"]
    arguments += [
        f"--training.dataset_path={tmp_path}",
        "--training.seq_len=8",
        "--model.overrides.n_layers=1",
    ]
    assert train.main([*arguments, "--training.local_batch_size=1", "--model.overrides.dim=32"]) == 0
    record = json.loads((tmp_path / "dump" / "data.json").read_text())
    assert (record["files"], record["rows"], record["split"]) == (["a.jsonl"], 40, "train")
    assert record["left_out"] == {"named after another split": ["test.jsonl"]}


def _compare(rank, world_size, folder):
    loader = build(keys(f"{folder}/{rank}.jsonl"), rank, world_size)
    with pytest.raises(DataError) as caught:
        check_same_data(job.gather(loader.fingerprint))
    return str(caught.value)


@pytest.mark.parametrize(
    "values,type_",
    [
        (["a", None, "", "bcd"] * 30, pa.string()),
        (["a", "", "bcd"] * 30, pa.large_string()),
        ([[[1, 2], [3]], [], [[4]], None] * 30, pa.list_(pa.list_(pa.uint8()))),
        ([[1, 2], [3, 4]] * 30, pa.list_(pa.int32(), 2)),
    ],
    ids=str,
)
def test_a_digest_of_rows_does_not_depend_on_chunks_and_sees_every_value_and_border(values, type_):
    import datasets

    def digest(values, *sizes):
        array = pa.array([None, *values], type_).slice(1)  # buffers that begin elsewhere than the rows
        cuts = np.cumsum([0, *sizes, len(values) - sum(sizes)]).tolist()
        chunks = [array.slice(a, b - a) for a, b in pairwise(cuts)]
        return digest_of_table(datasets.Dataset(pa.table({"x": pa.chunked_array(chunks, type_)})), "x")

    expected = digest(values)
    assert digest(values, 7, 0, 31) == expected
    for i in (0, 50):
        changed = [*values[:i], values[i + 1], values[i], *values[i + 2 :]]
        assert digest(changed)["digests"] != expected["digests"]
    assert digest([*values[:-1], values[0]])["digests"] != expected["digests"]


def test_beyond_the_limit_pages_are_spread_evenly_and_found_whatever_the_parts(monkeypatch):
    monkeypatch.setattr(content, "_PAGE", 8)
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)

    def digest(data, *cuts):
        found = Digest(stride=5)
        for part in np.split(data, cuts):
            found.update(part)
        return found.digest()

    expected = digest(data)
    assert digest(data, 3, 8, 41, 500, 501) == expected
    seen = []
    for i in range(1000):
        changed = data.copy()
        changed[i] ^= 1
        seen.append(digest(changed) != expected)
    assert seen == [i % 40 < 8 for i in range(1000)]
