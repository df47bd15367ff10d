"""Trains a byte-level BPE tokenizer whose special tokens have the ids that they are given.

Every string can be encoded and decodes to itself: the 256 bytes are tokens, and nothing is normalised.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.conversion.tokenizer_files import cut_into_bytes
from torchtitan_rd.data.tokenizer import LLAMA3_WORDS, Tokenizer, load_tokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.chat_templates import load_template
from torchtitan_rd.preparation.documents import Documents
from torchtitan_rd.preparation.manifest import Output, describe

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# How text is cut into words, within which bytes are merged. gpt2: openai/gpt-2. gpt4: the pattern of
# cl100k_base in openai/tiktoken. gpt4-digits: the same with every digit a word of its own.
_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
REGEXES = {
    "gpt4-digits": _GPT4 % r"\p{N}",
    "gpt4": _GPT4 % r"\p{N}{1,3}",
    "llama3": LLAMA3_WORDS,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# Huginn's special tokens in the order of their ids, which are the last 32 of its vocabulary: with 65536
# tokens begin_text is 65504. The last four of these stand for arrows.
HUGINN_SPECIALS = tuple(
    f"<|{name}|>"
    for name in (
        *("begin_text", "end_text", "begin_header", "end_header", "end_turn", "pad"),
        *("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "...", "del"),
        *(f"c_{i}" for i in range(10)),
        *("?", "&", "!", "-", "+", "interrupt", "\u2190", "\u2191", "\u2192", "\u2193"),
    )
)
LAYOUTS = {"huginn": HUGINN_SPECIALS, "none": ()}
_ROLES = {"bos": "<|begin_text|>", "eos": "<|end_text|>", "pad": "<|pad|>"}
_MOST_TOKENS = 1 << 24  # more than any tokenizer has
_CHECKED = 500  # documents that must survive encoding and decoding
# Cut differently by different patterns, composed, foreign, not printable, and names of special tokens.
_PROBES = (
    "It's 12345 and 3.14e-10;\t if (x == y) { return f(x); }\r\n\n    indented  twice \n",
    "\u00fcn\u00efc\u00f6d\u00e9 e\u0301 \u4f60\u597d\u4e16\u754c \U0001f600\u200d\x00\x7f",
    " <|begin_text|><|end_text|> <|pad|>",
)


@dataclass(frozen=True)
class Wanted:
    """What is to be trained.

    vocab_size: of all tokens, special ones included. regex: a name of `REGEXES`. max_token_length: bytes.
    special: name -> id, beside those of `layout`. bos, eos, pad: names of special tokens, or none: those of
    Huginn where the layout has them. chat_template: see `load_template`.
    """

    vocab_size: int = 65536
    regex: str = "gpt4-digits"
    max_token_length: int = 32
    min_frequency: int = 2
    layout: str = "huginn"
    special: dict[str, int] = field(default_factory=dict)
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    chat_template: str = "none"

    def __post_init__(self):
        for flag, value, known in (("regex", self.regex, REGEXES), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise ConfigError(f"--{flag} {value!r} is unknown{nearest(value, known)}")
        # The trainer takes memory for as many tokens as it is told, and ends the process where there is none.
        for flag, number, least, most in (
            ("vocab-size", self.vocab_size, 256, _MOST_TOKENS),
            ("max-token-length", self.max_token_length, 1, 2**31),
            ("min-frequency", self.min_frequency, 0, 2**31),
        ):
            if not least <= number <= most:
                raise ConfigError(f"--{flag} {number}: expected {least} to {most}")
        learned = self.vocab_size - len(self.specials())
        if learned < 256:
            raise ConfigError(
                f"--vocab-size {self.vocab_size}: leaves {learned} ids beside the special tokens, and the "
                "256 bytes need one each"
            )

    def specials(self) -> dict[str, int]:
        """Name -> id of every special token, by id. Raises ConfigError where ids clash or do not exist."""
        names = LAYOUTS[self.layout]
        start = self.vocab_size - len(names)
        ids = {name: start + i for i, name in enumerate(names)} | self.special

        owners: dict[int, str] = {}
        for name, id_ in ids.items():
            if not 0 <= id_ < self.vocab_size:
                raise ConfigError(f"--special {name}={id_}: ids are 0..{self.vocab_size - 1} (--vocab-size)")
            if id_ in owners:
                raise ConfigError(f"--special {name}={id_}: this is the id of {owners[id_]}")
            owners[id_] = name
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def roles(self) -> dict[str, str]:
        """`bos_token` and so on -> the name of a special token. Raises ConfigError for one that is none."""
        specials, found = self.specials(), {}
        for role, usual in _ROLES.items():
            name = getattr(self, role)
            if name is None and usual in specials:
                found[f"{role}_token"] = usual
            elif name not in (None, "none"):
                if name not in specials:
                    raise ConfigError(f"--{role} {name!r} is no special token{nearest(name, specials)}")
                found[f"{role}_token"] = name
        return found

    def template(self) -> str | None:
        """The text of the chat template. Raises ConfigError as `load_template`."""
        return load_template(self.chat_template, self.specials())

    def arguments(self) -> dict[str, Any]:
        """Flag -> value, the template as its text. Raises ConfigError for what does not fit together."""
        self.roles()
        values = {**vars(self), "chat_template": self.template()}
        return {name.replace("_", "-"): value for name, value in values.items()}


def train_tokenizer(
    documents: Documents, wanted: Wanted, output: Output, max_characters: int | None = None
) -> dict[str, Any]:
    """Trains on all documents and writes a folder that transformers and data/tokenizer.py load.

    max_characters: of each document. Returns the folder's manifest. Raises DataError if the text has too few
    different words for such a vocabulary, or if a document does not survive encoding and decoding.
    """
    template, roles, specials = wanted.template(), wanted.roles(), wanted.specials()

    with output.making("tokenizer") as done:
        if done:
            return done
        learned = _train(documents.texts(max_characters), len(documents), wanted)
        backend = _with_specials(learned, wanted, roles)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
            **roles,
            **({"chat_template": template} if template else {}),
        }
        contents = {
            "special_tokens_map.json": json.dumps(roles, indent=1) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
            # It makes the folder a tokenizer, so it comes last.
            "tokenizer.json": backend.to_str(pretty=True),
        }
        facts = _check(contents, [*_PROBES, *islice(documents.texts(max_characters), _CHECKED)])
        for name, content in contents.items():
            output.write(output.folder / name, content)
        files = {name: describe(output.folder / name) for name in sorted(contents)}
        return output.finish({"files": files, "documents": len(documents), "specials": specials, **facts})


def _check(contents: dict[str, str], texts: Sequence[str]) -> dict[str, Any]:
    """`check_round_trip` of a tokenizer that is not published yet."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return check_round_trip(load_tokenizer(folder), texts)


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """How many texts, bytes and tokens these are. Raises DataError for the first that decodes to another."""
    tokens = size = 0
    for text in texts:
        ids = tokenizer.encode(text)
        found = tokenizer.decode(ids)
        if found != text:
            at = next((i for i, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), 0)
            here = slice(at, at + 40)
            raise DataError(f"the tokenizer does not give back {text[here]!r}: it gives {found[here]!r}")
        tokens += len(ids)
        size += len(text.encode())
    return {"checked_documents": len(texts), "checked_bytes": size, "checked_tokens": tokens}


def _train(texts: Iterator[str], count: int, wanted: Wanted) -> "Backend":
    """Bytes and merges alone, with ids from 0."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Backend(BPE())
    cut_into_bytes(tokenizer, REGEXES[wanted.regex])

    size = wanted.vocab_size - len(wanted.specials())
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=wanted.min_frequency,
        initial_alphabet=ByteLevel.alphabet(),
        # A character of the byte-level alphabet is a byte.
        max_token_length=wanted.max_token_length,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=count)
    learned = tokenizer.get_vocab_size()
    if learned < size:
        raise DataError(
            f"--vocab-size {wanted.vocab_size}: only {learned} tokens can be learned from this text (pairs "
            f"that occur {wanted.min_frequency} times, up to {wanted.max_token_length} bytes); give more "
            f"text, or set it to {wanted.vocab_size - size + learned} or less"
        )
    return tokenizer


def _with_specials(learned: "Backend", wanted: Wanted, roles: dict[str, str]) -> "Backend":
    """The same with the special tokens at their ids; the learned tokens keep their order on the others.

    The library numbers added tokens itself unless the model's own vocabulary has them, so it gets them.
    Raises ConfigError for a special token that was learned too: it would take that token's place.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    specials = wanted.specials()
    free = (i for i in range(wanted.vocab_size) if i not in set(specials.values()))
    content = json.loads(learned.to_str())
    vocabulary = content["model"]["vocab"]
    if taken := sorted(set(vocabulary) & set(specials)):
        raise ConfigError(f"--special {taken[0]}={specials[taken[0]]}: ordinary text has this as a token")
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    content["model"]["vocab"] = {**dict(zip(by_id, free, strict=True)), **specials}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id_, "content": name, **plain} for name, id_ in specials.items()]

    tokenizer = Backend.from_str(json.dumps(content))
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    around = [(name, specials[name]) for name in (bos, eos) if name]
    if around:
        parts = [part for part in (bos, "$A", eos) if part]
        pair = [part for part in (bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1") if part]
        tokenizer.post_processor = TemplateProcessing(single=parts, pair=pair, special_tokens=around)
    return tokenizer
