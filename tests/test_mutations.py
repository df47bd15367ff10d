"""The table of mutations fits the code, and the program that runs it tells a killed edit from
one that survives.
"""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.mutations import (
    EQUIVALENT,
    KILLED,
    NO_VERDICT,
    ROOT,
    SURVIVED,
    Mutation,
    copies,
    judge_all_of,
    read_table,
)

MUTATIONS = read_table()
FEWEST = 80


def test_the_table_is_large_and_names_no_edit_twice():
    names = [(mutation.file, mutation.name) for mutation in MUTATIONS]
    assert len(names) >= FEWEST
    assert sorted(names) == sorted(set(names))


def test_every_edit_has_its_place_in_the_code_and_tests_that_exist():
    """All at once, so that whoever moves code sees every edit that must move with it."""
    problems = [f"{m.file}: {m.name}: {problem}" for m in MUTATIONS for problem in problems_of(m)]
    assert not problems, "tests/mutations_table:\n" + "\n".join(problems)


def problems_of(mutation):
    path = ROOT / mutation.file
    times = path.read_text().count(mutation.before) if path.is_file() else "no such file:"
    if times != 1:
        yield f"`before` occurs {times} times, not once: {mutation.before!r}"
    if mutation.before == mutation.after:
        yield "it changes nothing"

    files, expression = mutation.split_tests()
    tests = set()
    for target in files.split():
        file, _, test = target.partition("::")
        if not (ROOT / file).is_file():
            yield f"there is no {file}"
            return
        tests |= names_of_tests(file)
        if test and test.partition("[")[0] not in tests:
            yield f"{file} has no {test}"
    for word in re.findall(r"\w+", expression):
        if word not in ("and", "or", "not") and not any(word in test for test in tests):
            yield f"no test of {files} has {word!r} in its name"


@cache
def names_of_tests(file):
    tree = ast.parse((ROOT / file).read_text())
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"
    }


CODE = "def double(x):\n    return 2 * x  # twice\n\n\ndef half(x):\n    return x / 2\n"
TESTS = "from code_of import double, half\n\n\ndef test_double():\n    assert double(2) == 4\n\n\n"
TESTS += "def test_half():\n    assert half(2) == 1\n\n\ndef test_wrong():\n    assert half(2) == 2\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The copy of a small repository."""
    root = tmp_path_factory.mktemp("repository")
    (root / "code_of.py").write_text(CODE)
    (root / "test_code.py").write_text(TESTS)
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").touch()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    with copies(2, root) as free:
        assert free.qsize() == 2
        yield free.get()
    assert (root / "code_of.py").read_text() == CODE


def edit(before, after, tests="test_code.py -k double", equivalent=""):
    return Mutation("edit", "code_of.py", before, after, tests, equivalent)


def test_a_copy_holds_what_git_would_track(copy):
    assert sorted(path.name for path in copy.iterdir() if path.name[0] != "_") == [
        ".gitignore",
        "code_of.py",
        "test_code.py",
    ]


OF_ONE_SELECTION = [
    (edit("2 * x", "3 * x"), KILLED),
    (edit("2 * x", "x + 2"), SURVIVED),
    (edit("# twice", "# doubled", equivalent="a comment"), EQUIVALENT),
    (edit("2 * x", "x**3", equivalent="or so it was thought"), KILLED),
    (edit("def", "lambda"), NO_VERDICT),  # more than once
]
OF_ONE_FILE = [
    (edit("2 * x", "3 * x"), KILLED),
    (edit("x / 2", "0", tests="test_code.py -k 'half and not wrong'"), KILLED),
    (edit("x / 2", "0", tests="test_code.py -k nothing"), NO_VERDICT),  # selects no test
]
OF_A_TEST_THAT_FAILS_ANYWAY = [(edit("x / 2", "0", tests="test_code.py -k wrong"), NO_VERDICT)]


NIGHTLY = [
    pytest.param(cases, marks=pytest.mark.slow) for cases in (OF_ONE_FILE, OF_A_TEST_THAT_FAILS_ANYWAY)
]


@pytest.mark.parametrize("cases", [OF_ONE_SELECTION, *NIGHTLY])
def test_an_edit_is_killed_by_a_failing_test_alone_and_taken_back(cases, copy):
    mutations, outcomes = zip(*cases, strict=True)
    verdicts = list(judge_all_of(mutations, copy, limit=60.0))
    assert [verdict.outcome for verdict in verdicts] == list(outcomes)
    as_meant = [o == (EQUIVALENT if m.equivalent else KILLED) for m, o in cases]
    assert [verdict.is_as_meant for verdict in verdicts] == as_meant
    assert (copy / "code_of.py").read_text() == CODE


@pytest.mark.slow
def test_tests_that_do_not_end_give_no_verdict(copy):
    slow = edit("2 * x", "2 * x * (__import__('time').sleep(60) is None)")
    (verdict,) = judge_all_of([slow], copy, limit=5.0)
    assert verdict.outcome == NO_VERDICT and verdict.detail == "no end within 5 s"
    assert (copy / "code_of.py").read_text() == CODE


def test_the_table_is_toml_that_a_person_can_read():
    for path in sorted(Path(__file__).parent.glob("mutations_table/*.toml")):
        text = path.read_text()
        assert text.count("\n") <= 400 and text.isascii() and text.startswith("# "), path
