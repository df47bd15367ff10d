"""conversion/tokenizer_files.py: AutoTokenizer gives the ids that training saw."""

import base64
import io
import itertools
import json
import random

import pytest

from torchtitan_rd.conversion.tokenizer_files import files_in, tokenizer_files
from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.errors import CheckpointError, ConfigError, DataError
from torchtitan_rd.models.llama.hf import config_fields
from torchtitan_rd.models.llama.shape import LLAMA3_FLAVORS

TEXTS = [
    "",
    "plain words, and 12345 numbers.",
    "  blanks \t\n\n  and\r\nlines \u00a0 ",
    "\u00fcn\u00efc\u00f6d\u00e9 \u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469 e\u0301 \x00\x7f",
    "<s> </s> <bos>text<eos> <|begin_of_text|><|eot_id|> [PAD] don't DON'T",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def json_folder(tmp_path):
    """A trained byte-level BPE tokenizer that wants a Python class of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(pydoc_topics(0)[:5], trainer)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "[PAD]",
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('remote code was run')")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def byte_pairs(merges=200):
    """Ranks as real BPE training gives them, so that longer tokens can be halved in several ways."""
    words = [[bytes([b]) for b in word.encode()] for word in " ".join(pydoc_topics(0)[:2]).split(" ")[:2000]]
    tokens = [bytes([i]) for i in random.Random(0).sample(range(256), 256)]
    while len(tokens) < 256 + merges:
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        tokens.append(best[0] + best[1])
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
    return list(dict.fromkeys(tokens))


@pytest.fixture
def tiktoken_file(tmp_path):
    file = tmp_path / "llama3" / "tokenizer.model"
    file.parent.mkdir()
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(byte_pairs())]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def load(found, folder):
    """As a user loads it from an exported folder, whose config.json says Llama."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    for name, content in found.files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config_fields(LLAMA3_FLAVORS["debug"])))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_bytes_become_a_tokenizer_that_gives_back_any_text(tmp_path):
    found = tokenizer_files("bytes")
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json"}
    tokenizer, known = load(found, tmp_path / "exported"), load_tokenizer("bytes")
    many = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), *range(0x1F600, 0x1F610)]))
    for text in (*TEXTS, many, "x" * 5000):
        ids = tokenizer.encode(text)
        assert ids == known.encode(text).tolist()
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (known.bos_id, known.eos_id)
    assert found.token_ids == {"bos_token_id": 256, "eos_token_id": 257}
    assert len(tokenizer) == known.vocab_size
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("place", ["", "tokenizer.json"])
def test_a_folder_with_a_tokenizer_json_is_copied_without_its_code(place, json_folder, tmp_path):
    found = tokenizer_files(str(json_folder / place))
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert found.files["tokenizer.json"] == (json_folder / "tokenizer.json").read_bytes()
    tokenizer, known = load(found, tmp_path / "exported"), load_tokenizer(str(json_folder))
    for text in (*TEXTS, *pydoc_topics(0)[:3]):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == known.encode(text).tolist()
    assert found.token_ids == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_tokenizer_config_without_code_is_copied_to_the_byte(json_folder):
    file = json_folder / "tokenizer_config.json"
    file.write_text('{"eos_token":   "</s>"}')
    assert tokenizer_files(str(json_folder)).files[file.name] == file.read_bytes()


def test_a_lone_tokenizer_json_gets_a_config(json_folder, tmp_path):
    (json_folder / "tokenizer_config.json").unlink()
    (json_folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    found = tokenizer_files(str(json_folder))
    tokenizer = load(found, tmp_path / "exported")
    text = "An expression statement"
    assert tokenizer.encode(text) == load_tokenizer(str(json_folder)).encode(text).tolist()
    assert found.token_ids == {"eos_token_id": 1} and tokenizer.eos_token_id == 1


def test_a_tiktoken_file_becomes_a_tokenizer_json_with_equal_ids(tiktoken_file, tmp_path):
    found = tokenizer_files(str(tiktoken_file.parent))
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert found.files["tokenizer.model"] == tiktoken_file.read_bytes()
    tokenizer, known = load(found, tmp_path / "exported"), load_tokenizer(str(tiktoken_file))
    draw = random.Random(0)
    noise = ["".join(draw.choices("aeimnorst  th\n'.", k=300)) for _ in range(30)]
    for text in (*TEXTS, *pydoc_topics(0)[:3], *noise, "a" * 500, "ab" * 300, "=" * 301):
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert ids == known.encode(text).tolist(), text[:40]
        assert tokenizer.decode(ids) == text
    assert found.token_ids == {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (known.bos_id, known.eos_id)
    assert len(tokenizer) == known.vocab_size
    names = known._backend._special_tokens
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert tokenizer.encode("<|eot_id|>") == [names["<|eot_id|>"]]


def test_a_remote_tiktoken_file_is_read_too(tiktoken_file, monkeypatch):
    import blobfile

    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode: io.BytesIO(tiktoken_file.read_bytes()))
    remote = tokenizer_files("az://account/container/tokenizer.model")
    local = tokenizer_files(str(tiktoken_file))
    assert (
        remote.files["tokenizer.json"] == local.files["tokenizer.json"]
        and remote.token_ids == local.token_ids
    )


def test_a_tiktoken_file_with_a_gap_is_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(255)))
    with pytest.raises(ConfigError, match=r"bytes \[255\] are missing; give --tokenizer_path"):
        tokenizer_files(str(file))
    file.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(bytes([i])), i + 1) for i in range(256)))
    with pytest.raises(ConfigError, match="ranks are not 0 to 255"):
        tokenizer_files(str(file))


def test_a_sentencepiece_model_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(
        ConfigError, match=r"sentencepiece model, .*folder with the tokenizer\.json .*or 'none'"
    ):
        tokenizer_files(str(tmp_path))


@pytest.mark.parametrize("path", ["/nowhere/tokenizer", "no where"])
def test_a_missing_tokenizer_is_an_error_that_names_the_flag(path):
    with pytest.raises(ConfigError, match=f"{path}.*--tokenizer_path a path .*or 'none'"):
        tokenizer_files(path)


def test_a_name_on_the_hub_is_looked_up_as_in_training(json_folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(json_folder))
    assert tokenizer_files("some/tokenizer") == tokenizer_files(str(json_folder))

    def unreachable(name, **_):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"some/tokenizer.*ConnectionError.*--tokenizer_path"):
        tokenizer_files("some/tokenizer")


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        tokenizer_files(str(tmp_path))


def test_a_model_folder_keeps_its_tokenizer_and_token_ids(json_folder):
    (json_folder / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": null}')
    (json_folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    found = files_in(json_folder)
    assert set(found.files) == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    }
    assert "auto_map" not in json.loads(found.files["tokenizer_config.json"])
    assert found.token_ids == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    (json_folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not readable JSON"):
        files_in(json_folder)


def test_a_folder_without_a_tokenizer_has_no_files(tmp_path):
    found = files_in(tmp_path)
    assert (found.files, found.token_ids) == ({}, {})
