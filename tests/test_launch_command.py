"""`torchtitan-rd launch`: the script of a job, its chain, and profiles of clusters."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_rd.__main__ import main
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.slurm import Job, as_time, minutes_of, profiles, read_profile

ROOT = Path(__file__).parent.parent
KEYS = ["--training.local_batch_size=1", "--training.global_batch_size=736"]  # for 1 to 92 nodes of 8
KEYS += ["--training.seq_len=16", "--model.overrides.dim=32", "--model.overrides.n_layers=1"]
DEBUG = ["launch", str(ROOT / "train_configs" / "debug.toml"), *KEYS]
GPUS = ["--profile", "arch-gh200"]
ALL = ["arch-gh200", "frontier-mi250x", "generic-slurm", "laptop"]


def printed(capsys, *arguments: str) -> str:
    assert main([*DEBUG, *arguments, "--dry_run"]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert main([*DEBUG, *arguments]) == 1
    return capsys.readouterr().err


def test_a_dry_run_is_a_script_that_slurm_requeues_signals_and_limits(capsys):
    script = printed(
        capsys, *GPUS, "--nodes=2", "--time=90", "--training.steps", "7", "--sbatch=--qos=a", "--name=my run"
    )
    header = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--time=1:30:00"} <= set(header)
    assert {"--requeue", "--signal=B:TERM@300", "--open-mode=append", "--partition=batch"} <= set(header)
    assert "'--job-name=my run'" in header, "one word for sbatch"
    assert header[-1] == "--qos=a", "the user's option wins over the profile's"
    assert script.splitlines()[-1] == f"launch {' '.join(DEBUG[1:])} --training.steps 7"
    assert "REQUEUE" not in script, "a job alone is requeued"


def test_the_header_holds_the_plan_s_estimate(capsys):
    script = printed(capsys, *GPUS, "--nodes", "2", "--time", "90", "--mfu", "0.25", "--training.steps=7")
    remarks = [line for line in script.splitlines() if line.startswith("# ")]
    assert "launch" in remarks[0]
    assert "8 x gh200-96" in remarks[1] and "of 94.5 GiB a GPU, fits" in remarks[1]
    assert remarks[2].startswith("# 7 steps, ") and "MFU 0.25 (as given)" in remarks[2]
    assert remarks[3] == "# 1 of the 1 jobs of 1:30:00 that this takes"
    assert "a checkpoint: " in remarks[4]


def test_a_card_that_has_no_name_is_planned_by_its_figures(capsys):
    figures = ["--gpu_memory_gb", "48", "--gpu_tflops", "100"]
    script = printed(capsys, "--profile", "generic-slurm", "--nodes", "1", "--time", "60", *figures)
    remarks = [line for line in script.splitlines() if line.startswith("# ")]
    assert "4 x this card" in remarks[1] and "of 48.0 GiB a GPU, fits" in remarks[1]


def test_what_does_not_fit_is_said_and_not_submitted(capsys):
    # 16384 sequences of 2048 tokens on a GPU: 32 GiB of logits in float32, of 258 bytes each.
    big = [*DEBUG, *GPUS, "--training.local_batch_size=16384", "--training.global_batch_size=65536"]
    big += ["--training.seq_len=2048"]
    assert main([*big, "--dry_run"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(big) == 1
    assert "DOES NOT FIT" in (said := capsys.readouterr().err) and "--anyway" in said


@pytest.mark.parametrize("name", ALL)
def test_every_profile_makes_a_script_that_bash_parses(name, capsys):
    assert name in profiles() and "slingshot" not in profiles()
    slurm = [] if name == "laptop" else ["--nodes", "2", "--time", "60", "--chain", "2"]
    script = printed(capsys, "--profile", name, *slurm)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert ("#SBATCH" in script) == (name != "laptop")
    assert f"scripts/profiles/{name}.sh" in script
    if shutil.which("shellcheck"):
        checked = ["shellcheck", "-", str(ROOT / "scripts" / "profiles" / f"{name}.sh")]
        found = subprocess.run(checked, input=script, text=True, capture_output=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ALL)
def test_each_variable_of_a_profile_has_its_reason_and_leaves_the_user_s(name):
    exports = [
        line
        for line in (ROOT / "scripts" / "profiles" / f"{name}.sh").read_text().splitlines()
        if line.startswith("export")
    ]
    assert exports
    for line in exports:
        variable = line.removeprefix("export ").split("=")[0]
        assert line.startswith(f"export {variable}=${{{variable}-") and "}  # " in line


def test_without_slurm_bash_takes_the_place_of_the_command_so_that_signals_reach_it(tmp_path, monkeypatch):
    """Python in between would kill bash at a Ctrl-C, and be killed alone by a TERM."""
    bash = tmp_path / "bash"
    bash.write_text(f"#!/bin/sh\n(echo $$; grep SigIgn /proc/$$/status) > {tmp_path}/said\nexit 7\n")
    bash.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pid = os.fork()
    if pid == 0:
        try:
            main([*DEBUG, "--profile", "laptop"])
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    said = (tmp_path / "said").read_text().split()
    assert said[0] == str(pid)
    assert not int(said[2], 16) & 1 << signal.SIGPIPE - 1


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch: what it was asked is in `calls`, the script in `script`; jobs are 101, 102."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text(
        f"""#!/bin/bash
echo "$*" >> {tmp_path}/calls
cat > {tmp_path}/script
count=$(wc -l < {tmp_path}/calls)
[ "$count" -le "${{MOST:-9}}" ] || {{ echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
echo "$((100 + count));cluster"
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


def test_a_chain_waits_job_for_job_and_is_not_requeued(sbatch, capsys):
    arguments = [*GPUS, "--time", "60", "--chain", "3", "--dependency", "afterok:7"]
    assert main([*DEBUG, *arguments]) == 0
    assert capsys.readouterr().out == "submitted: 101, 102, 103\n"
    assert (sbatch / "calls").read_text().splitlines() == [
        "--parsable --dependency=afterok:7",
        "--parsable --dependency=afterany:101",
        "--parsable --dependency=afterany:102",
    ]
    assert "export REQUEUE=0" in (sbatch / "script").read_text()


def test_a_budget_becomes_jobs_of_the_longest_time_that_so_many_nodes_may_have(sbatch, capsys):
    frontier = ["--profile", "frontier-mi250x", "--nodes", "92", "--gpu", "mi250x", "--budget", "1-01:00:00"]
    assert main([*DEBUG, *frontier, "--array"]) == 0
    assert capsys.readouterr().out == "submitted: 101\n"
    script = (sbatch / "script").read_text()
    assert "#SBATCH --time=6:00:00\n" in script and "#SBATCH --array=1-5%1\n" in script, "25 h in jobs of 6 h"
    assert "%x_%A_%a.out" in script


def test_jobs_that_were_submitted_are_named_where_a_later_one_is_refused(sbatch, capsys, monkeypatch):
    monkeypatch.setenv("MOST", "2")
    said = refused(capsys, *GPUS, "--time", "60", "--chain", "3")
    assert "QOSMaxSubmitJobPerUserLimit" in said and "submitted were 101, 102" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "arch-gh20"], "did you mean"),
        ([*GPUS, "--time", "7:00:00"], "allows 1 nodes 6:00:00 a job"),
        ([*GPUS, "--time", "8"], "5 minutes before its end"),
        ([*GPUS, "--chain", "2", "--budget", "90"], "pass one"),
        ([*GPUS, "--array"], "--array has no effect"),
        (["--profile", "generic-slurm"], "--time is missing"),
        (["--profile", "laptop", "--nodes", "2"], "without Slurm"),
        ([*GPUS, "--parallelism.data_parallel_shard_degree", "3"], "data_parallel_shard_degree"),
    ],
)
def test_a_mistake_is_one_error_before_anything_is_submitted(sbatch, capsys, arguments, said):
    assert said in refused(capsys, *arguments)
    assert not (sbatch / "calls").exists()


def test_without_sbatch_the_error_says_where_to_call_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in refused(capsys, *GPUS, "--time", "60")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("6:00:00", 360), ("1-12", 2160), ("1-0:30", 1470), ("2-00:00:01", 2881)],
)
def test_times_are_read_as_sbatch_reads_them(text, minutes):
    assert minutes_of(text) == minutes
    assert minutes_of(as_time(minutes)) == minutes


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "-5"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError):
        minutes_of(text)


def test_a_wrong_line_of_a_profile_is_named(tmp_path):
    (tmp_path / "ours.sh").write_text("#LAUNCH card=h200\n#LAUNCH gpus=4\n")
    with pytest.raises(ConfigError, match=r"gpus=4.*gpus_per_node"):
        read_profile(str(tmp_path / "ours.sh"))


@pytest.mark.parametrize(("jobs", "requeues"), [(1, True), (2, False)])
def test_the_script_runs_under_slurm_and_only_a_job_without_a_next_one_is_requeued(tmp_path, jobs, requeues):
    """With stand-ins for srun, scontrol and torchrun, of which the last leaves a run that was preempted."""
    calls, dump, stand_ins = tmp_path / "calls", tmp_path / "dump", tmp_path / "bin"
    stand_ins.mkdir()
    dump.mkdir()
    programs = {
        "scontrol": f'echo "scontrol $*" >> {calls}; [ "$1" != show ] || echo node7',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "python": f"""if [ "$2" = torch.distributed.run ]; then
    echo "NCCL_NET=$NCCL_NET $*" >> {calls}
    echo '{{"status": "preempted"}}' > {dump}/exit_status.json; exit 1
elif [ "$2" = torchtitan_rd ]; then echo {dump}; exit; fi
exec {sys.executable} "$@" """,
    }
    for name, body in programs.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    profile = read_profile("arch-gh200")
    script = Job("it", profile, 2, 60, ("x.toml", "--training.steps", "7"), tmp_path, (), jobs).script()
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = {**os.environ, **slurm, "PATH": f"{stand_ins}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script, text=True, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = calls.read_text()
    assert "NCCL_NET=ofi" in said and "--nnodes 2 --nproc_per_node 4" in said
    assert said.count("--training.steps 7") == 1 and "--job.config_file x.toml" in said
    assert ("scontrol requeue 4711" in said) == requeues
    assert ("the next job of the chain" in done.stderr) == (not requeues)
