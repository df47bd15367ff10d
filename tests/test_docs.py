"""The pages in docs/ name what there is, and nothing in the repository refers to what is not in it."""

import ast
import re
from pathlib import Path

import pytest

from torchtitan_rd.data import DATASETS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("torchtitan_rd", "tests", "benchmarks", "convert", "scripts", "docs")
WRITTEN = [
    *(
        path
        for folder in FOLDERS
        for kind in ("py", "md", "sh")
        for path in sorted((ROOT / folder).rglob(f"*.{kind}"))
    ),
    *sorted(path for kind in ("md", "sh") for path in ROOT.glob(f"*.{kind}")),
]
# Marks of notes that were never part of the repository.
ELSEWHERE = (
    r"\(T\d+(, T\d+)*\)",
    r"ancestors\.md",
    r"\bspecs/",
    r"DESIGN\.md",
    r"\breviews?/",
    r"performance\.md",
)


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_no_reference_leaves_the_repository(pattern):
    others = [path for path in WRITTEN if path != Path(__file__)]
    found = [f"{path.relative_to(ROOT)}: {line}" for path in others for line in lines_with(path, pattern)]
    assert not found, "\n".join(found)


def lines_with(path: Path, pattern: str) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(pattern, line)]


def test_every_page_that_is_named_exists_and_so_does_its_heading():
    for path in WRITTEN:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for page in re.findall(r"\bdocs/\w+\.md", text):
            assert (ROOT / page).is_file(), f"{path}: {page}"
        for page, heading in re.findall(r"\((docs/\w+\.md), ([A-Z][\w ]+)\)", text):
            headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in headings, f"{path}: {page} has no heading {heading!r}"


def test_every_data_set_stands_on_its_page():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in DATASETS if f"`{name}`" not in page] == []


def test_every_page_stands_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS if path.name != "architecture.md" and path.name not in page] == []


def test_every_room_stands_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listing = page.split("## Rooms")[1].split("\n## ")[0]
    package = listing.split("    convert/")[0]
    listed = set(re.findall(r"(?:^|\s|\|)(\w+)(?:\.py|/)(?=\s|,|$)", package, re.MULTILINE))
    rooms = {
        path.stem
        for path in (ROOT / "torchtitan_rd").iterdir()
        if not path.name.startswith(("__", "py.typed"))
    }
    assert sorted(rooms - listed) == []


def test_the_traps_name_code_and_tests_that_there_are():
    page = (ROOT / "docs" / "pytorch_traps.md").read_text(encoding="utf-8")
    for file in re.findall(r"`([\w/]+\.py)", page):
        assert (ROOT / file).is_file() or (ROOT / "torchtitan_rd" / file).is_file(), file
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{file}::{test}"
        )
    for trap in page.split("\n## ")[1:]:
        assert "\n- `" in trap and "`tests/" in trap, trap.splitlines()[0]
