"""benchmarks/gpu.sh runs whole on a CPU at tiny sizes, so that it works once there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.record import Record  # noqa: E402
from benchmarks.gpu.steps import of_whole_model  # noqa: E402
from torchtitan_rd.errors import ConfigError  # noqa: E402


def gpu_sh(*arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment_with_this_python()
    )


def environment_with_this_python() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_a_cpu_and_fills_its_table_and_is_not_run_again(tmp_path):
    done = gpu_sh("all", "--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "tiny.json").read_text())["parts"]
    assert set(parts) == {"tests", "attention", "train", "long", "raven", "checkpoint"}
    assert all(row and "failed" not in row for rows in parts.values() for row in rows.values())
    assert parts["attention"]["sdpa, 128"]["error of dq"] < 2e-2
    assert "FA3 needs a Hopper" in parts["attention"]["fa3, 64"]["not here"]
    plain = [
        row for part in ("train", "long", "raven") for name, row in parts[part].items() if "plain" in name
    ]
    measured = [row["of planned"] for row in plain if "of planned" in row]
    assert len(measured) == 7 and all(0.85 < ratio < 1.15 for ratio in measured), measured
    assert len({row["iterations"] for row in parts["raven"].values()}) == 3
    assert parts["tests"]["pytest -m gpu"]["skipped"] > 0
    table = (tmp_path / "tiny.md").read_text()
    assert all(f"# {part}\n" in table for part in ("environment", *parts))

    again = gpu_sh("checkpoint", "attention", "--tiny", "--output", str(tmp_path))
    assert again.returncode == 0 and again.stdout == ""


def test_a_record_goes_on_where_it_was_cut_off_and_tries_failures_again(tmp_path):
    record = Record(tmp_path, "card", {"torch": "1"})
    record.put("train", "good", {"step s": 0.25})
    record.put("train", "bad", {"failed": "out of memory"})
    later = Record(tmp_path, "card", {"torch": "1"})
    assert later.is_done("train", "good") and not later.is_done("train", "bad")
    assert not later.is_done("train", "other") and later.failures() == ["train, bad: out of memory"]
    assert "| good   | 0.25" in later.markdown.read_text()
    assert not Record(tmp_path, "card", {"torch": "2"}).is_done("train", "good"), (
        "another torch, other figures"
    )


def test_a_folder_that_takes_no_file_and_a_file_that_is_no_record_are_said_first(tmp_path):
    (tmp_path / "torn.json").write_text('{"environment": {')
    with pytest.raises(ConfigError, match=r"torn\.json is no JSON"):
        Record(tmp_path, "torn", {"torch": "1"})
    with pytest.raises(ConfigError, match="--output = '/dev/null/tables'"):
        Record(Path("/dev/null/tables"), "card", {"torch": "1"})


def test_a_whole_model_is_extrapolated_from_the_layers_between_two_steps():
    few, many = {"step s": 1.0, "tokens/s": 100.0}, {"step s": 3.0, "tokens/s": 33.0}
    found = of_whole_model(few, many, layers=6)
    assert found["s a layer"] == 0.5 and found["step s"] == 1.0 + 30 * 0.5
    assert found["tokens/s"] == 100 / 16 and found["note"] == "extrapolated"
    assert "failed" in of_whole_model(few, {"failed": "out of memory"}, layers=6)


def test_an_unknown_part_and_a_machine_without_a_gpu_are_one_line(tmp_path):
    assert "unknown argument 'atention'" in gpu_sh("atention").stderr
    done = gpu_sh("attention", "--output", str(tmp_path))
    assert done.returncode == 1 and "there is no GPU here; --tiny" in done.stderr
