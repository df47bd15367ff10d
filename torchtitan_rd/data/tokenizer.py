"""Text <-> ids. Three kinds: the built-in bytes, a folder with a tokenizer.json,
a tiktoken file of BPE merges.

No code of a tokenizer folder is ever run: only its JSON files are read.
"""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchtitan_rd.data.content import digest_of
from torchtitan_rd.data.files import HUB_NAME
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger


class Tokenizer(Protocol):
    """vocab_size: the largest id plus one. needed_vocab_size: the same without the special tokens at its end
    that no text has; a model needs so many rows. bos_id, eos_id: None where the tokenizer has no such token.
    digest: of all that decides the ids, wherever the files lie. folder: where they lie,
        None where there is none.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def needed_vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def digest(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    def encode(self, text: str) -> np.ndarray:
        """1-D integer ids of the text, without bos and eos.
        Names of special tokens in the text are plain text.
        """

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The same of many texts, which is faster than one after another."""

    def decode(self, ids: Any) -> str: ...


def load_tokenizer(path: str) -> Tokenizer:
    """`bytes`, a folder with tokenizer.json or a tiktoken tokenizer.model, such a file, its remote address,
    or the name of a repository on the Hugging Face hub (from its local cache where that has it).

    Raises ConfigError if there is no such thing, DataError if it cannot be read.
    """
    if path == "bytes":
        return ByteTokenizer()
    if "://" in path:
        return TiktokenTokenizer(read_ranks(path))
    for file in (Path(path), Path(path) / "tokenizer.json", Path(path) / "tokenizer.model"):
        if file.is_file():
            return JsonTokenizer(file) if file.suffix == ".json" else TiktokenTokenizer(read_ranks(str(file)))
    if is_hub_name(path):
        return JsonTokenizer(download_tokenizer(path) / "tokenizer.json")
    raise ConfigError(
        f"model.tokenizer_path = {path!r}: expected 'bytes', a folder that holds tokenizer.json or "
        f"tokenizer.model, the path of such a file, or a name on the Hugging Face hub"
    )


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a model of so many rows has one for every id that a text can get. Special tokens beyond it,
    such as a `<pad>` that was added to the tokenizer of a released model and not to its weights, are logged.
    """
    if tokenizer.needed_vocab_size > vocab_size:
        return False
    if tokenizer.vocab_size > vocab_size:
        logger.warning(
            "the model has no rows for the tokenizer's special tokens from id %d on (its vocabulary is %d): "
            "a text never has them, and a chat template that writes one is an error",
            *(vocab_size, vocab_size),
        )
    return True


def is_hub_name(path: str) -> bool:
    """Whether `model.tokenizer_path` names a repository on the hub, since nothing here has that name."""
    return path != "bytes" and bool(HUB_NAME.fullmatch(path)) and not Path(path).exists()


def download_tokenizer(name: str, revision: str | None = None) -> Path:
    """The folder with the JSON files of a hub repository's tokenizer; nothing else of it is fetched.

    revision: the commit, branch or tag; None: the newest commit. Raises ConfigError if it cannot be had.
    """
    import huggingface_hub

    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of the hub and the network: a library boundary
        raise ConfigError(
            f"model.tokenizer_path = {name!r}: neither a local path nor to be had from the hub "
            f"({type(error).__name__}); download it where the hub can be reached, or name a local folder"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"model.tokenizer_path = {name!r}: this repository has no tokenizer.json")
    return folder


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255."""

    vocab_size: int = 258
    needed_vocab_size: int = 258
    bos_id: int = 256
    eos_id: int = 257
    digest: str = "bytes"
    folder: Path | None = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library; bos and eos from the JSON files that lie beside it."""

    def __init__(self, file: Path):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file}: not a readable tokenizer.json: {error}") from None
        self.folder: Path | None = file.parent
        # Stored padding or truncation would silently change or cut documents.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = (self.special_id(file.parent, name) for name in ("bos_token", "eos_token"))
        self.needed_vocab_size = self._needed_vocab_size()
        content = json.loads(file.read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
        self.digest = digest_of(json.dumps(content, sort_keys=True), self.bos_id, self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Fast: without the places of the tokens in the text.
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Any) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def _needed_vocab_size(self) -> int:
        """Special tokens within a text are plain text: of these only bos and eos ever are ids."""
        added = self._backend.get_added_tokens_decoder()
        unused = {id_ for id_, token in added.items() if token.special} - {self.bos_id, self.eos_id}
        size = self.vocab_size
        while size - 1 in unused:
            size -= 1
        return size

    def special_id(self, folder: Path, name: str) -> int | None:
        for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
            try:
                token = json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{file}: not a readable JSON object: {error}") from None
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                id_ = self._backend.token_to_id(token)
                if id_ is None:
                    raise DataError(f"{file}: {name} {token!r} is not in the vocabulary of tokenizer.json")
                return id_
        return None


# Llama 3's way to cut text into words, and its special tokens in the order of their ids
# (meta-llama/llama3, tokenizer).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]
# tiktoken's matcher overflows its stack on very long texts and on very long runs without a word border.
_MAX_CHARACTERS = 400_000


class TiktokenTokenizer:
    """Merges of a tiktoken file (lines of base64 and rank) with the words and the 256 special
    tokens of Llama 3.
    """

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        specials = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
        self._backend = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=specials
        )
        self.folder: Path | None = None
        self.vocab_size = self.needed_vocab_size = self._backend.n_vocab
        self.bos_id, self.eos_id = specials["<|begin_of_text|>"], specials["<|end_of_text|>"]
        self.digest = digest_of("llama3", sorted(ranks.items()))

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for start in range(0, len(text), _MAX_CHARACTERS):
            for piece in _split_long_runs(text[start : start + _MAX_CHARACTERS]):
                ids += self._backend.encode_ordinary(piece)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return self._backend.decode([int(i) for i in ids if i < self.bos_id])


def _split_long_runs(text: str) -> list[str]:
    """Cuts runs of blanks or of non-blanks after every 25000 characters."""
    cuts = [0]
    for run in re.finditer(r"\S{25001,}|\s{25001,}", text):
        cuts += range(run.start() + 25000, run.end(), 25000)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def read_ranks(path: str) -> dict[bytes, int]:
    import blobfile

    try:
        with blobfile.BlobFile(path, "rb") as file:
            content = file.read()
    except Exception as error:  # of the network, of credentials, of the file: each store has its own kinds
        raise DataError(f"model.tokenizer_path = {path!r} cannot be read: {error}") from error
    if is_sentencepiece(content):
        raise DataError(
            f"{path}: a sentencepiece model, which is not read here: name a folder with the tokenizer.json "
            "of this tokenizer (the model's repository on the Hugging Face hub has it)"
        )
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise DataError(f"{path}: not a tiktoken file (lines of a base64 token and its rank)") from None
    if not ranks:
        raise DataError(f"{path}: holds no tokens")
    return ranks


def is_sentencepiece(content: bytes) -> bool:
    """Whether a tokenizer.model is sentencepiece's: a protobuf, whose first field is no line of base64."""
    return content[:1] == b"\n"
