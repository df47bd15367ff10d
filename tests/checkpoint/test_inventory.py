"""`torchtitan-rd checkpoints`: what lies in a folder, and what --prune takes away."""

import json
from pathlib import Path

import pytest

from tests.checkpoint.common import names, save_steps
from torchtitan_rd.__main__ import main
from torchtitan_rd.checkpoint import inventory as inventory_module
from torchtitan_rd.checkpoint import manifest as manifest_module
from torchtitan_rd.checkpoint.folders import CheckpointFolder
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.manifest import read_manifest
from torchtitan_rd.commands import verify as verify_command

HEX = "0123456789abcdef" * 2


def listed(capsys, *arguments) -> tuple[int, dict[str, dict], list[str]]:
    """(status, entries by name, what was removed) as --json tells."""
    status = main(["checkpoints", *map(str, arguments), "--json"])
    told = json.loads(capsys.readouterr().out)
    return status, {entry["name"]: entry for entry in told["checkpoints"]}, told["removed"]


@pytest.fixture
def folder(tmp_path):
    """Four good ones, of which two are then set aside; leftovers; and things of the user's."""
    save_steps(tmp_path, [0, 1, 2, 3, 4])
    root = tmp_path / "checkpoint"
    CheckpointFolder(root).set_aside("step-1", "corrupt")
    CheckpointFolder(root).set_aside("step-2", "superseded")
    for name in (f".tmp-step-5-{HEX}", f".trash-step-1-{HEX}", "mine", ".tmp-mine", "step-3.bak"):
        (root / name).mkdir()
    (root / f".tmp-step-5-{HEX}" / "__0_0.distcp").write_bytes(b"1234567")
    return root


def test_each_entry_has_its_kind_size_digest_and_state(folder, capsys):
    status, entries, removed = listed(capsys, folder.parent)
    assert (status, removed) == (0, [])
    assert {name: entry["kind"] for name, entry in entries.items()} == {
        "step-0": "seed",
        "step-3": "checkpoint",
        "step-4": "checkpoint",
        "step-1.corrupt": "corrupt",
        "step-2.superseded": "superseded",
        f".tmp-step-5-{HEX}": "leftover",
        f".trash-step-1-{HEX}": "leftover",
    }
    good = entries["step-3"]
    assert good["step"] == 3 and good["complete"] is True and good["verified"] is None
    assert good["bytes"] == sum(path.stat().st_size for path in (folder / "step-3").iterdir())
    assert good["config"] == read_manifest(folder / "step-3").files["config.toml"].sha256[:12]
    assert 0 <= good["seconds"] < 600
    part = entries[f".tmp-step-5-{HEX}"]
    assert (part["bytes"], part["complete"], part["step"]) == (7, False, 5)


def test_a_flipped_bit_is_found_with_verify_alone_and_a_missing_file_always(folder, capsys):
    shard = next((folder / "step-3").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, entries, _ = listed(capsys, folder)
    assert status == 0 and entries["step-3"]["verified"] is None
    status, entries, _ = listed(capsys, folder, "--verify")
    assert status == 1 and entries["step-3"]["verified"] is False and entries["step-4"]["verified"] is True
    assert "sha256" in entries["step-3"]["problems"][0]
    shard.unlink()
    status, entries, _ = listed(capsys, folder)
    assert status == 1 and entries["step-3"]["complete"] is False and entries["step-4"]["complete"] is True


def test_prune_removes_what_nothing_is_loaded_from_and_nothing_else(folder, capsys):
    status, entries, removed = listed(capsys, folder, "--prune")
    gone = {"step-1.corrupt", "step-2.superseded", f".tmp-step-5-{HEX}", f".trash-step-1-{HEX}"}
    assert {*removed} == gone and sorted(entries) == ["step-0", "step-3", "step-4"] and status == 0
    assert names(folder.parent) == [".tmp-mine", "mine", "step-0", "step-3", "step-3.bak", "step-4"]


@pytest.mark.parametrize("held", ["the run's folder", "the folder of checkpoints"])
def test_prune_is_refused_while_a_run_lives(held, folder, capsys):
    before = names(folder.parent)
    lock = FolderLock(folder.parent if held == "the run's folder" else folder)
    try:
        assert main(["checkpoints", str(folder), "--prune"]) == 1
        assert "is in use by process" in capsys.readouterr().err
        assert main(["checkpoints", str(folder)]) == 0, "looking is allowed"
        assert [name for name in names(folder.parent) if name != ".lock"] == before
    finally:
        lock.release()


def test_the_table_is_for_people(folder, tmp_path, capsys):
    assert main(["checkpoints", str(folder.parent), "--verify"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step-4 ")]
    assert line.split()[1] == "checkpoint" and line.split()[4:6] == ["yes", "yes"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["checkpoints", str(empty)]) == 0 and "no checkpoint" in capsys.readouterr().out
    assert main(["checkpoints", str(tmp_path / "nothing")]) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["checkpoints", "--verify"], ["checkpoints"], ["verify"]])
def test_what_a_living_run_removes_under_a_look_is_no_damage(command, folder, capsys, monkeypatch):
    """A run commits, renames and removes while this looks; each of these goes as it is looked at."""
    going = ("step-3", f".tmp-step-5-{HEX}")
    verify, rglob = manifest_module.verify, Path.rglob

    def rename(path):
        if path.name in going:
            path.rename(path.with_name(f"now{path.name}"))

    def verify_late(path, **options):
        rename(path)
        return verify(path, **options)

    def glob_late(path, pattern):
        if path.name.startswith("."):
            rename(path)
        return rglob(path, pattern)

    for module in (inventory_module, verify_command):
        monkeypatch.setattr(module, "verify", verify_late)
    monkeypatch.setattr(Path, "rglob", glob_late)
    assert main([command[0], str(folder), *command[1:]]) == 0
    out = capsys.readouterr().out
    assert "step-4" in out and "step-3 " not in out and ".tmp-step-5" not in out
    assert ("step-3: a run has removed" in out) == (command == ["verify"])
    if command == ["verify"]:
        assert "DAMAGED" not in out


def test_a_file_that_is_renamed_under_a_look_is_left_out_of_the_size(folder, capsys, monkeypatch):
    part = folder / f".tmp-step-5-{HEX}"
    (part / ".metadata.tmp").write_bytes(b"123")
    is_file = Path.is_file

    def renamed(path):
        found = is_file(path)
        if path.name == ".metadata.tmp":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", renamed)
    _, entries, _ = listed(capsys, folder)
    assert entries[part.name]["bytes"] == 7
