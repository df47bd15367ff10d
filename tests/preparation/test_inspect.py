"""`torchtitan-rd data inspect`: what is printed of data, against the same counted another way."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.preparation.common import run
from tests.preparation.recordings import TRAINS, prepare
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.rehearsal.rows import make_up_chat_tokenizer


def inspect(capsys, *arguments):
    """The JSON that is printed."""
    capsys.readouterr()
    assert run("inspect", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def recordings(tmp_path):
    """Six recordings of two sources; two counts cannot be told from the separator, and one is negative."""
    draw = np.random.default_rng(0)
    counts = [draw.poisson(0.7, (neurons, 50)) for neurons in (3, 8, 5, 4, 6, 2)]
    counts[1][2] = 0
    counts[3][1] = 0
    counts[2][0, 7], counts[4][1, 9], counts[5][0, 0] = 255, 300, -1
    table = pa.table({"spike_counts": [c.tolist() for c in counts], "source_dataset": ["a", "b", *"aaaa"]})
    pq.write_table(table, tmp_path / "recordings.parquet")
    return tmp_path / "recordings.parquet", counts


def test_rates_silent_neurons_and_collisions_are_those_of_the_counts(recordings, capsys):
    path, counts = recordings
    found = inspect(capsys, path, "--bin-ms", 50)
    rates = np.concatenate([c.mean(axis=1) for c in counts]) * 20
    assert found["rates_hz"]["mean"] == pytest.approx(rates.mean())
    assert found["rates_hz"]["95 %"] == pytest.approx(np.quantile(rates, 0.95))
    assert found["rates_hz"]["max"] == pytest.approx(rates.max())
    assert (found["neuron_rows"], found["silent"]) == (28, 2)
    assert (found["collisions"], found["negative"], found["largest"]) == (2, 1, 300)
    assert found["spikes"] == sum(c.sum() for c in counts)
    assert found["tokens"] == sum((len(c) + 1) * 50 for c in counts) and found["bins"]["median"] == 50
    assert found["neurons"]["median"] == 4.5 and found["sources"] == {"a": 5, "b": 1}
    assert found["shown"][1] == {"row": 1, "neurons": 8, "bins": 50, "spikes": counts[1].sum()}


def test_fewer_rows_are_read_on_request(recordings, capsys):
    path, counts = recordings
    found = inspect(capsys, path, "--max-rows", 2, "--rows", 1)
    assert (found["rows"], found["rows_in_all"], len(found["shown"])) == (2, 6, 1)
    assert found["spikes"] == counts[0].sum() + counts[1].sum() and found["sources"] == {"a": 1, "b": 1}


def test_the_length_of_a_bin_is_read_from_what_prepared_the_rows(tmp_path, capsys):
    arguments = ("--unit", "us", "--bin-ms", 10, "--test-share", 0)
    prepare(tmp_path / "out", TRAINS[0], *arguments)
    found = inspect(capsys, tmp_path / "out")
    assert found["bin_ms"] == 10 and found["rates_hz"]["mean"] == pytest.approx(929 / 10)
    assert found["sources"] == {"grasshopper": 1}


def test_the_histogram_of_a_text_is_that_of_its_bytes_and_document_borders(tmp_path, capsys):
    texts = ["abracadabra", "", "a z"]
    pq.write_table(pa.table({"text": texts, "source": ["x", "y", "y"]}), tmp_path / "a.parquet")
    found = inspect(capsys, tmp_path / "a.parquet", "--tokenizer", "bytes")
    expected = Counter("".join(texts).encode()) + Counter({256: 2, 257: 2})
    assert {token["id"]: token["count"] for token in found["most"]} == dict(expected)
    assert [token["id"] for token in found["most"][:2]] == [ord("a"), ord("b")]
    assert found["least"][0]["count"] == 1 and found["least"][-1]["id"] == ord("a")
    assert found["most"][0]["piece"] == "a" and found["most"][0]["share"] == pytest.approx(6 / 18)
    assert (found["used"], found["vocabulary"], found["tokens"], found["empty"]) == (9, 258, 18, 1)
    assert found["sources"] == {"y": 2, "x": 1} and found["lengths"]["max"] == 13
    assert [row["text"] for row in found["shown"]] == texts


def test_packed_rows_are_decoded_and_ids_outside_of_the_vocabulary_are_counted(tmp_path, capsys):
    rows = [[*b"one row"], [*b"another", 258, 999], [-1, *b"ab"]]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet")
    found = inspect(capsys, tmp_path / "a.parquet", "--tokenizer", "bytes")
    assert [row["text"] for row in found["shown"]] == ["one row", "another", "ab"]
    assert found["outside"] == 3 and found["lengths"]["max"] == 9 and found["vocabulary"] == 258

    unknown = inspect(capsys, tmp_path / "a.parquet", "--rows", 1)
    assert unknown["shown"][0]["text"] == " ".join(map(str, b"one row"))
    assert unknown["vocabulary"] == 1000 and unknown["outside"] == 1
    assert unknown["used"] == len(set(b"one row" + b"another" + b"ab")) + 2


def test_of_a_toml_the_data_is_shown_that_it_trains_on(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('[training]\ndataset = "pydoc"\nseq_len = 8\n')
    overrides = ("--training.dataset", "pydoc-train", "--job.dump_folder", tmp_path / "none")
    found = inspect(capsys, tmp_path / "run.toml", *overrides, "--rows", 2)
    topics = pydoc_topics(0, "train")
    assert found["name"] == "pydoc-train" and found["rows"] == len(topics)
    assert [row["text"] for row in found["shown"]] == [topic[:400] for topic in topics[:2]]
    assert found["tokens"] == sum(len(topic.encode()) + 2 for topic in topics)


CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
WRITTEN = "user: 2 + 2?\nassistant: 4\n"


@pytest.fixture
def of_three_kinds(tmp_path):
    """A run on conversations, texts and packed rows, and its tokenizer of bytes with a chat template."""
    make_up_chat_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    pq.write_table(pa.table({"input_ids": [[*b"packed row"]] * 3}), tmp_path / "packed.parquet")
    tables = [f'[model]\ntokenizer_path = "{tmp_path / "tokenizer"}"']
    for name, file in (("chat", "chats.jsonl"), ("text", "texts.jsonl"), ("packed", "packed.parquet")):
        tables.append("[[training.mixture]]\nweight = 1")
        tables.append(f'name = "of_{name}"\ndataset = "{name}"\ndataset_path = "{tmp_path / file}"')
    (tmp_path / "run.toml").write_text("\n".join(tables) + "\n[training]\nseq_len = 9\n")
    return tmp_path / "run.toml"


def test_of_a_mixture_every_source_is_shown_and_none_but_these(of_three_kinds, capsys):
    found = inspect(capsys, of_three_kinds)
    assert {name: one["rows"] for name, one in found.items()} == {"of_chat": 1, "of_text": 2, "of_packed": 3}
    assert [row["text"] for row in found["of_text"]["shown"]] == ["one", "two"]
    assert found["of_packed"]["shown"][0]["text"] == "packed row"
    # What the user says is no label, and is shown too.
    (chat,) = found["of_chat"]["shown"]
    assert chat["text"].endswith(WRITTEN) and found["of_chat"]["outside"] == 0
    assert chat["length"] == found["of_chat"]["tokens"] == len(chat["text"].encode())

    assert run("inspect", of_three_kinds) == 0
    printed = capsys.readouterr().out
    for line in ("of_chat (chat): 1 rows", "of_text (text): 2 rows", "of_packed (packed): 3 rows, 30 tokens"):
        assert line in printed
    assert run("inspect", of_three_kinds, "--png", "a.png") == 1
    assert "--png: chat holds no recordings" in capsys.readouterr().err


def test_a_run_on_conversations_alone_is_shown(of_three_kinds, tmp_path, capsys):
    text = of_three_kinds.read_text().split("[[training.mixture]]")[0]
    of_three_kinds.write_text(f'{text}\n[training]\ndataset = "chat"\nseq_len = 9\n')
    found = inspect(capsys, of_three_kinds, "--training.dataset_path", tmp_path / "chats.jsonl")
    assert found["name"] == "chat" and found["shown"][0]["text"].endswith(WRITTEN)


def test_the_tables_say_the_same(recordings, tmp_path, capsys):
    path, _ = recordings
    assert run("inspect", path) == 0
    printed = capsys.readouterr().out
    assert "6 rows, 1,700 tokens" in printed and "2 of 28 neurons (of each row) are silent" in printed
    assert "2 counts collide with the separator (255 or more), 1 are negative" in printed
    (tmp_path / "a.txt").write_text("some text")
    assert run("inspect", tmp_path / "a.txt", "--tokenizer", "bytes") == 0
    printed = capsys.readouterr().out
    assert (
        "row 0, 11 tokens:\nsome text" in printed
        and "of the 258 tokens of the vocabulary are used" in printed
    )


def test_a_raster_is_dark_where_neurons_spike(tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    silent, spiking = np.zeros((8, 40), int), np.zeros((8, 40), int)
    spiking[:4, :20] = 3
    spiking[:, 30:] = 3
    table = pa.table({"spike_counts": [silent.tolist(), spiking.tolist()]})
    pq.write_table(table, tmp_path / "a.parquet")

    def dark(row, *arguments):
        """The share of the picture that is black."""
        path = tmp_path / f"{row}.png"
        assert run("inspect", tmp_path / "a.parquet", "--png", path, "--row", row, *arguments) == 0
        return float((pyplot.imread(path)[..., :3].max(axis=-1) < 0.1).mean())

    # The panel is about 3/4 of the picture; letters and the scale are the rest of what is dark.
    assert dark(1) - dark(0) == pytest.approx(0.75 * (4 * 20 + 8 * 10) / (8 * 40), abs=0.07)
    assert dark(1, "--bins", 30) - dark(0) == pytest.approx(0.75 * (4 * 20) / (8 * 30), abs=0.07)


def test_rows_that_cannot_be_read_are_counted_and_named(tmp_path, capsys):
    table = pa.table({"spike_counts": [[[1, 2], [3, 4]], [[1, 2], [3]], [[0, None]], []]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = inspect(capsys, tmp_path / "a.parquet")
    assert (found["unreadable"], found["empty"], found["spikes"]) == (2, 1, 10)
    assert "row 1: neuron 1 has 1 time bins" in found["problems"][0]


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ({"other": [1]}, [], "has no column spike_counts or input_ids or text, only other"),
        ({"text": ["a"]}, ["--column", "words"], "has no column words, only text"),
        ({"text": ["a"]}, [], "column 'text' is text: name a tokenizer, such as --tokenizer bytes"),
        ({"input_ids": [[1]]}, ["--png", "a.png"], "holds no recordings"),
        ({"spike_counts": [[[0.5]]]}, [], "expected lists (neurons) of lists (time bins) of integers"),
        ({"spike_counts": [[[1]]]}, ["--png", "a.png", "--row", "1"], "--row 1: "),
        ({"spike_counts": [[[1]]]}, ["--png", "no/a.png"], "--png no/a.png: there is no such folder"),
        ({"spike_counts": [[[1]]]}, ["--png", "a.xyz"], "--png a.xyz: the name must end in .png"),
        ({"spike_counts": [[[1]]]}, ["--training.dataset", "x"], "overrides follow a TOML file alone"),
        ({"spike_counts": [[[1]]]}, ["--max-rows", "0"], "--max-rows 0: must be at least 1"),
        ({"spike_counts": [[[1]]]}, ["--bin-ms", "0"], "--bin-ms 0.0: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(table, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert run("inspect", tmp_path / "a.parquet", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a.png").exists()
