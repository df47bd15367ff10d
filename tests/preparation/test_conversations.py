"""Conversations are staged as they are, and packed as the chat template of the tokenizer writes them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from tests.data.helpers import build
from tests.preparation.common import contents, rows_of, run
from torchtitan_rd.data import DatasetKeys, load_tokenizer

PAD = 573
QUESTIONS = [(f"What is {n} plus {n}?", f"It is {n + n}, since {n} + {n} = {n + n}.") for n in range(40)]
ASKED = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in QUESTIONS
]
# As those above, but for what a message may be called elsewhere and for a field of one of them.
SHARED = [
    [{"from": "human", "value": question}, {"value": answer, "from": "gpt"}] for question, answer in QUESTIONS
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(data, tokenizer, folder, *more):
    small = ("--block-size", 64, "--files", 2, "--val-share", 0.2, "--tail", "pad")
    return ("tokenize", data, "--tokenizer", tokenizer, "--output", folder, *small, *more)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("chats") / "a.jsonl", [{"messages": chat} for chat in ASKED])


@pytest.fixture(scope="module")
def packed(chats, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    assert run(*arguments(chats, tokenizer, folder, "--chat")) == 0
    return folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The same conversations in two other forms, and a text."""
    folder = tmp_path_factory.mktemp("staged")
    write_rows(folder / "shared.jsonl", [{"conversations": chat} for chat in SHARED])
    write_rows(folder / "columns.jsonl", [{"q": f" {q}", "a": f"{a}\n"} for q, a in QUESTIONS])
    chat = {"needs_chat_templating": True}
    sources = {
        "shared": {"address": "shared.jsonl", "features": "conversations", **chat},
        "columns": {"address": "columns.jsonl", "features": ["q", "a"], **chat},
    }
    (folder / "sources.yaml").write_text(yaml.safe_dump({"sources": sources}))
    assert run("download", folder / "sources.yaml", "--output", folder / "staging") == 0
    return folder / "staging"


def test_a_packed_conversation_is_what_transformers_makes_of_it(packed, tokenizer):
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    expected = [theirs.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in ASKED]
    ids = np.concatenate([rows_of(packed, split).reshape(-1) for split in ("train", "val")])
    found = np.split(ids, np.flatnonzero(ids == theirs.bos_token_id))[1:]
    assert sorted([i for i in one.tolist() if i != PAD] for one in found) == sorted(expected)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_staged_conversations_make_the_same_rows(processes, packed, staged, tokenizer, tmp_path):
    weights = ("--weight", "shared=1", "--weight", "columns=0", "--processes", processes)
    assert run(*arguments(staged, tokenizer, tmp_path / "packed", *weights)) == 0
    found, expected = contents(tmp_path / "packed"), contents(packed)
    assert found.keys() == expected.keys() and len(found) == 5
    assert all(found[name] == expected[name] for name in expected if name != "manifest.json")


def test_both_forms_of_a_source_are_staged_as_one_that_training_reads(staged, tokenizer):
    texts = [
        pq.read_table(staged / name / "00000.parquet")["messages"].to_pylist()
        for name in ("shared", "columns")
    ]
    assert texts[0] == texts[1] and [json.loads(text) for text in texts[0]] == ASKED

    size = load_tokenizer(str(tokenizer)).vocab_size
    keys = DatasetKeys(
        dataset="chat", dataset_path=str(staged / "shared"), seq_len=100, global_batch_size=1,
        local_batch_size=1, pack_samples=False,
    )  # fmt: skip
    loader = build(keys, vocab_size=size, tokenizer_path=str(tokenizer))
    (batch,) = loader.next_step()
    loader.close()
    spoken = batch.labels[batch.labels >= 0].tolist()
    assert load_tokenizer(str(tokenizer)).decode(spoken) == QUESTIONS[0][1]


def test_a_tokenizer_learns_what_is_said(staged, tmp_path):
    out = ("--output", tmp_path / "tokenizer", "--layout", "none", "--weight", "columns=0")
    assert run("train-tokenizer", staged, "--vocab-size", 275, *out) == 0
    words = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "What" in words and "role" not in words


def test_rows_that_are_no_conversation_are_counted_and_named(tmp_path, capsys):
    ask = {"role": "user", "content": "?"}
    bad = [[], "text", [ask, {"role": "robot", "content": "!"}], [{"role": "user", "content": None}], None]
    rows = [{"messages": value} for value in [[ask], *bad, [{"role": "user", "content": "\ud800"}]]]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"other": 1}])
    keys = {"address": "rows.jsonl", "features": "messages", "needs_chat_templating": True}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"sources": {"chats": keys}}))
    assert run("download", tmp_path / "sources.yaml", "--output", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]["chats"]
    assert found["rows"] == 1
    assert found["bad"] == {"no conversation": 5, "not UTF-8": 1, "no column 'messages'": 1}
    assert found["examples"][0] == "rows.jsonl: row 1: no conversation: the row holds no message"
    assert 'message 1: has the role "robot"' in found["examples"][2]


@pytest.mark.parametrize(
    "rows,more,message",
    [
        ([ASKED[0], [{"role": "robot", "content": "?"}]], (), 'row 1, message 0: has the role "robot"'),
        ([ASKED[0]], ("--question-column", "q"), "belong together, with --chat"),
        ([ASKED[0]], ("--column", "text"), "has no column 'text'"),
    ],
)
def test_what_cannot_be_packed_is_one_line(rows, more, message, tokenizer, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in rows])
    assert run(*arguments(data, tokenizer, tmp_path / "packed", "--chat", *more)) == 1
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_refused(chats, tmp_path, capsys):
    options = ("--block-size", 64, "--output", tmp_path / "packed", "--chat")
    assert run("tokenize", chats, "--tokenizer", "bytes", *options) == 1
    assert "conversations need the folder of a tokenizer with a chat template" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
