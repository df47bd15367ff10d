"""A process dies at any point of a save: afterwards the old checkpoint or the new one is
loaded, never a mixture.
"""

import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.checkpoint.forked import CRASHED, crash, run_forked
from tests.fork_server import start_python
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.checkpoint.folders import CheckpointFolder
from torchtitan_rd.checkpoint.manifest import Manifest
from torchtitan_rd.checkpoint.writer import Writer


def crash_at(owner, method, *, after=False, call=1):
    """Replaces `owner.method` so that its `call`-th call dies, before or after doing its work."""
    original, calls = getattr(owner, method), []

    def dying(*args, **kwargs):
        calls.append(method)
        if len(calls) < call:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        crash()

    setattr(owner, method, dying)


def crash_in_the_middle_of_a_purge():
    def remove_one_file(path, **_):
        sorted(path.iterdir())[0].unlink()
        crash()

    shutil.rmtree = remove_one_file


POINTS = {
    "before staging": lambda: crash_at(Writer, "write"),
    "mid shard": lambda: crash_at(torch, "save", call=3),
    "after the shards": lambda: crash_at(Writer, "_hash_own_files"),
    "after the hashes": lambda: crash_at(Writer, "_hash_own_files", after=True),
    "before .metadata": lambda: crash_at(FileSystemWriter, "finish"),
    "before the manifest": lambda: crash_at(Manifest, "write"),
    "before the rename": lambda: crash_at(CheckpointFolder, "commit"),
    "after the rename": lambda: crash_at(CheckpointFolder, "commit", after=True),
    "mid purge": crash_in_the_middle_of_a_purge,
}
CASES = [(0, point) for point in POINTS] + [(1, point) for point in list(POINTS)[:4]]


def dying_body(rank, world_size, dump, victim, point, mode):
    checkpoints = checkpointer(dump, async_mode=mode, keep_latest_k=2)
    if rank == victim:
        POINTS[point]()
    checkpoints.save(3, training_state(3), {"step": 3})
    checkpoints.close()


@pytest.mark.parametrize(("victim", "point"), CASES)
def test_a_rank_that_dies_leaves_the_old_or_the_new_checkpoint(tmp_path, victim, point):
    save_steps(tmp_path, [1, 2], keep_latest_k=2)
    mode = "async" if point in ("mid shard", "before the rename") else "disabled"
    codes = run_forked(2, dying_body, tmp_path, victim, point, mode, store=tmp_path / "store")
    assert codes[victim] == CRASHED
    assert codes[1 - victim] == 1  # the survivor learns of it at once
    state, found = load_once(tmp_path, keep_latest_k=2)
    assert state["step"] == (3 if point in ("after the rename", "mid purge") else 2)
    assert found == digest(training_state(state["step"]))
    left = names(tmp_path)
    assert all(name.startswith("step-") for name in left), "staging and trash are removed by the next run"
    assert all(verify(tmp_path / "checkpoint" / name) == [] for name in left)


EXITS = {
    "return": ("pass", 0),
    "exception": ("raise ValueError('stop')", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "ctrl-c": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", -signal.SIGINT),
    "no close": ("closing = False", 0),
}


def test_however_the_program_ends_the_save_in_flight_is_kept(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys, time
        from tests.checkpoint.common import checkpointer, training_state
        from torchtitan_rd.checkpoint.writer import Writer
        write = Writer._write_shards
        Writer._write_shards = lambda *args: (time.sleep(0.5), write(*args))
        checkpoints = checkpointer(sys.argv[1], async_mode="async")
        closing = True
        try:
            checkpoints.save(4, training_state(4), {"step": 4}, last_step=True)
            HOW
        finally:
            if closing:
                checkpoints.close()
    """)
    running = {}
    for name, (how, _) in EXITS.items():
        command = ["-c", program.replace("HOW", how), str(tmp_path / name)]
        if name == "ctrl-c":  # whose exit status is that of an interpreter started as usual
            running[name] = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
        else:
            running[name] = start_python(*command)
    for name, process in running.items():
        assert process.wait(60) == EXITS[name][1], name
        assert load_once(tmp_path / name) == ({"step": 4}, digest(training_state(4))), name
