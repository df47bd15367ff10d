"""A forked program is a process like any other: what the tests read off it is its own."""

import os
import signal
import subprocess
import sys

import pytest

from tests.fork_server import run_python, start_python
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('why')", 1),
        ("raise ValueError('why')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os; os._exit(3)", 3),
    ],
)
def test_a_program_ends_with_its_own_status(code, status):
    assert run_python("-c", code).returncode == status


def test_a_program_has_its_own_arguments_environment_folder_and_output(tmp_path):
    code = "import os, sys; print(__name__, sys.argv[1:], os.environ['MINE'], os.getcwd(), len(os.environ))"
    code += "\nprint('said', file=sys.stderr)\nimport atexit; atexit.register(print, 'last')"
    found = run_python("-c", code, "a b", env={"MINE": "c"}, cwd=tmp_path)
    assert found.stdout == f"__main__ ['a b'] c {tmp_path} 1\nlast\n"
    assert found.stderr == "said\n"
    (tmp_path / "module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert run_python(tmp_path / "module.py", "x").stdout == "__main__ ['x']\n"


def test_programs_know_nothing_of_each_other():
    run_python("-c", "import os, sys, torch; torch.manual_seed(5); torch.changed = os.environ['X'] = '1'")
    assert run_python(
        "-c", "import os, torch; print(hasattr(torch, 'changed'), 'X' in os.environ)"
    ).stdout == ("False False\n")


def test_a_running_program_hears_signals_and_none_outlives_its_context():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(5)); print('ready', flush=True)"
    )
    with (
        start_python("-c", code + "; time.sleep(60)") as first,
        start_python("-c", "import time; time.sleep(60)") as second,
    ):
        while "ready" not in first.output()[0]:
            assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 5 and second.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.01)
    assert second.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(second.pid, 0)


def fails_on_one(rank, world_size):
    if rank == 1:
        sys.exit("told to")
    return rank


def test_a_rank_that_ends_in_the_midst_fails_the_test_and_the_next_one_finds_new_ranks():
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*told to"):
        run_on_ranks(2, fails_on_one)
    assert run_on_ranks(2, max) == [2, 2]  # of rank and number of ranks
