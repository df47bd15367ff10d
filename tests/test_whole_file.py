"""Outputs of commands are there whole or not at all."""

import errno
import os

import pytest

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.whole_file import whole_file


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path, "--output") as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    told = r"--output .*a\.json cannot be written: No space left on device: [\d,]+ bytes are free in "
    with pytest.raises(ConfigError, match=told), whole_file(path, "--output") as part:
        part.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_what_goes_wrong_in_the_writer_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.json", "--output") as part:
        part.write_text("ne")
        raise ZeroDivisionError
    assert not names(tmp_path)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with whole_file(tmp_path / "link", "--output") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(pipe, "--output") as part:
        part.write_text("new")
    assert os.read(reader, 9) == b"new" and names(tmp_path) == ["pipe"]
    os.close(reader)
