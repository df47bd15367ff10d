"""One run in one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.common import checkpointer, load_once, save_steps, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd.checkpoint import lock as lock_module
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.errors import CheckpointError


def write_lock(folder, **changes):
    path = folder / ".lock"
    path.write_text(json.dumps({**lock_module._this_process(), **changes}))
    return path


def test_a_second_run_in_the_same_folder_is_refused_with_the_owner(tmp_path):
    first = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=rf"is in use by process {os.getpid()} on .*; stop that run"):
        checkpointer(tmp_path)
    first.close()
    checkpointer(tmp_path).close()
    assert not (tmp_path / "checkpoint" / ".lock").exists()


def refused_body(rank, world_size, dump):
    with pytest.raises(CheckpointError, match="is in use by process"):
        checkpointer(dump)
    return True


def test_the_refusal_reaches_every_rank(tmp_path):
    first = checkpointer(tmp_path)
    assert run_on_ranks(2, refused_body, tmp_path) == [True, True]
    first.close()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path, log_lines):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lock(tmp_path, pid=dead.pid)
    FolderLock(tmp_path).release()
    assert any(f"from process {dead.pid}" in line for line in log_lines)


def test_the_lock_of_a_zombie_is_taken_over_at_once(tmp_path, log_lines):
    """As in a container whose first process does not wait for its children."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    ticks = int(Path(f"/proc/{dead.pid}/stat").read_text().rpartition(")")[2].split()[19])
    write_lock(tmp_path, pid=dead.pid, start_ticks=ticks)
    FolderLock(tmp_path).release()
    dead.wait()
    assert any(f"from process {dead.pid}" in line for line in log_lines)


def test_a_pid_that_another_process_reuses_is_not_the_owner(tmp_path):
    write_lock(tmp_path, start_ticks=1)
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_from_another_host_is_taken_over_only_without_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 1.0)
    path = write_lock(tmp_path, host="elsewhere", boot_id="another", pid=1)
    changed, beats = lock_module._changed, []

    def beating(path):
        beats.append(0)
        os.utime(path, ns=(0, len(beats) * 10**9))
        return changed(path)

    monkeypatch.setattr(lock_module, "_changed", beating)
    with pytest.raises(CheckpointError, match="is in use by process 1 on elsewhere"):
        FolderLock(tmp_path)
    monkeypatch.setattr(lock_module, "_changed", changed)
    before = path.read_text()
    lock = FolderLock(tmp_path)
    assert path.read_text() != before
    lock.release()


def test_the_owner_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    lock = FolderLock(tmp_path)
    os.utime(lock.path, ns=(0, 0))
    for _ in range(1000):
        if lock_module._changed(lock.path) != 0:
            break
        lock._stop.wait(0.01)
    assert lock_module._changed(lock.path) != 0
    lock.release()


def test_a_damaged_lock_is_watched_like_one_from_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 0.2)
    (tmp_path / ".lock").write_text("{")
    FolderLock(tmp_path).release()


def test_a_run_that_lost_its_lock_saves_nothing_more_and_leaves_the_new_owner_alone(tmp_path):
    save_steps(tmp_path, [1])
    suspended = checkpointer(tmp_path)
    (tmp_path / "checkpoint" / ".lock").unlink()
    other = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="another run uses the folder"):
        suspended.save(2, training_state(2), {"step": 2})
    suspended.close()
    assert (tmp_path / "checkpoint" / ".lock").exists()
    other.close()
    assert load_once(tmp_path)[0] == {"step": 1}


def test_of_two_runs_that_find_the_same_stale_lock_only_one_gets_it(tmp_path, monkeypatch):
    write_lock(tmp_path, start_ticks=1)
    is_alive, winners = lock_module._is_alive, []

    def overtaken(owner, path):
        monkeypatch.setattr(lock_module, "_is_alive", is_alive)
        winners.append(FolderLock(tmp_path))  # between our look at the lock and our rename of it
        return False

    monkeypatch.setattr(lock_module, "_is_alive", overtaken)
    with pytest.raises(CheckpointError, match="is in use by process"):
        FolderLock(tmp_path)
    assert winners[0].path.read_text() == winners[0]._content
    winners[0].release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "elsewhere", [{"boot_id": "another"}, {"pid_namespace": 1}, {"boot_id": None}, {"pid_namespace": None}]
)
def test_a_pid_of_another_boot_or_namespace_of_the_same_host_name_decides_nothing(
    tmp_path, monkeypatch, elsewhere
):
    """The owner's pid is free here, which says nothing of a process in another container."""
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 0.5)
    path = write_lock(tmp_path, start_ticks=1, **elsewhere)
    changed, beats = lock_module._changed, []

    def beating(path):
        beats.append(0)
        os.utime(path, ns=(0, len(beats) * 10**9))
        return changed(path)

    monkeypatch.setattr(lock_module, "_changed", beating)
    before = path.read_text()
    with pytest.raises(CheckpointError, match="is in use by process"):
        FolderLock(tmp_path)
    assert path.read_text() == before


def test_a_lock_of_an_earlier_version_is_watched(tmp_path, monkeypatch):
    """It does not say of which boot its pid is."""
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 0.2)
    path = write_lock(tmp_path, start_ticks=1)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({key: owner[key] for key in ("host", "pid", "start_ticks", "since")}))
    watched = []
    changed = lock_module._changed
    monkeypatch.setattr(lock_module, "_changed", lambda path: watched.append(path) or changed(path))
    FolderLock(tmp_path).release()
    assert watched


IN_A_NAMESPACE = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("lock", {module!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
lock.HEARTBEAT_SECONDS, lock.WATCH_SECONDS = 0.1, 20.0
try:
    held = lock.FolderLock(pathlib.Path({folder!r}))
except Exception as error:
    print("refused", error)
else:
    print("held", flush=True)
    sys.stdin.read()
    held.require_held()
    held.release()
    print("released")
"""


@pytest.mark.parametrize("mount", [["--mount-proc"], []], ids=["own /proc", "the outer /proc"])
def test_a_living_run_in_another_container_keeps_its_lock(tmp_path, mount):
    command = ["unshare", "--pid", "--fork", "--kill-child", *mount, sys.executable, "-c"]
    if subprocess.run(["unshare", "--pid", "--fork", *mount, "true"], capture_output=True).returncode:
        pytest.skip("may not make a PID namespace here")
    code = IN_A_NAMESPACE.format(module=lock_module.__file__, folder=str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, code], **pipes)
    try:
        assert first.stdout.readline() == "held\n"
        second = subprocess.run([*command, code], capture_output=True, text=True, input="", timeout=60)
        assert "is in use by process" in second.stdout, second
        assert first.communicate("", timeout=60)[0] == "released\n"
    finally:
        first.kill()
        first.wait()


def test_a_lock_whose_content_cannot_be_written_is_not_left_behind(tmp_path):
    """A file system, full to the last byte: the name of a file still fits, its content does not."""
    (tmp_path / "full").mkdir()
    script = f"""
        mount -t tmpfs -o size=64k tmpfs {tmp_path}/full || exit 77
        cat /dev/zero > {tmp_path}/full/filler 2> {tmp_path}/error
        {sys.executable} -c "$CODE" < /dev/null; ls -A {tmp_path}/full
    """
    code = IN_A_NAMESPACE.format(module=lock_module.__file__, folder=str(tmp_path / "full"))
    found = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "CODE": code},
    )
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("may not mount a file system here")
    refused, *left = found.stdout.splitlines()
    assert "No space left on device" in refused, found
    assert left == ["filler"]
