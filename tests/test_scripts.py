"""The shell scripts: set-up, launch on one machine, and under a pretended Slurm."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLURM_SCRIPTS = sorted(ROOT.glob("train_*_8B_131k.sh"))


def run(
    command: list[str], cwd: Path = ROOT, timeout: float = 200, **variables: str
) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.global_batch_size=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
]


def folder_of_spikes(folder: Path) -> Path:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    counts = np.random.default_rng(0).poisson(0.3, (20, 200)).astype(np.uint8).tolist()
    table = pa.table({"spike_counts": pa.array([counts] * 4, type=pa.list_(pa.list_(pa.uint8())))})
    pq.write_table(table, folder / "train.parquet")
    return folder


def in_terminal(command: list[str], ready, key: bytes, timeout: float = 120) -> tuple[int, str]:
    """(exit code, output) of a command that runs in a terminal of its own,
    in which `key` is typed once `ready()`.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvpe(command[0], command, {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
    output, is_typed, deadline = b"", False, time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                output += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        if not is_typed and ready():
            os.write(terminal, key)
            is_typed = True
    else:
        os.kill(pid, signal.SIGTERM)  # passed on to the ranks, which a SIGKILL would leave behind
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace")


def has_rows(folder: Path, count: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= count


@pytest.mark.parametrize(
    "script", [pytest.param("train_debug.sh", marks=pytest.mark.slow), "train_primate_8B_131k.sh"]
)
def test_ctrl_c_in_a_terminal_saves_and_the_same_command_goes_on(script, tmp_path):
    """As a user types it: the terminal signals the whole foreground group, through bash,
    torchrun and both ranks.
    """
    command = ["bash", script, *SMALL, f"--job.dump_folder={tmp_path}", "--training.steps=100000"]
    if script != "train_debug.sh":
        spikes = folder_of_spikes(tmp_path / "spikes")
        command += ["--model.flavor=debug", f"--training.dataset_path={spikes}"]
    code, output = in_terminal(command, lambda: has_rows(tmp_path, 3), b"\x03")
    assert code == 0, output
    assert "finishing this step" in output and "the same command goes on from there" in output
    status = json.loads((tmp_path / "exit_status.json").read_text())
    stopped_at = status["step"]
    assert status["status"] == "preempted"
    assert (tmp_path / "checkpoint" / f"step-{stopped_at}" / "manifest.json").exists()

    again = run([*command, f"--training.steps={stopped_at + 2}"])
    assert again.returncode == 0 and f"resuming after step {stopped_at} of {stopped_at + 2}" in again.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, stopped_at + 3))
    assert rows[-1]["tokens_seen"] == (stopped_at + 2) * 2 * 16, "two ranks with a sequence of 16 each"


# Where torchrun would be: it starts a rank in a session of its own, passes the first signal on,
# and dies of a second.
FALSE_RANK = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
open(sys.argv[1], "w").close()
deadline = time.monotonic() + 20
while len(heard) < int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.02)
print("a rank that heard", len(heard), flush=True)
"""
FALSE_TORCHRUN = """
import os, signal, subprocess, sys
told = []
def on_term(number, frame):
    told.append(1)
    rank.send_signal(signal.SIGTERM) if len(told) == 1 else os._exit(99)
signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGINT, on_term)
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
rank.wait()
print("torchrun was told", len(told), flush=True)
"""


# As Slurm's own (src/srun/libsrun/srun_job.c): passes USR1 and USR2 on, and has all tasks killed at a TERM.
FALSE_SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
task = subprocess.Popen(command, start_new_session=True)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, lambda *_: os.killpg(task.pid, signal.SIGKILL))
signal.signal(signal.SIGINT, lambda *_: None)
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: task.send_signal(number))
sys.exit(task.wait())
"""


def with_false_torchrun(folder: Path, signals: int, nodes: int = 1) -> tuple[list[str], Path]:
    """(a command that launches a rank which waits for so many signals, on several nodes under a srun that
    starts one of them; the file that the rank makes once it listens).
    """
    (folder / "rank.py").write_text(FALSE_RANK)
    (folder / "torchrun.py").write_text(FALSE_TORCHRUN)
    (folder / "srun.py").write_text(FALSE_SRUN)
    program = f"{sys.executable} {folder}/torchrun.py {folder}/rank.py {folder}/ready {signals}"
    script = f"""
        source scripts/launch.sh
        python() {{
            [ "$2" != torch.distributed.run ] || exec {program}
            [ "$2" != torchtitan_rd ] || echo {folder}
        }}
        export -f python
        srun() {{ exec {sys.executable} {folder}/srun.py "$@"; }}
        scontrol() {{ echo n; }}
        _ranks_per_node() {{ echo 1; }}
        [ {nodes} = 1 ] || SLURM_NNODES={nodes} SLURM_JOB_ID=1
        launch x.toml
    """
    return ["bash", "-c", script], folder / "ready"


@pytest.mark.parametrize(
    ("number", "nodes"),
    [
        *((number, 1) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)),
        *((signal.SIGTERM, nodes) for nodes in (1, 2)),
    ],
)
def test_torchrun_hears_one_signal_and_its_ranks_hear_all(number, nodes, tmp_path):
    command, ready = with_false_torchrun(tmp_path, 3, nodes)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(3):
        time.sleep(0.3)
        process.send_signal(number)
    output, error = process.communicate(timeout=40)
    assert output == "a rank that heard 3\ntorchrun was told 1\n"
    assert process.returncode == 130 and "stopped by a signal before the run began" in error


def test_a_signal_while_torchrun_is_being_started_ends_it_too():
    """The shell would otherwise die of it and leave torchrun alone."""
    script = """
        source scripts/launch.sh
        set() { builtin set "$@"; [ "$1" != -m ] || kill -USR1 $$; }  # just before torchrun
        python() { [ "$2" != torch.distributed.run ] || exec sleep 20; }
        _ranks_per_node() { echo 1; }
        launch x.toml
    """
    started = time.monotonic()
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 130 and "stopped by a signal before the run began" in done.stderr
    assert time.monotonic() - started < 15, "torchrun was told"


def test_a_terminal_s_ctrl_c_comes_to_torchrun_once(tmp_path):
    """Through the script alone: a second one, from the terminal itself, would end torchrun
    before its ranks.
    """
    command, ready = with_false_torchrun(tmp_path, 1)
    code, output = in_terminal(command, ready.exists, b"\x03", timeout=40)
    assert "a rank that heard 1" in output and "torchrun was told 1" in output and code == 130, output


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for Slurm's commands and for torchrun; what they were asked is in `calls`."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    (bin_folder / "scontrol").write_text(
        f'#!/bin/bash\necho "scontrol $*" >> {calls}\n[ "$1" = show ] && echo node7\nexit 0\n'
    )
    # srun runs what it is given once. `python` pretends to be torchrun, and answers the question for the dump
    # folder, unless the real command is asked.
    (bin_folder / "srun").write_text(
        f'#!/bin/bash\necho "srun $*" >> {calls}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    (bin_folder / "python").write_text(
        f"""#!/bin/bash
if [ "$2" = torch.distributed.run ]; then
    echo "{{\\"status\\": \\"$PRETENDED_STATUS\\"}}" > {tmp_path}/dump/exit_status.json
    exit $PRETENDED_CODE
elif [ "$2" = torchtitan_rd ] && [ -z "$ASKS_THE_CONFIG" ]; then
    echo {tmp_path}/dump
    exit
fi
exec {sys.executable} "$@"
"""
    )
    for path in bin_folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "dump").mkdir()

    def submit(status: str, code: int, asks_the_config: str = "") -> tuple[int, str]:
        found = run(
            ["bash", "train_primate_8B_131k.sh", f"--job.dump_folder={tmp_path / 'dump'}"],
            PATH=f"{bin_folder}:{os.environ['PATH']}",
            SLURM_JOB_ID="4711",
            SLURM_NNODES="36",
            SLURM_JOB_NODELIST="node[7-42]",
            SLURM_SUBMIT_DIR=str(ROOT),
            GPUS_PER_NODE="4",
            PRETENDED_STATUS=status,
            PRETENDED_CODE=str(code),
            ASKS_THE_CONFIG=asks_the_config,
        )
        return found.returncode, calls.read_text()

    return submit


def test_under_slurm_every_node_joins_the_rendezvous_of_the_first(cluster):
    code, calls = cluster("finished", 0, asks_the_config="yes")
    assert code == 0
    assert "--nnodes 36 --nproc_per_node 4" in calls and "--rdzv_id 4711" in calls
    assert "--rdzv_endpoint node7:24711" in calls and "requeue" not in calls
    one_a_node = "--nodes=36 --ntasks=36 --ntasks-per-node=1 "
    assert one_a_node in calls, "a job of salloc may have asked for a task a GPU"
    assert "--export=ALL " in calls, "srun follows the --export=NONE of a job, which tasks must not"


def test_a_script_that_is_requeued_goes_on_in_its_own_output():
    for script in ROOT.glob("train_*.sh"):
        text = script.read_text()
        assert ("#SBATCH --requeue" in text) == ("#SBATCH --open-mode=append" in text), script.name


def test_only_a_preempted_job_is_requeued(cluster):
    code, calls = cluster("preempted", 1)
    assert code == 0 and "scontrol requeue 4711" in calls


PREEMPTED = """
    source scripts/launch.sh
    scontrol() { echo "scontrol $*"; return ${REFUSED:-0}; }
    _end_of preempted 1
"""
IN_A_JOB = "export SLURM_JOB_ID=4711; "


def test_a_task_of_an_array_requeues_itself_alone():
    """The task whose own number is that of the array would requeue all tasks by it."""
    found = run(["bash", "-c", IN_A_JOB + "SLURM_ARRAY_JOB_ID=4711 SLURM_ARRAY_TASK_ID=3" + PREEMPTED])
    assert found.returncode == 0 and found.stdout == "scontrol requeue 4711_3\n"


def test_a_job_that_slurm_does_not_requeue_does_not_end_as_if_it_were_done():
    found = run(["bash", "-c", IN_A_JOB + "REFUSED=1" + PREEMPTED])
    assert found.returncode == 1 and "submit the same command again" in found.stderr


def test_a_ctrl_c_within_an_interactive_job_does_not_requeue_what_else_runs_in_it():
    code, output = in_terminal(["bash", "-c", IN_A_JOB + PREEMPTED], lambda: False, b"")
    assert code == 0 and "the same command goes on from there" in output and "scontrol" not in output


def test_ranks_are_the_gpus_that_may_be_used_and_not_all_of_the_machine():
    """nvidia-smi does not know CUDA_VISIBLE_DEVICES, and lists the parts of a GPU (MIG) beside it."""
    stand_ins = """
        source scripts/launch.sh
        nvidia-smi() { printf 'GPU %d\\n' {0..7}; }
        python() { echo 2; }
        _ranks_per_node
    """
    assert run(["bash", "-c", stand_ins]).stdout == "2\n"


def test_a_script_finds_the_repository_from_a_session_that_began_elsewhere_and_as_slurm_s_copy(tmp_path):
    """SLURM_SUBMIT_DIR is where sbatch was called, or salloc, in whose shell a script may be run by hand.
    With a profile that is not there it starts nothing.
    """
    repository, elsewhere = tmp_path / "re po", tmp_path / "else"
    (repository / "scripts").mkdir(parents=True)
    elsewhere.mkdir()
    (repository / "scripts" / "env.sh").write_text('echo "$PWD"; [ -n "$CLUSTER_PROFILE" ] || exit 0\n')
    (repository / "scripts" / "launch.sh").write_text("launch() { echo launched; }\n")
    (elsewhere / "torchrun").write_text("#!/bin/bash\necho launched\n")
    shutil.copy(elsewhere / "torchrun", elsewhere / "python")
    stand_ins = f"export PATH={elsewhere}:$PATH; chmod +x {elsewhere}/*; "
    (elsewhere / "env.sh").write_text("exit 9\n")
    for script in ROOT.glob("*.sh"):
        if "#SBATCH" not in script.read_text():
            continue
        for place, submitted in ((repository, elsewhere), (elsewhere, repository)):
            copy = shutil.copy(script, place)
            found = run(["bash", str(copy)], cwd=elsewhere, SLURM_SUBMIT_DIR=str(submitted))
            assert found.stdout == f"{repository}\n", (script.name, place, found.stderr)

        slow = {"CLUSTER_PROFILE": "scripts/profiles/slingsot.sh"}
        found = run(["bash", "-c", f"{stand_ins}bash '{repository / script.name}'"], **slow)
        assert found.returncode == 1 and "slingsot.sh: No such file" in found.stderr, script.name
        assert "launched" not in found.stdout, "NCCL would find a network that is many times slower"

        lost = run(["bash", str(copy)], cwd=elsewhere, SLURM_SUBMIT_DIR=str(elsewhere))
        assert lost.returncode == 1 and lost.stderr.count("\n") == 1 and "scripts/env.sh" in lost.stderr


def test_a_job_that_was_stopped_without_a_checkpoint_is_not_requeued(cluster):
    code, calls = cluster("stopped", 1)
    assert code == 130 and "requeue" not in calls


@pytest.mark.parametrize("code", [1, 9])
def test_a_failed_job_is_not_requeued_and_its_exit_code_is_passed_on(cluster, code):
    returned, calls = cluster("failed", code)
    assert returned == code and "requeue" not in calls


@pytest.mark.parametrize("script", SLURM_SCRIPTS, ids=lambda path: path.name)
def test_each_131k_script_has_the_slurm_header_of_the_ancestor_without_its_account(script):
    text = script.read_text()
    nodes = {"synthetic_primate": 21, "synthetic": 12}.get(
        script.stem.removeprefix("train_").removesuffix("_8B_131k"), 36
    )
    for line in (
        f"--nodes={nodes}",
        "--gpus-per-node=4",
        "--time=6:00:00",
        "--cpus-per-task=288",
        "--ntasks-per-node=1",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "account" not in text


def test_each_script_for_the_cluster_of_gh200_asks_for_the_cores_of_a_node():
    for script in ROOT.glob("train_*.sh"):
        text = script.read_text()
        assert ("GH200" in text) == ("#SBATCH --cpus-per-task=288\n" in text), script.name


def test_set_up_refuses_an_old_python_by_name(tmp_path):
    for name in ("pyproject.toml", "constraints.txt", "scripts"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "old").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "old" / name).write_text("#!/bin/bash\nexit 1\n")
        (tmp_path / "old" / name).chmod(0o755)
    found = run(
        ["bash", "-c", "source scripts/env.sh"],
        cwd=tmp_path,
        PATH=f"{tmp_path / 'old'}:/usr/bin:/bin",
        PYTHON="python3",
    )
    assert found.returncode == 1
    assert "older than Python 3.10" in found.stderr and not (tmp_path / ".venv").exists()


def test_set_up_is_instant_where_the_package_is_installed():
    found = run(
        ["bash", "-c", "source scripts/env.sh && python -c 'import torchtitan_rd'"], EXTRAS="dev", timeout=20
    )
    assert found.returncode == 0 and found.stderr == ""


WITHOUT_MATPLOTLIB = f"""#!/bin/bash
[ "$2" = - ] || exec {sys.executable} "$@"
{{ cat <<'PY'
import importlib.metadata
known = importlib.metadata.distribution
def distribution(name):
    if name == "matplotlib":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.distribution = distribution
PY
cat; }} | {sys.executable} "$@"
"""


@pytest.mark.parametrize(("extras", "code"), [("", 0), ("plots", 1)])
def test_a_script_that_draws_sets_up_what_it_draws_with_before_anything_else(tmp_path, extras, code):
    """The active environment has the package without matplotlib, and no interpreter is there for another."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(WITHOUT_MATPLOTLIB)
    python.chmod(0o755)
    found = run(
        ["bash", "-c", f"PATH={python.parent}:$PATH; source scripts/env.sh; echo on"],
        cwd=tmp_path,
        PYTHON="false",
        EXTRAS=extras,
    )
    assert found.returncode == code and ("on" in found.stdout) == (code == 0)
    assert ("is missing or older" in found.stderr) == (code == 1)


# What launch.sh leaves in the environment of torchrun, here a program that prints it.
SHOW = """
source scripts/launch.sh
python() {
  if [ "$2" = torch.distributed.run ]; then env; echo "open files $(ulimit -Sn)"; else echo /nowhere; fi
}
export -f python
_ranks_per_node() { echo 4; }
"""


def launched_with(before: str = "", nodes: int = 1, **variables: str) -> tuple[dict[str, str], str]:
    """(environment of torchrun with "open files", what launch.sh said) after the commands
    `before` in that shell.
    """
    own = (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_HIP_ALLOC_CONF",
        "NCCL_DEBUG",
        "NCCL_CROSS_NIC",
    )
    start = f"unset {' '.join(own)} NCCL_NET_GDR_LEVEL NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME SLURM_JOB_ID; "
    start += " ".join(f"export {name}={value};" for name, value in variables.items())
    many = f"SLURM_NNODES={nodes} SLURM_JOB_ID=1; "
    many += 'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }; scontrol() { echo n; }'
    found = run(["bash", "-c", f"{start}\n{before}\n{SHOW}\n{many if nodes > 1 else ''}\nlaunch x.toml"])
    lines = dict(line.split("=", 1) for line in found.stdout.splitlines() if "=" in line)
    limit = [line.split()[-1] for line in found.stdout.splitlines() if line.startswith("open files")]
    return lines | {"open files": limit[0]}, found.stderr


def test_a_status_that_cannot_be_removed_ends_a_start_and_is_not_taken_for_this_run_s():
    """As of a folder that is read-only now: the run would fail, and the status of the last
    one be believed.
    """
    said = "rm: cannot remove 'exit_status.json': Read-only file system"
    stand_ins = """
        python() {
            case "$*" in
                *distributed.run*) echo started; return 1 ;;
                *config*) echo dump ;;
                *) echo finished ;;
            esac
        }
        rm() { echo "$SAID" >&2; return 1; }
    """
    found = run(["bash", "-c", f"{stand_ins}\nsource scripts/launch.sh\nNPROC=2 launch x.toml"], SAID=said)
    assert found.returncode == 1 and said in found.stderr and "started" not in found.stdout


def test_every_run_has_the_settings_that_every_run_wants():
    environment, said = launched_with()
    assert (
        environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        and environment["NCCL_DEBUG"] == "WARN"
    )
    assert "NCCL_CROSS_NIC" not in environment and said == ""


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_a_user_s_allocator_settings_stand_by_whichever_name(name):
    environment, _ = launched_with(**{name: "max_split_size_mb:512", "NCCL_DEBUG": "INFO"})
    assert {key: value for key, value in environment.items() if key.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:512"
    }
    assert environment["NCCL_DEBUG"] == "INFO"


def test_a_profile_adds_its_cluster_s_settings_and_leaves_those_of_the_user():
    profile = "source scripts/profiles/slingshot.sh"
    environment, _ = launched_with(profile, NCCL_SOCKET_IFNAME="eth7", NCCL_NET_GDR_LEVEL="")
    assert environment["GLOO_SOCKET_IFNAME"] == "hsn0" and environment["NCCL_CROSS_NIC"] == "1"
    assert environment["NCCL_SOCKET_IFNAME"] == "eth7" and environment["NCCL_NET_GDR_LEVEL"] == ""
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_on_several_nodes_each_attempt_has_its_own_store_and_srun_has_the_cores_of_the_job():
    alone, _ = launched_with(SLURM_CPUS_PER_TASK="72")
    assert not {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "SRUN_CPUS_PER_TASK"} & alone.keys()
    many, _ = launched_with(nodes=2, SLURM_CPUS_PER_TASK="72")
    assert (many["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"], many["SRUN_CPUS_PER_TASK"]) == ("1", "72")
    a_task_a_gpu, _ = launched_with(nodes=2, SLURM_CPUS_PER_TASK="9", SLURM_NTASKS="8")
    assert a_task_a_gpu["SRUN_CPUS_PER_TASK"] == "36", "the one task of a node has the cores of four"
    chosen, _ = launched_with(nodes=2, SLURM_CPUS_PER_TASK="72", SRUN_CPUS_PER_TASK="8")
    assert chosen["SRUN_CPUS_PER_TASK"] == "8"


def test_the_limit_of_open_files_is_raised_to_what_is_allowed():
    environment, said = launched_with("ulimit -Sn 300; ulimit -Hn 900")
    assert environment["open files"] == "900" and said == ""


@pytest.mark.parametrize("hard", ["unlimited", "1073741816"])
def test_no_process_is_allowed_more_than_a_million_open_files(hard):
    pretended = f"""
ulimit() {{
    if [ $# = 2 ]; then echo "raised to $2" >&2; elif [ "$1" = -Hn ]; then echo {hard}; else echo 1024; fi
}}"""
    _, said = launched_with(pretended)
    assert said == "raised to 1048576\n"


def test_a_limit_of_open_files_that_the_ranks_exceed_is_said_beforehand():
    environment, said = launched_with("ulimit -Sn 1024; ulimit -Hn 1024", nodes=1024)
    assert environment["open files"] == "1024"
    assert "may open 1024 files here, and 4096 ranks need about 12800 each" in said
    _, said = launched_with("ulimit -Sn 1024; ulimit -Hn 1024", nodes=32)
    assert said == ""


def test_under_slurm_the_raised_limit_holds_on_every_node(cluster):
    _, calls = cluster("finished", 0)
    assert "srun --propagate=NOFILE " in calls


@pytest.mark.slow
def test_the_recurrent_demo_trains_and_shows_what_its_policy_does_to_the_held_out_text(tmp_path):
    pytest.importorskip("matplotlib")
    small = ["--training.seq_len=32", "--training.local_batch_size=1", "--training.global_batch_size=2"]
    small += ["--training.steps=4", "--lr_scheduler.warmup_steps=1", "--lr_scheduler.cooldown_steps=1"]
    small += ["--validation.sequences=2", "--metrics.log_freq=1"]
    found = run(
        ["bash", "train_recurrent_demo.sh", *small, f"--job.dump_folder={tmp_path}"], timeout=500, DEPTH="5"
    )
    assert found.returncode == 0, found.stderr
    assert "latest-m4: replayed with all tokens leaving early" in found.stdout
    [chosen] = json.loads((tmp_path / "pareto.json").read_text())["chosen"]
    assert 1 <= chosen["steps"] <= 5 and chosen["replayed_steps"] <= 8

    # Bytes of a model of 4 steps may be anything, an end of the text too: the figures tell that it wrote.
    assert "iterations a token" in found.stderr
    page = (tmp_path / "report.html").read_text()
    assert "Validation loss per depth" in page and "<figcaption>pareto.png</figcaption>" in page
    assert f"{tmp_path}/policy.toml" in found.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("status", "failing", "code", "commands"),
    [
        ("finished", "none", 0, ["pareto", "generate", "report"]),
        ("finished", "pareto", 3, ["pareto"]),
        ("finished", "generate", 3, ["pareto", "generate"]),
        ("preempted", "none", 0, []),
    ],
)
def test_a_run_is_judged_once_it_is_finished_and_only_as_long_as_nothing_fails(
    status, failing, code, commands
):
    stand_ins = f"""
        source scripts/launch.sh
        source scripts/judge.sh
        _status_of() {{ echo {status}; }}
        python() {{
            [ "$3" != config ] || {{ echo dump; return; }}
            echo "ran $3"
            [ "$3" != {failing} ] || return 3
        }}
        judge x.toml --training.steps=4
    """
    found = run(["bash", "-c", stand_ins])
    assert found.returncode == code
    ran = [line.split()[1] for line in found.stdout.splitlines() if line.startswith("ran ")]
    assert ran == commands
    assert ("dump/report.html" in found.stdout) == (ran == ["pareto", "generate", "report"])
