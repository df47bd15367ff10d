"""torchtitan-rd doctor: what it says is so, it does not hang, and it leaves nothing behind."""

import http.server
import importlib.util
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from tests.test_scripts import ROOT, run
from torchtitan_rd import preflight
from torchtitan_rd.commands import doctor
from torchtitan_rd.diagnosis import device, disk, hub, ranks, software, surroundings
from torchtitan_rd.diagnosis.finding import Finding, Mark
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment

CPU = torch.device("cpu")
ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")


@pytest.fixture
def quick(monkeypatch):
    """Without the half minute of a compiler, and with a small file for the disk."""
    compiled = Finding(Mark.GOOD, "torch.compile", "stands for the real one")
    monkeypatch.setattr(device, "look_at_compile", lambda seconds: compiled)
    monkeypatch.setattr(surroundings, "measure", lambda folder: disk.measure(folder, 1 << 20))


def test_the_page_of_this_machine_says_what_works_and_leaves_nothing(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert doctor.main(["--folder", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    lines = {line.split()[1]: line for line in page.splitlines() if line[:4] in ("  ok", "  --", "  !!")}
    assert lines["torch"].startswith("  ok") and torch.__version__ in lines["torch"]
    assert lines["sdpa"].startswith("  ok") and "right forward and backward" in lines["sdpa"]
    assert lines["flex"].startswith("  --") and "CUDA only" in lines["flex"]
    assert lines["hub"].startswith("  --") and "HF_HUB_OFFLINE is set" in lines["hub"]
    assert "SLURM_JOB_ID=4711" in lines["Slurm"]
    assert "HF_TOKEN=***" in page and "hf_secret" not in page
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_computes_wrongly_stands_in_the_way(quick, tmp_path, capsys, monkeypatch):
    def wrong(*arguments):
        raise ConfigError("model.attention_backend: sdpa on cpu is wrong: relative errors 1.0")

    monkeypatch.setattr(device, "probe", wrong)
    assert doctor.main(["--folder", str(tmp_path), "--hub-seconds", "1"]) == 1
    assert "  !!  sdpa" in capsys.readouterr().out


def test_a_checkpoint_is_reckoned_from_the_parameters_and_the_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "measure", lambda folder: disk.Speed(2e9, 3e9))
    _, estimate = surroundings.look_at_disk(tmp_path, 6_981_685_248)
    assert "6,981,685,248 parameters: 83.8 GB, 42 s from one process" in estimate.found
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda place: type("", (), {"free": 80 * 10**9})())
    _, estimate = surroundings.look_at_disk(tmp_path, 6_981_685_248)
    assert estimate.mark is Mark.WRONG and "0 fit in the 80 GB" in estimate.found


def test_doctor_takes_folder_and_parameters_from_a_file_with_its_overrides():
    path = str(ROOT / "train_configs" / "primate_8b_131k.toml")
    chosen, rest = doctor._parser().parse_known_args([path, "--job.dump_folder=/elsewhere"])
    assert doctor._run_of(chosen, rest, ALONE) == (Path("/elsewhere"), 6_981_685_248)


def test_overrides_without_a_file_are_refused():
    with pytest.raises(ConfigError, match=r"--model\.flavor=8B"):
        doctor.main(["--model.flavor=8B"])


def test_the_disk_is_measured_with_a_file_that_is_gone_afterwards(tmp_path):
    speed = disk.measure(tmp_path, 1 << 20)
    assert speed.write > 0 and speed.read > 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["a file/below", "a file"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(place, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match=r"job\.dump_folder = .*a file.* is a file, not a folder"):
        disk.check_writable(tmp_path / place, "job.dump_folder")


def test_a_folder_that_takes_no_file_is_named_with_the_reason(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"job\.dump_folder = .* cannot be written: Permission denied"):
        disk.check_writable(tmp_path / "new", "job.dump_folder")


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path):
    assert "GiB are free" in disk.check_writable(tmp_path / "a" / "b", "job.dump_folder")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def endpoint(monkeypatch):
    """number of a port -> that is the hub's."""
    for name in ("http_proxy", "HTTP_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return lambda port: monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")


def test_a_hub_that_answers_is_reachable(endpoint):
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api/models?limit=1" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint(server.server_port)
        assert hub.why_unreachable(5.0) is None


def test_a_hub_that_never_answers_is_given_up_in_time(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(silent.getsockname()[1])
        begun = time.monotonic()
        assert "timed out" in hub.why_unreachable(0.3)
        assert time.monotonic() - begun < 5


def test_a_look_up_that_hangs_is_given_up_in_time(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ended = threading.Event()

    def hang(*_, **__):
        ended.wait(30)
        raise OSError("ended")

    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    begun = time.monotonic()
    assert "no answer within 0 s" in hub.why_unreachable(0.1)
    assert time.monotonic() - begun < 5
    ended.set()


def test_what_is_not_installed_is_told_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = {one.what: one for one in software.look_at_software()}
    assert found["wandb"].mark is Mark.ABSENT
    assert found["wandb"].remedy == "pip install 'torchtitan_rd[wandb]'"


def test_a_dependency_that_is_not_installed_stands_in_the_way(monkeypatch):
    real = software._version
    monkeypatch.setattr(software, "_version", lambda name: "absent" if name == "tiktoken" else real(name))
    wrong = [one for one in software.look_at_software() if one.mark is Mark.WRONG]
    assert [one.remedy for one in wrong] == ["pip install tiktoken"]


def test_a_user_without_a_home_as_in_a_container_is_told_what_to_set(monkeypatch):
    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    found = surroundings.look_at_caches()
    assert [one.mark for one in found] == [Mark.ABSENT] * 2
    assert "home" in found[0].found and "export HF_HUB_CACHE=" in found[0].remedy


def test_the_caches_say_which_data_they_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "sets"))
    (tmp_path / "hub" / "datasets--eminorhan--neural-pile-primate").mkdir(parents=True)
    (tmp_path / "sets" / "openai___gsm8k").mkdir(parents=True)
    found = {one.what: one.found for one in surroundings.look_at_caches()}
    assert "holds primate;" in found["HF_HUB_CACHE"] and "holds gsm8k;" in found["HF_DATASETS_CACHE"]


def looked_at(rank, world_size, seconds_of_work):
    store = dist.PrefixStore("a test of doctor", dist.distributed_c10d._get_default_store())
    return ranks.look_at_ranks(store, rank, world_size, CPU, 60.0, lambda device: seconds_of_work[rank])


def test_each_rank_has_its_times_and_the_slow_one_is_named():
    told, nothing = run_on_ranks(2, looked_at, [0.1, 0.5])
    assert nothing is None and told.is_good
    assert [one.work for one in told.ranks] == [0.1, 0.5] and told.slow == [1]
    assert all(len(one.seconds) == len(preflight.MESSAGE_BYTES["cpu"]) for one in told.ranks)
    shown = doctor._rank_table(told, 2, CPU)
    assert "SLOW" in shown and "rank 1 (" in shown and "slower than 2.0 times the median" in shown


@pytest.mark.parametrize(
    ("work", "slow"),
    [([0.1, 0.1, 0.15], []), ([0.1, 0.1, 0.3], [2]), ([0.01, 0.01, 0.025], []), ([0.3], []), ([9, 0.1], [0])],
)
def test_a_rank_is_slow_against_the_median_by_a_time_that_matters(work, slow):
    assert ranks.slow_ones([ranks.Rank(n, "h", "CPU", w) for n, w in enumerate(work)]) == slow


@pytest.mark.parametrize(("seconds", "said"), [(0.05, "0.00131"), (65536 / 4.5e11, "450")])
def test_a_slow_link_is_a_figure_and_not_zero(seconds, said):
    both = [ranks.Rank(number, "h", "CPU", 0.1, (seconds, seconds)) for number in (0, 1)]
    table = doctor._rank_table(ranks.Findings(both, [], [], []), 2, CPU)
    assert table.splitlines()[3].split()[-1] == said


def alone(world_size, word=None):
    """What rank 0 learns where no other rank does anything, but that rank 1 has once answered `word`."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9)
    )
    if word:
        store.set(f"doctor/{word}/1", '{"rank": 1, "host": "h", "device": "CPU", "work": 0.1, "seconds": []}')
    begun = time.monotonic()
    told = ranks.look_at_ranks(store, 0, world_size, CPU, 1.0, lambda device: 0.1)
    assert time.monotonic() - begun < 20
    return told


def test_ranks_that_never_answer_are_named_as_dead():
    told = alone(3, "here")
    assert told.dead == [2] and not told.is_good
    assert "DEAD" in doctor._rank_table(told, 3, CPU)
    assert any(line.startswith("!!  rank 2 never answered") for line in doctor._verdicts(told))


def test_a_rank_that_hangs_in_the_all_reduces_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    told = alone(2, "here")
    assert told.dead == [] and told.stuck == [1] and told.problem and not told.is_good
    assert any("rank 1 (h) answered, and hung" in line for line in doctor._verdicts(told))


@pytest.mark.slow
def test_the_whole_page_is_printed_on_ranks_that_torchrun_starts_and_its_compiler_compiles(tmp_path):
    command = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = run([*command, "-m", "torchtitan_rd", "doctor", "--folder", str(tmp_path)], HF_HUB_OFFLINE="1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("what this environment can do") == 1
    assert "ranks (2): the same work" in found.stdout and "  ok  torch.compile" in found.stdout
