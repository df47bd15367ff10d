"""benchmarks/code_lines.py counts code and nothing else."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "code_lines.py"

SAMPLE = '''"""A module."""

import os  # one


class A:
    """Two lines here
    do not count."""

    x: int = 1
    """Nor does an attribute's."""

    def f(self):
        # nor this
        return """a value
        of two lines"""
'''


def test_blank_lines_comments_and_docstrings_are_no_code(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(SAMPLE)
    (tmp_path / "b.py").write_text("\n\nx = (\n    1,\n)\n")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [["3", "b.py"], ["6", "room"], ["9", "all"]]
