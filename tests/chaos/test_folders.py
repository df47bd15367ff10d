"""Programs that meet in one folder, and converters killed in theirs: row 30 of docs/reliability.md."""

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.harness import LIMIT, Job
from tests.fork_server import start_python
from torchtitan_rd.checkpoint import verify

# What each reads, and what it must be told beside.
CONVERTERS = {
    "dcp_to_hf": ("step-2",),
    "dcp_to_llama": ("step-2",),
    "hf_to_dcp": ("step-2-hf", "--model", "llama3"),
}
PROGRAM = "import runpy, sys; runpy.run_path(f'convert/{sys.argv.pop(1)}.py', run_name='__main__')"


@pytest.mark.slow
def test_of_two_runs_that_begin_together_in_one_folder_one_trains_and_the_other_is_refused(tmp_path):
    """Five times; the one that trains does not notice."""
    whole = Job(tmp_path / "whole", training__steps=30)
    whole.finish(1)
    for trial in range(5):
        job = Job(tmp_path / str(trial), training__steps=30)
        with job.start(1, ("--slow-steps", "0.1")) as first, job.start(1, ("--slow-steps", "0.1")) as second:
            found = [run.wait(LIMIT) for run in (first, second)]
        codes = [one.codes[0] for one in found]
        assert sorted(codes) == [0, 1], [one.errors[0][-500:] for one in found]
        winner, loser = found[codes.index(0)], found[codes.index(1)]
        assert "is in use by process" in loser.errors[0] and "step: 1 " not in loser.errors[0]
        assert "resuming" not in winner.errors[0] and job.history() == whole.history()
        assert (job.dump / "exit_status.json").read_text().count('"finished"') == 1


# A card and a manifest tell times or places; torch gives each of its `.metadata` an id of its own.
OWN = ("README.md", "manifest.json", ".metadata")


def content(folder: Path) -> str:
    """Names of all files, and the bytes of those that are the same whenever and wherever they are written."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            own = path.read_bytes() if path.name not in OWN else b""
            digest.update(str(path.relative_to(folder)).encode() + own)
        if path.name == "manifest.json":
            assert verify(path.parent) == []
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("converter", CONVERTERS)
def test_a_converter_killed_at_ten_random_moments_leaves_nothing_behind(converter, tmp_path):
    """Its output holds an older conversion, which --force replaces: it is that one or the new one."""
    job = Job(tmp_path, training__steps=2, checkpoint__async_mode="disabled")
    job.finish(1, "--checkpoint.last_save_in_hf")
    name, *more = CONVERTERS[converter]
    source, target = job.dump / "checkpoint" / name, tmp_path / "converted" / "model"
    rng = random.Random(converter)

    def start():
        arguments = (converter, "--input_dir", source, "--output_dir", target, "--force", *more)
        return start_python("-c", PROGRAM, *arguments)

    started = time.monotonic()
    with start() as process:
        assert process.communicate(LIMIT)[1] is not None and process.returncode == 0, process.output()
    seconds, before = time.monotonic() - started, content(source)
    good = content(target)

    killed = 0
    for _ in range(10):
        with start() as process:
            time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            killed += process.wait(LIMIT) == -signal.SIGKILL
        assert content(source) == before
        # Absent only between two renames; the next conversion brings it back then.
        assert not target.exists() or content(target) == good

    with start() as process:
        assert process.wait(LIMIT) == 0, process.output()
    assert killed >= 3, "the attacker was too slow"
    assert content(target) == good
    assert [path.name for path in target.parent.iterdir()] == ["model"]
