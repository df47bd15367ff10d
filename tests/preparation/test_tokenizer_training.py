"""A tokenizer is trained with the ids that it is given, gives every text back, and loads everywhere alike."""

import json

import numpy as np
import pytest

from tests.preparation.common import contents, killed, run, write_corpus
from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.manifest import Output
from torchtitan_rd.preparation.tokenizer_training import Wanted, check_round_trip

HARD = " caf\u00e9 \u4f60\u597d\r\n\n\t  x=1234; <|begin_text|>\x00"


def train(corpus, folder, *more):
    return run("train-tokenizer", corpus, "--output", folder, *more)


def test_the_layout_of_huginn_has_its_ids():
    ids = Wanted(vocab_size=65536).specials()
    released = ("begin_text", "end_text", "begin_header", "end_header", "end_turn", "pad")
    assert [ids[f"<|{name}|>"] for name in released] == list(range(65504, 65510))
    assert len(ids) == 32 and max(ids.values()) == 65535


def test_special_tokens_have_the_ids_that_were_pinned_and_no_text_makes_them(corpus, tmp_path, capsys):
    pinned = ("--layout", "none", "--special", "<|end|>=0", "--special", "<|start|>=300")
    assert train(corpus, tmp_path / "t", "--vocab-size", 500, *pinned, "--eos", "<|end|>") == 0
    assert "eos_token  <|end|> 0" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (500, None, 0)
    ids = tokenizer.encode("<|end|> and <|start|>" + pydoc_topics(0)[0])
    assert not {0, 300} & set(ids.tolist())
    vocabulary = json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(500))


def test_transformers_and_the_trainer_load_it_alike(tokenizer):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tokenizer), load_tokenizer(str(tokenizer))
    text = pydoc_topics(0)[3]
    ids = ours.encode(text).tolist()
    assert theirs(text).input_ids == [ours.bos_id, *ids, ours.eos_id]
    assert theirs(text, add_special_tokens=False).input_ids == ids and len(theirs) == ours.vocab_size
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (568, 569, 573)


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer)
    messages = [{"role": "user", "content": " Hi? "}, {"role": "assistant", "content": "Yes."}]
    made = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert theirs.decode(made["input_ids"]) == (
        "<|begin_text|><|begin_header|>user<|end_header|>\n\nHi?<|end_turn|>"
        "<|begin_header|>Huginn<|end_header|>\n\nYes.<|end_turn|><|end_text|>"
    )
    said = [i for i, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert theirs.decode(said) == "Yes.<|end_turn|>"


@pytest.mark.parametrize(("regex", "expected"), [("gpt4-digits", True), ("gpt2", False), ("gpt4", False)])
def test_digits_stand_alone_by_default(regex, expected, tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", ["these days, 1984, " * 50])
    small = ("--vocab-size", 262, "--layout", "none")
    assert train(corpus, tmp_path / "t", *small, "--regex", regex) == 0
    alone = len(load_tokenizer(str(tmp_path / "t")).encode("1984")) == 4
    assert alone is expected


def test_no_token_is_longer_than_it_may_be(tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", ["\u00fcberlang antidisestablishment " * 9])
    longest = {}
    for limit in (4, 32):
        folder, small = tmp_path / str(limit), ("--vocab-size", 270, "--layout", "none")
        assert train(corpus, folder, *small, "--max-token-length", limit) == 0
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        longest[limit] = max(map(len, vocabulary))  # a character of its alphabet stands for a byte
    assert longest[4] <= 4 < longest[32]


def test_the_same_text_makes_the_same_files_and_a_finished_folder_is_left_alone(corpus, tokenizer, tmp_path):
    arguments = ("--vocab-size", 600, "--chat-template", "huginn")
    assert train(corpus, tmp_path / "t", *arguments) == 0
    assert contents(tmp_path / "t") == contents(tokenizer)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "t").iterdir())]
    assert train(corpus, tmp_path / "t", *arguments) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "t").iterdir())] == times


@pytest.mark.parametrize(("method", "call"), [("commit", 2), ("finish", 1)])
def test_a_run_that_is_killed_makes_the_same_files_in_the_end(method, call, corpus, tokenizer, tmp_path):
    line = ("train-tokenizer", corpus, "--vocab-size", 600, "--chat-template", "huginn")
    line += ("--output", tmp_path / "t")
    assert killed(line, Output, method, call, tmp_path / "store")
    assert run(*line) == 0
    assert contents(tmp_path / "t") == contents(tokenizer)


def test_a_folder_of_other_arguments_or_text_is_refused(corpus, tokenizer, tmp_path, capsys):
    assert train(corpus, tokenizer, "--vocab-size", 700) == 1
    said, message = capsys.readouterr().err.splitlines()
    assert "60 rows, 1 files: corpus.jsonl" in said and "--vocab-size was 600 and is 700" in message
    other = write_corpus(tmp_path / "corpus.jsonl", ["something else"])
    assert train(other, tokenizer, "--vocab-size", 600, "--chat-template", "huginn") == 1
    assert "input corpus.jsonl has another sha256 and size" in capsys.readouterr().err


def test_a_text_that_is_not_given_back_is_an_error():
    class Lossy:
        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8)

        def decode(self, ids):
            return bytes(ids).decode().replace("\r\n", "\n")

    assert check_round_trip(Lossy(), ["abc"])["checked_bytes"] == 3
    with pytest.raises(DataError, match="does not give back"):
        check_round_trip(Lossy(), ["abc", HARD])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"special": {"<|a|>": 600}}, r"ids are 0..599"),
        ({"special": {"<|a|>": 570}}, r"this is the id of <\|begin_header\|>"),
        ({"vocab_size": 280}, "leaves 248 ids"),
        ({"vocab_size": -1}, "--vocab-size -1: expected 256"),
        ({"vocab_size": 10**12}, "--vocab-size 1000000000000: expected 256"),
        ({"max_token_length": 0}, "--max-token-length 0: expected 1"),
        ({"min_frequency": -1}, "--min-frequency -1: expected 0"),
        ({"regex": "gtp2"}, "did you mean 'gpt2'"),
        ({"layout": "none", "chat_template": "huginn"}, r"<\|begin_header\|>.* are no special tokens"),
        ({"chat_template": "missing.jinja"}, "or a file with a template"),
        ({"bos": "<|begin|>"}, "did you mean"),
    ],
)
def test_what_cannot_be_is_refused_before_any_text_is_read(keys, message):
    with pytest.raises(ConfigError, match=message):
        Wanted(**{"vocab_size": 600, **keys}).arguments()


def test_too_little_text_for_the_vocabulary_says_how_many_there_can_be(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", "--vocab-size", 50000) == 1
    assert "tokens can be learned from this text" in capsys.readouterr().err
    assert not (tmp_path / "t" / "tokenizer.json").exists()


def test_a_negative_number_of_characters_is_refused(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", "--vocab-size", 600, "--max-characters", -5) == 1
    assert "--max-characters -5: must be at least 1" in capsys.readouterr().err


def test_a_special_token_that_text_has_too_is_refused(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", "--vocab-size", 600, "--special", "e=20") == 1
    assert "--special e=20: ordinary text has this as a token" in capsys.readouterr().err


def test_a_chat_template_that_is_not_utf_8_is_named(corpus, tmp_path, capsys):
    (tmp_path / "chat.jinja").write_bytes(b"caf\xe9")
    template = tmp_path / "chat.jinja"
    assert train(corpus, tmp_path / "t", "--vocab-size", 600, "--chat-template", template) == 1
    assert "chat.jinja: cannot be read: 'utf-8' codec" in capsys.readouterr().err
