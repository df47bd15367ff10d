"""A conversion that is killed, at any point, leaves nothing that the next one does not clear away."""

import os
import signal
from pathlib import Path

import pytest

from torchtitan_rd.conversion import output as output_module
from torchtitan_rd.conversion.output import staged
from torchtitan_rd.errors import CheckpointError

POINTS = ["while it writes", "before the old one is set aside", "between the two renames", "after the commit"]


def convert(target: Path, word: str) -> None:
    with staged(target) as folder:
        (folder / "config.json").write_text(word)


def killed_at(point: str, target: Path) -> None:
    """A process of its own, which dies of kill -9 there."""
    pid = os.fork()
    if pid == 0:
        kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        rename = Path.rename

        def rename_and_die(path, new):
            if point == "before the old one is set aside" or path.name == "new":
                kill()
            return rename(path, new)

        if point in POINTS[1:3]:
            Path.rename = rename_and_die
        elif point == "after the commit":
            output_module.shutil.rmtree = kill
        with staged(target) as folder:
            (folder / "config.json").write_text("killed")
            if point == "while it writes":
                kill()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_what_a_conversion_killed_at_any_point_leaves_is_gone_after_the_next(point, tmp_path):
    target = tmp_path / "model"
    for other in (".tmp-model-mine", f".tmp-another-{'0' * 32}"):
        (tmp_path / other).mkdir()
    convert(target, "old")
    killed_at(point, target)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-model-")]
    assert len(left) == 2, "one of the killed one, one that is the user's"

    with pytest.raises(RuntimeError, match="fails too"), staged(target):
        there = (target / "config.json").read_text()
        raise RuntimeError("fails too")
    assert there == ("killed" if point == "after the commit" else "old"), "old or new, never nothing"
    assert (target / "config.json").read_text() == there

    convert(target, "new")
    assert (target / "config.json").read_text() == "new"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f".tmp-another-{'0' * 32}", ".tmp-model-mine", "model"]
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_conversion_that_still_runs_is_left_alone(tmp_path):
    with staged(tmp_path / "model") as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(CheckpointError, match=r"another conversion to .*model is running"):
            convert(tmp_path / "model", "second")
    assert (tmp_path / "model" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
