"""Tokenizers, and documents as tokens."""

import base64
import json

import pytest

from tests.data.helpers import build
from torchtitan_rd.data import DatasetKeys, dataset_vocab_size, load_tokenizer
from torchtitan_rd.data.sources import build_encoder
from torchtitan_rd.data.text import TextEncoder, pydoc_topics
from torchtitan_rd.errors import ConfigError, DataError


@pytest.fixture
def json_folder(tmp_path):
    """A byte-level BPE tokenizer with stored padding and truncation, as some published ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(pydoc_topics(0)[:5], trainer)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "auto_map": {"AutoTokenizer": ["evil.py"]}}
        )
    )
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.fixture
def tiktoken_file(tmp_path):
    merges = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(merges)]
    file = tmp_path / "llama3" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def test_bytes_are_the_ids_of_utf_8_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("a\u00e9").tolist() == [97, 195, 169]
    assert tokenizer.decode([256, 97, 195, 169, 257]) == "a\u00e9"


def test_a_tokenizer_folder_is_read_without_its_padding_truncation_and_code(json_folder):
    tokenizer = load_tokenizer(str(json_folder))
    text = "An expression statement evaluates the expression list (which may be a single expression)."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 400)
    assert not set(tokenizer.encode("a <s> b </s>").tolist()) & {0, 1}  # plain text, not special tokens


def test_special_tokens_may_stand_in_special_tokens_map(json_folder):
    (json_folder / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(json_folder)).bos_id is None
    (json_folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(str(json_folder)).eos_id == 1
    (json_folder / "special_tokens_map.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(DataError, match="<nowhere>"):
        load_tokenizer(str(json_folder))


def test_special_tokens_that_no_text_has_need_no_row_of_the_model(json_folder, caplog):
    """As the `<pad>` that released folders of Llama 2 have beyond the 32000 rows of the model."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    backend.add_special_tokens(["<pad>"])
    backend.save(str(json_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(json_folder))
    assert tokenizer.vocab_size == 401 and max(tokenizer.encode("a <pad> b")) < 400

    keys = DatasetKeys(dataset="pydoc")
    with caplog.at_level("WARNING", "torchtitan_rd"):
        assert build_encoder(keys, "text", tokenizer, 400).vocab_size == 400
    assert "the model has no rows for the tokenizer's special tokens from id 400 on" in caplog.text
    with pytest.raises(ConfigError, match=r"has ids up to 400, but model\.vocab_size = 399"):
        build_encoder(keys, "text", tokenizer, 399)
    # What begins or ends every text is needed.
    (json_folder / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    with pytest.raises(ConfigError, match="set it to 401 or more"):
        build_encoder(keys, "text", load_tokenizer(str(json_folder)), 400)


def test_a_tiktoken_file_has_the_special_tokens_of_llama_3(tiktoken_file):
    tokenizer = load_tokenizer(str(tiktoken_file.parent))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259 + 256, 259, 260)
    assert tokenizer.encode("the the").tolist() == [257, 258]
    assert tokenizer.decode([259, 257, 258, 260]) == "the the"
    names = tokenizer._backend._special_tokens  # as in Llama 3, where the first is 128000
    assert names["<|start_header_id|>"] == 259 + 6 and names["<|eot_id|>"] == 259 + 9
    assert names["<|reserved_special_token_250|>"] == 259 + 255
    assert tokenizer.encode("<|eot_id|>").max() < 256


def test_a_very_long_word_does_not_break_a_tiktoken_file(tiktoken_file):
    tokenizer = load_tokenizer(str(tiktoken_file))
    text = "x" * 60_000 + " " * 60_000 + "the"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_missing_tokenizer_is_a_config_error_and_a_damaged_one_a_data_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.tokenizer_path = 'nowhere'"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_text("no merges\n")
    with pytest.raises(DataError, match="not a tiktoken file"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    # Of Llama 1 and 2, whose folders a run, `generate` and `eval` meet.
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a sentencepiece")
    with pytest.raises(DataError, match=r"a sentencepiece model, .*a folder with the tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))


def test_a_name_on_the_hub_is_fetched_as_json_files_only(json_folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked[name] = allow_patterns
        return str(json_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_tokenizer("some/tokenizer").vocab_size == 400
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    assert asked == {"some/tokenizer": names}
    (json_folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer("some/tokenizer")


def test_a_hub_that_is_out_of_reach_is_one_clear_error(monkeypatch):
    import huggingface_hub

    def unreachable(name, revision, allow_patterns):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer_path = 'some/tokenizer'.*ConnectionError.*local folder"
    ):
        load_tokenizer("some/tokenizer")


def test_tokenizers_can_be_sent_to_another_process(json_folder, tiktoken_file):
    import pickle

    for path in ("bytes", str(json_folder), str(tiktoken_file)):
        tokenizer = load_tokenizer(path)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("the text").tolist() == tokenizer.encode("the text").tolist()


def test_bos_and_eos_stand_around_documents_and_an_empty_one_has_no_tokens():
    encoder = TextEncoder(load_tokenizer("bytes"), 258)
    assert encoder.encode("ab", "here").tolist() == [256, 97, 98, 257]
    assert encoder.encode("", "here").size == 0


def test_an_id_beyond_the_vocabulary_is_refused_with_its_row():
    with pytest.raises(
        DataError, match=r"text: row 3: token 0 has id 256, but the model's vocabulary is 0\.\.255"
    ):
        TextEncoder(load_tokenizer("bytes"), 256).encode("ab", "text: row 3")


def test_a_tokenizer_larger_than_the_model_is_refused_at_the_start(json_folder):
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 300: set it to 400"):
        build(DatasetKeys(), vocab_size=300, tokenizer_path=str(json_folder))


def test_the_open_vocabulary_size_is_that_of_the_data(json_folder):
    assert dataset_vocab_size(DatasetKeys(dataset="primate"), load_tokenizer("bytes")) == 256
    assert dataset_vocab_size(DatasetKeys(), load_tokenizer("bytes")) == 258
    assert dataset_vocab_size(DatasetKeys(), load_tokenizer(str(json_folder))) == 400
    with pytest.raises(ConfigError, match=r"model\.vocab_size must be given"):
        dataset_vocab_size(
            DatasetKeys(dataset="packed", dataset_path=str(json_folder)), load_tokenizer("bytes")
        )


def test_the_pydoc_topics_are_english_prose_and_any_tokenizer_reads_them(json_folder):
    topics = pydoc_topics(0)
    assert len(topics) > 50 and sum(map(len, topics)) > 300_000
    config = DatasetKeys(seq_len=32, local_batch_size=2)
    loader = build(config, vocab_size=400, tokenizer_path=str(json_folder))
    [batch] = loader.next_step()
    loader.close()
    expected = [0, *load_tokenizer(str(json_folder)).encode(topics[0])[:31].tolist()]
    assert batch.inputs[0].tolist() == expected


def test_hardly_any_of_the_held_out_help_can_be_read_in_the_texts_to_train_on():
    """Counted in windows of 50 characters, over whatever indentation and line breaks."""
    known = " ".join(" ".join(pydoc_topics(0, "train")).split())
    for text in pydoc_topics(0, "validation"):
        text = " ".join(text.split())
        windows = [text[start : start + 50] for start in range(0, len(text) - 50, 25)]
        share = sum(window in known for window in windows) / len(windows)
        assert share < 0.1, text[:50]

    whole, train, held_out = (sum(map(len, pydoc_topics(0, part))) for part in ("all", "train", "validation"))
    assert whole - held_out - 0.05 * whole < train < whole - held_out
