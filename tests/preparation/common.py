"""What the tests of preparation have in common."""

import json
from pathlib import Path

from torchtitan_rd.__main__ import main
from torchtitan_rd.data.text import pydoc_topics


def run(*arguments) -> int:
    """`torchtitan-rd data ...`, in this process; the exit status."""
    return main(["data", *map(str, arguments)])


def write_corpus(path: Path, texts: list[str] | None = None) -> Path:
    """A .jsonl of texts: by default of some of Python's help topics, without the longest."""
    texts = texts or [text for text in pydoc_topics(0) if len(text) < 6000][:60]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
