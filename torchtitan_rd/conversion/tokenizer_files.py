"""The tokenizer of a model as files that `transformers.AutoTokenizer` loads,
with the ids of data/tokenizer.py.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_rd.data import tokenizer as ours
from torchtitan_rd.data.hub import hub_tokenizer
from torchtitan_rd.errors import CheckpointError, ConfigError

TOKENIZER_JSON, TOKENIZER_CONFIG, TOKENIZER_MODEL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
)
SPECIAL_TOKENS_MAP, GENERATION_CONFIG = "special_tokens_map.json", "generation_config.json"
# What a tokenizer consists of; never a .py file, so that nobody is asked to trust one.
NAMES = (
    *(TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json", "vocab.json", "merges.txt"),
    *(TOKENIZER_MODEL, "chat_template.jinja"),
)
_REMEDY = "give --tokenizer_path a path that there is, or 'none' to leave the tokenizer out"
_TOKENS = ("bos_token", "eos_token", "pad_token")
# The class that takes a tokenizer.json as it is, whatever the model.
_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


# Words, figures, blanks, line ends, composed and foreign characters: tokenizers differ in how they cut these.
_PROBE = (
    "The tokenizer's ids, as they'd be: 12345 and 3.14e-10;\t"
    "if (x == y) { return f(x); }\r\n\n    indented  twice\n"
    "\u00fcn\u00efc\u00f6d\u00e9 e\u0301 \u4f60\u597d\u4e16\u754c \u3053\u3093 \u041f\u0440\u0438 \U0001f600 "
)


@dataclass(frozen=True)
class TokenizerFiles:
    """files: name -> content. token_ids: bos_token_id, eos_token_id, pad_token_id, those that are known."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    token_ids: Mapping[str, Any] = field(default_factory=dict)


def tokenizer_files(path: str, states: Iterable[Path] = ()) -> TokenizerFiles:
    """The files of the tokenizer that `model.tokenizer_path` names. states: the `state.json` of checkpoints,
    which note the commit of one on the hub.

    `bytes` and tiktoken files become a tokenizer.json; one that is there is copied, and so are the files
    around it. A Python class that a tokenizer_config.json asks for gives way to the plain one, which reads
    the same tokenizer.json. Its own `encode` may add bos, and takes names of special tokens in a text for
    these tokens, unless called with `add_special_tokens=False, split_special_tokens=True`; then the ids are
    those of training. `bytes` needs neither. Raises ConfigError if there is no such tokenizer or it has no
    tokenizer.json, DataError if it cannot be read.
    """
    if path == "bytes":
        return _bytes()
    if "://" in path:
        return _from_ranks(ours.read_ranks(path), {})
    for file in (Path(path), Path(path) / TOKENIZER_JSON, Path(path) / TOKENIZER_MODEL):
        if file.is_file():
            return _from_json(file) if file.suffix == ".json" else _from_model(file)
    if not ours.is_hub_name(path):
        raise ConfigError(
            f"{path!r} is no folder with {TOKENIZER_JSON} or {TOKENIZER_MODEL} and no such file; {_REMEDY}"
        )
    try:
        folder = Path(hub_tokenizer(path, states))
    except ConfigError as error:
        raise ConfigError(f"{error}; {_REMEDY}") from error
    return _from_json(folder / TOKENIZER_JSON)


def files_in(folder: Path) -> TokenizerFiles:
    """The tokenizer that lies in a Hugging Face model folder or a checkpoint, and its generation_config.json.

    token_ids come from generation_config.json, else from config.json. Empty if there are none.
    Raises CheckpointError if one of these files is damaged.
    """
    files = _copies(folder, (*NAMES, GENERATION_CONFIG))
    ids: dict[str, Any] = {}
    for name in ("config.json", GENERATION_CONFIG):
        file = folder / name
        fields = _table(file.read_bytes(), file) if file.is_file() else {}
        ids |= {
            f"{name}_id": fields[f"{name}_id"] for name in _TOKENS if fields.get(f"{name}_id") is not None
        }
    return TokenizerFiles(files, ids)


def same_ids(a: ours.Tokenizer, b: ours.Tokenizer) -> bool:
    """Whether two tokenizers are one, wherever its files lie and whatever their form.

    Compared are the number of ids, the text of each, bos, eos, and the ids of a text of many scripts.
    """
    if any(getattr(a, name) != getattr(b, name) for name in ("vocab_size", "bos_id", "eos_id")):
        return False
    if a.encode(_PROBE).tolist() != b.encode(_PROBE).tolist():
        return False
    return all(a.decode([id_]) == b.decode([id_]) for id_ in range(a.vocab_size))


def _bytes() -> TokenizerFiles:
    from tokenizers import Tokenizer, models

    names, known = ("<bos>", "<eos>"), ours.ByteTokenizer()
    backend = Tokenizer(models.BPE({character: byte for byte, character in enumerate(_characters())}, []))
    cut_into_bytes(backend, None)
    _add_specials(backend, names)
    # A text that spells <bos> is that text: any text comes back as it was.
    config = {**_PLAIN, "bos_token": names[0], "eos_token": names[1], "split_special_tokens": True}
    files = {TOKENIZER_JSON: backend.to_str(pretty=True).encode(), TOKENIZER_CONFIG: _json(config)}
    return TokenizerFiles(files, {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id})


def _from_json(file: Path) -> TokenizerFiles:
    tokenizer = ours.JsonTokenizer(file)
    files = {**_copies(file.parent, NAMES), TOKENIZER_JSON: file.read_bytes()}
    if TOKENIZER_CONFIG not in files:
        special = _table(files.get(SPECIAL_TOKENS_MAP, b"{}"), file.parent / SPECIAL_TOKENS_MAP)
        tokens = {name: special[name] for name in (*_TOKENS, "unk_token") if name in special}
        files[TOKENIZER_CONFIG] = _json({**_PLAIN, **tokens})
    ids = {f"{name}_id": tokenizer.special_id(file.parent, name) for name in _TOKENS}
    return TokenizerFiles(files, {name: id_ for name, id_ in ids.items() if id_ is not None})


def _from_model(file: Path) -> TokenizerFiles:
    content = file.read_bytes()
    if ours.is_sentencepiece(content):
        raise ConfigError(
            f"{file} is a sentencepiece model, which is not converted here: "
            "give --tokenizer_path a folder with the tokenizer.json of this tokenizer "
            "(the Hugging Face repository of the model has it), or 'none'"
        )
    return _from_ranks(ours.read_ranks(str(file)), {TOKENIZER_MODEL: content})


def _from_ranks(ranks: dict[bytes, int], files: Mapping[str, bytes]) -> TokenizerFiles:
    """tiktoken joins the two neighbours whose union has the lowest rank: that is BPE whose merges are all the
    ways to halve a token into two tokens, in the order of the tokens' ranks.
    """
    from tokenizers import Tokenizer, models

    characters = _characters()
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(
            f"this tiktoken file has no tokenizer.json: its ranks are not 0 to {len(ranks) - 1}, or the "
            f"bytes {missing} are missing; give --tokenizer_path a folder with a tokenizer.json, or 'none'"
        )

    def name(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        merges += [
            (name(left), name(right))
            for left, right in sorted(known, key=lambda p: (ranks[p[0]], ranks[p[1]]))
        ]
    vocabulary = {name(token): rank for token, rank in ranks.items()}
    # a word that is a token is not split.
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    cut_into_bytes(backend, ours.LLAMA3_WORDS)
    _add_specials(backend, ours.LLAMA3_SPECIALS)
    bos, eos = ours.LLAMA3_SPECIALS[:2]
    config = _json({**_PLAIN, "bos_token": bos, "eos_token": eos})
    found = {**files, TOKENIZER_JSON: backend.to_str().encode(), TOKENIZER_CONFIG: config}
    return TokenizerFiles(found, {"bos_token_id": len(ranks), "eos_token_id": len(ranks) + 1})


def cut_into_bytes(backend: Any, words: str | None) -> None:
    """Cuts text into `words` (a regular expression; None: not at all) and these into bytes."""
    from tokenizers import Regex, decoders, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(words), behavior="isolated")] if words else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()


def _add_specials(backend: Any, names: Any) -> None:
    """Special tokens, with the ids after the vocabulary."""
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _characters() -> list[str]:
    """Byte -> the character that stands for it in byte-level BPE (GPT-2): itself if it prints,
    else one from 256 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(256 + others.index(byte)) for byte in range(256)]


def _copies(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if TOKENIZER_CONFIG in files and TOKENIZER_JSON in files:
        config = _table(files[TOKENIZER_CONFIG], folder / TOKENIZER_CONFIG)
        if config.pop("auto_map", None) is not None:  # a class of a Python file that does not come along
            files[TOKENIZER_CONFIG] = _json({**config, "tokenizer_class": _PLAIN["tokenizer_class"]})
    return files


def _table(content: bytes, file: Path) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{file} is not a table")
    return table


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
