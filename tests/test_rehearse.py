"""torchtitan-rd rehearse: the rule by which a run becomes small, the rows it reads, and that each planted
mistake is a no-go line that names it. That whole rehearsals pass is among the slow tests.
"""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_scripts import ROOT, run
from torchtitan_rd.__main__ import main as console
from torchtitan_rd.commands import rehearse as command
from torchtitan_rd.config import load
from torchtitan_rd.data import DATASETS, DatasetKeys, build_encoder, load_tokenizer
from torchtitan_rd.data.arrow import encode_row
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.rehearsal import Line, Options, Rehearsal, Verdict, rows, stages
from torchtitan_rd.rehearsal.rehearse import NEEDS
from torchtitan_rd.rehearsal.shrink import RULES, small_ranks, small_shape
from torchtitan_rd.rehearsal.verdicts import NoGo
from torchtitan_rd.run_plan import resolve

CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
BEFORE_LIFE = 6  # config, plan, folder, weights, data, shrink


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """As where the hub is out of reach and nothing of it is cached."""
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rehearsal(tmp_path):
    """path of a file, its ranks, overrides -> its rehearsal."""

    def make(path: Path | str, ranks: int | None, *overrides: str) -> Rehearsal:
        folder = tmp_path / f"rehearsal-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        arguments = ["--job.config_file", str(path), f"--job.dump_folder={tmp_path / 'dump'}", *overrides]
        return Rehearsal(Options(arguments, ALONE, ranks, folder, 300, lambda: False))

    return make


def before_life(rehearsal: Rehearsal) -> dict[str, Line]:
    """The stages that start no process."""
    return {line.stage: line for line in islice(rehearsal.lines(), BEFORE_LIFE)}


RANKS = {"primate_8b_131k": 144, "raven_3.5b_4k": 4096, "magpie_150m_4k": 8, "debug": 2}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_becomes_small_by_the_rule_and_each_altered_key_is_told(path, rehearsal):
    tried = rehearsal(path, RANKS.get(path.stem))
    lines = before_life(tried)
    assert {line.verdict for line in lines.values()} == {Verdict.GO}, lines

    asked, small = tried.asked, tried.life.config
    told = {change.key: (change.before, change.after) for change in tried.changes}
    for section, keys in small.as_dict().items():
        for name, value in keys.items():
            was = asked.as_dict()[section][name]
            if isinstance(value, dict):
                altered = {field for field in value if value[field] != was.get(field)}
                assert altered == {k.split(".")[2] for k in told if k.startswith(f"{section}.{name}.")}
            else:
                assert ((was, value) == told.get(f"{section}.{name}")) == (was != value), (section, name)
    assert all(change.why for change in tried.changes)

    # What is rehearsed is what was asked for, on few rows, without a word that is not this machine's.
    kept = ("name", "flavor", "vocab_size", "vocab_padding_multiple")
    assert all(getattr(small.model, key) == getattr(asked.model, key) for key in kept)
    assert (small.optimizer, small.activation_checkpoint) == (asked.optimizer, asked.activation_checkpoint)
    plan = resolve(small, replace(ALONE, world_size=tried.life.ranks.total))
    assert plan.count_parameters() < 20e6 and plan.vocab_size == tried.planned.vocab_size
    assert tried.life.ranks.total in (2, 4) and tried.life.ranks.resumed_total in (2, 4)
    assert tried.life.ranks.total != tried.life.ranks.resumed_total
    told_ranks = f"on {tried.life.ranks.total} and {tried.life.ranks.resumed_total} ranks"
    assert told_ranks in lines["shrink"].text
    assert load(["--job.config_file", str(tried.life.file)], ALONE).config == small.model_copy(
        update={"job": small.job.model_copy(update={"config_file": str(tried.life.file)})}
    )


@pytest.mark.parametrize("name", ["llama3", "aixsim", "raven"])
def test_a_small_shape_keeps_the_ratios_of_every_flavor_and_grows_nothing(name):
    for flavor, shape in MODELS[name].flavors.items():
        full, small = shape.resolved(), get_flavor(MODELS[name], flavor, small_shape(shape)).resolved()
        (heads, kv, head_dim), (few, few_kv, short) = full.attention_shape, small.attention_shape
        assert few / few_kv == heads / kv, flavor
        assert small.dim <= full.dim and small.dim * heads * head_dim == full.dim * few * short, flavor
        assert math.isclose(small.ffn_dim / small.dim, full.ffn_dim / full.dim, abs_tol=8 / small.dim)
        assert all(
            getattr(small, field) == getattr(full, field)
            for field in full.__dataclass_fields__
            if field not in {*small_shape(shape), "head_dim"}
        ), flavor


def test_each_rule_names_a_key_that_there_is():
    config = load(["--model.flavor=debug"], ALONE).config
    for key, _, why in RULES:
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name) and why


@pytest.mark.parametrize(
    ("degrees", "ranks", "total", "resumed"),
    [((1, -1), 144, (1, 2), (1, 4)), ((2, -1), 8, (2, 2), (1, 2)), ((-1, 8), 4096, (2, 2), (1, 2))]
    + [((1, 1), 1, (1, 2), (1, 4)), ((4, 1), 4, (2, 1), (4, 1))],
)
def test_two_ranks_stand_for_one_degree_and_four_for_two(degrees, ranks, total, resumed):
    names = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
    keys = [f"--parallelism.{name}={degree}" for name, degree in zip(names, degrees, strict=True)]
    config = load(keys, ALONE).config
    small = small_ranks(resolve(config, replace(ALONE, world_size=ranks)), config.parallelism.model_dump())
    assert tuple(small.degrees[name] for name in names) == total
    assert tuple(small.resumed[name] for name in names) == resumed
    assert (small.total, small.resumed_total) == (math.prod(total), math.prod(resumed))
    assert small.data % small.total == 0 and small.data % small.resumed_total == 0


@pytest.mark.parametrize("key", ["context_parallel_degree", "tensor_parallel_degree"])
def test_ranks_that_share_rows_are_two_of_the_four(key):
    config = load([f"--parallelism.{key}=2"], ALONE).config
    small = small_ranks(resolve(config, replace(ALONE, world_size=16)), config.parallelism.model_dump())
    assert (small.degrees[key], small.degrees["data_parallel_shard_degree"], small.total) == (2, 2, 4)
    assert (small.resumed, small.resumed_total) == (
        {"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 1},
        2,
    )


@pytest.mark.parametrize(
    ("ranks", "total", "resumed"),
    [(16, (2, 2, 2), (1, 2, 2)), (4, (1, 2, 2), (2, 2, 2))],
)
def test_where_sequences_and_matrices_are_shared_a_run_resumes_on_other_ranks_too(ranks, total, resumed):
    shared = ("context_parallel_degree", "tensor_parallel_degree")
    config = load([f"--parallelism.{key}=2" for key in shared], ALONE).config
    small = small_ranks(resolve(config, replace(ALONE, world_size=ranks)), config.parallelism.model_dump())
    again = {**small.degrees, **small.resumed}
    data = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
    for degrees, wanted in ((small.degrees, total), (again, resumed)):
        found = (math.prod(degrees[key] for key in data), *(degrees[key] for key in shared))
        assert found == wanted
    assert (small.total, small.resumed_total) == (math.prod(total), math.prod(resumed))


PRIMATE = ROOT / "train_configs" / "primate_8b_131k.toml"


@pytest.mark.parametrize(
    ("overrides", "stage", "named"),
    [
        (["--parallelism.data_parallel_shard_degree=7"], "plan", "data_parallel_shard_degree (7) is 7"),
        (["--training.dataset_path=/no/rows"], "plan", "training.dataset_path = '/no/rows': no such file"),
        (["--training.dataset_path=no/rows"], "data", "cannot read 'no/rows'"),
        (["--model.overrides.n_heads=7"], "plan", "dim = 4096 is not divisible by n_heads = 7"),
        (["--model.overrides.n_kv_heads=5"], "plan", "n_heads = 32 is not divisible by n_kv_heads = 5"),
        (["--job.dump_folder=/dev/null/dump"], "folder", "job.dump_folder = '/dev/null/dump' cannot be made"),
        (["--checkpoint.initial_load_path=/no/weights"], "weights", "/no/weights does not exist"),
        (["--training.global_batch_size=145"], "plan", "training.global_batch_size = 145"),
        (["--trainin.steps=1"], "config", "unknown section [trainin]; did you mean 'training'"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_a_planted_mistake_is_a_no_go_line_that_names_it(overrides, stage, named, rehearsal, monkeypatch):
    acting(monkeypatch)  # if the mistake is overlooked, that is known without a run
    lines = list(rehearsal(PRIMATE, 144, *overrides).lines())
    wrong = [line for line in lines if line.verdict is Verdict.NO_GO]
    assert [line.stage for line in wrong] == [stage] and named in wrong[0].text, wrong
    life = [line for line in lines if line.stage in ("train", "kill", "resume", "export", "generate")]
    assert {(line.verdict, line.text) for line in life} == {(Verdict.NOT_TRIED, f"{stage} stands in the way")}


def test_a_tokenizer_of_another_vocabulary_is_named(rehearsal):
    overrides = ["--training.dataset=pydoc", "--model.vocab_size=200"]
    line = before_life(rehearsal(PRIMATE, 144, *overrides))["plan"]
    assert line.verdict is Verdict.NO_GO
    assert "the tokenizer (model.tokenizer_path) has ids up to 257, but model.vocab_size = 200" in line.text


def test_mistakes_do_not_hide_each_other(rehearsal):
    overrides = ["--model.overrides.n_heads=7", "--parallelism.data_parallel_shard_degree=7"]
    lines = before_life(rehearsal(PRIMATE, 144, *overrides, "--job.dump_folder=/dev/null/dump"))
    assert "n_heads = 7" in lines["plan"].text and "shard_degree (7)" in lines["plan"].text
    assert lines["folder"].verdict is Verdict.NO_GO and lines["weights"].verdict is Verdict.GO


def spikes_in(folder: Path, recordings: list, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    cells = pa.array(recordings, pa.list_(pa.list_(pa.uint8())))
    sources = ["a" if number % 2 else "b" for number in range(len(recordings))]
    pq.write_table(pa.table({"spike_counts": cells, "source_dataset": sources}), folder / f"{split}.parquet")
    return folder


def test_the_first_rows_of_real_data_are_judged_and_read(rehearsal, tmp_path):
    data = spikes_in(tmp_path / "rows", [[[number, 1], [2, 3]] for number in range(40)])
    tried = rehearsal(PRIMATE, 144, f"--training.dataset_path={data}")
    assert before_life(tried)["data"].text == "training: primate (train): its first rows are good"
    read = pq.read_table(tried.life.config.training.dataset_path)["spike_counts"].to_pylist()
    assert read == [[[number, 1], [2, 3]] for number in range(rows.ROWS)] and tried.made_up == []


def test_a_row_that_would_stop_the_run_is_a_no_go_with_its_number(rehearsal, tmp_path):
    data = spikes_in(tmp_path / "rows", [[[1]], [[1]], [[255]]])
    line = before_life(rehearsal(PRIMATE, 144, f"--training.dataset_path={data}"))["data"]
    assert line.verdict is Verdict.NO_GO and "row 2" in line.text and "spike count 255" in line.text


def test_only_rows_of_the_chosen_source_are_taken(rehearsal, tmp_path):
    data = spikes_in(tmp_path / "rows", [[[number]] for number in range(10)])
    keys = [f"--training.dataset_path={data}", "--training.source_dataset=a"]
    tried = rehearsal(PRIMATE, 144, *keys)
    assert before_life(tried)["data"].verdict is Verdict.GO
    read = pq.read_table(tried.life.config.training.dataset_path)["spike_counts"].to_pylist()
    assert {cell[0][0] for cell in read} == {1, 3, 5, 7, 9}
    assert tried.life.config.training.source_dataset is None
    wrong = before_life(rehearsal(PRIMATE, 144, keys[0], "--training.source_dataset=c"))["data"]
    assert wrong.verdict is Verdict.NO_GO and "training.source_dataset = 'c'" in wrong.text


def test_packed_rows_are_judged_at_their_own_length_and_cut(rehearsal, tmp_path):
    (tmp_path / "rows").mkdir()
    for split, length in (("train", 4097), ("validation", 4097)):
        ids = [[n % 32000 for n in range(length)]] * 3
        pq.write_table(pa.table({"input_ids": ids}), tmp_path / "rows" / f"{split}.parquet")
    magpie = ROOT / "train_configs" / "magpie_150m_4k.toml"
    tried = rehearsal(magpie, 8, f"--training.dataset_path={tmp_path / 'rows'}")
    assert before_life(tried)["data"].verdict is Verdict.GO
    read = pq.read_table(tried.life.config.training.dataset_path)["input_ids"].to_pylist()
    assert read == [list(range(129))] * rows.ROWS

    pq.write_table(pa.table({"input_ids": [[1] * 4096]}), tmp_path / "rows" / "train.parquet")
    wrong = before_life(rehearsal(magpie, 8, f"--training.dataset_path={tmp_path / 'rows'}"))["data"]
    assert wrong.verdict is Verdict.NO_GO and "has 4096 ids" in wrong.text


MADE_UP = [("primate", {}), ("text", {}), ("packed", {"eos_id": 5, "pad_id": 6}), ("packed", {})]
MADE_UP += [
    ("chat", {}),
    ("gsm8k", {"question_column": "q", "answer_column": "a"}),
    ("text", {"column": "t"}),
]


@pytest.mark.parametrize(("name", "keys"), MADE_UP)
def test_made_up_rows_are_such_as_the_run_s_own_encoder_reads(name, keys, tmp_path):
    rows.make_up_chat_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    config, row = DatasetKeys(dataset=name, seq_len=32, **keys), DATASETS[name]
    wanted = rows.Wanted(config, row, "train", 32, 300)
    rows.make_up_rows(wanted, tmp_path / "rows")
    table = pq.read_table(tmp_path / "rows")
    assert len(table) == rows.ROWS and len(list((tmp_path / "rows").iterdir())) == rows.FILES
    rows.make_up_rows(replace(wanted, split="validation"), tmp_path / "held")
    held = pq.read_table(tmp_path / "held").to_pylist()
    assert all(one != other for one, other in zip(held, table.to_pylist(), strict=True))
    encoder = build_encoder(config, row.kind, tokenizer, 300)
    assert all(len(encode_row(table.slice(n, 1), encoder, "row")) > 1 for n in range(len(table)))


def test_the_folder_of_the_run_is_not_touched(rehearsal, tmp_path):
    before_life(rehearsal(PRIMATE, 144))
    assert not (tmp_path / "dump").exists()


LOG = """W1122 04:01:02.123456 12 torch/distributed/run.py:1] a warning
04:01:03 I resuming after step 4 of 10 (4096 tokens)
ConfigError: training.a is wrong
and so is training.b
[rank1]: Traceback (most recent call last):
E1122 04:01:04.123456 12 torch/distributed/elastic] failed (exitcode: 1)
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (LOG, "ConfigError: training.a is wrong\nand so is training.b"),
        (
            "rank 1 failed:\nTraceback (most recent call last):\n  File x\nRuntimeError: boom\n",
            "RuntimeError: boom",
        ),
        ("DataError on rank 1: row 3\n", "DataError on rank 1: row 3"),
        ("04:01:03 I all is well\n", ""),
    ],
)
def test_of_a_log_the_error_is_told(log, said):
    assert stages.complaint(log) == said


CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
)
CHILD += "start_new_session=True); time.sleep(60)"


def test_a_killed_process_takes_those_in_sessions_of_their_own_along():
    process = subprocess.Popen([sys.executable, "-c", CHILD])
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stages.kill_tree(process)
    assert process.returncode == -9 and not children[0].is_running()
    stages.kill_tree(process)  # once more does no harm


@pytest.fixture
def life(rehearsal):
    """A life of which no stage has run."""
    tried = rehearsal(ROOT / "train_configs" / "debug.toml", 2)
    before_life(tried)
    return tried.life


def test_a_run_that_is_to_be_killed_ends_with_an_interrupted_rehearsal(life, monkeypatch):
    """It would take a million steps."""
    started = []
    monkeypatch.setattr(life, "_torchrun", lambda *args: started.append(endless(life)) or started[0])
    monkeypatch.setattr(stages.time, "sleep", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        life.kill()
    assert started[0].poll() == -9


def endless(life) -> subprocess.Popen:
    return life._start("endless", ["timeit", "-s", "import time", "-n1", "time.sleep(60)"])


def raising(error):
    def raise_it(*args):
        raise error

    return raise_it


def test_a_stage_that_takes_too_long_is_ended_and_says_so(life):
    life.limit = 0.2
    with pytest.raises(NoGo, match=r"not done after 0 s \(--limit\)"):
        life._finish(life._start("sleep", ["timeit", "-s", "import time", "-n1", "time.sleep(60)"]))


def test_a_stage_that_fails_says_what_its_program_said_and_where_the_rest_stands(life, monkeypatch):
    (life.folder / "failing.py").write_text("raise SystemExit('some noise\\nConfigError: no such key')\n")
    monkeypatch.setenv("PYTHONPATH", str(life.folder))
    with pytest.raises(NoGo) as error:
        life._finish(life._start("verify", ["failing"]))
    assert str(error.value).startswith("ConfigError: no such key\n(exit status 1; ")
    assert "verify.log" in str(error.value)


def test_a_stage_sees_no_gpu_and_nothing_of_this_rank(life, monkeypatch):
    for name, value in (("RANK", "3"), ("TORCHELASTIC_RUN_ID", "x"), ("MY_OWN", "kept")):
        monkeypatch.setenv(name, value)
    (life.folder / "shown.py").write_text(
        "import os\nfor item in os.environ.items(): print('='.join(item))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(life.folder))
    life._finish(life._start("shown", ["shown"]))
    seen = dict(line.split("=", 1) for line in (life.folder / "shown.log").read_text().splitlines())
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["MY_OWN"] == "kept"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & set(seen)
    assert seen["HF_DATASETS_CACHE"].startswith(str(life.folder))


def acting(monkeypatch, **stages_of_it):
    """The command on stages that start no process: each does nothing, or raises what is given for it."""

    def stage(name):
        def act(self):
            if name in stages_of_it:
                raise stages_of_it[name]
            return f"{name} was here"

        return act

    for name in ("train", "kill", "resume", "validate", "export", "generate"):
        monkeypatch.setattr(stages.Life, name, stage(name))
    monkeypatch.setattr(command, "_hub_answers", lambda: False)


def rehearsed(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr(command.tempfile, "mkdtemp", lambda prefix: str(made))
    made = tmp_path / "made"
    made.mkdir(exist_ok=True)
    code = console(["rehearse", str(PRIMATE), f"--job.dump_folder={tmp_path / 'dump'}", *arguments])
    return code, made


def test_a_rehearsal_that_is_go_says_what_was_made_up_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    acting(monkeypatch)
    code, made = rehearsed(tmp_path, monkeypatch, "--ranks", "144")
    page = capsys.readouterr().out
    assert code == 0 and not made.exists()
    assert "144 ranks, 1 x 144; llama3 8B, 6,981,685,248 parameters" in page
    assert "training.seq_len" in page and "131072" in page and "short windows" in page
    assert "made up here, and needed by the run: rows of primate (train)" in page


def test_a_no_go_ends_what_needs_it_keeps_the_logs_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    acting(monkeypatch, resume=NoGo("a line\nand another"))
    code, made = rehearsed(tmp_path, monkeypatch)
    page = capsys.readouterr().out
    assert code == 1 and (made / "rehearsal.toml").exists()
    assert "NO-GO  resume" in page and "and another" in page and f"logs and files: {made}" in page
    assert page.count("resume stands in the way") == 3 and "NO-GO: resume" in page


def test_validation_that_fails_does_not_keep_the_export_from_being_tried(tmp_path, monkeypatch, capsys):
    acting(monkeypatch, validate=NoGo("no"))
    assert rehearsed(tmp_path, monkeypatch)[0] == 1
    assert "export was here" in capsys.readouterr().out


def test_a_no_go_before_anything_was_written_leaves_no_folder(tmp_path, monkeypatch, capsys):
    acting(monkeypatch)
    code, made = rehearsed(tmp_path, monkeypatch, "--trainin.steps=1")
    assert code == 1 and not made.exists() and str(made) not in capsys.readouterr().out


def test_sigterm_leaves_no_folder_and_no_verdict(tmp_path, monkeypatch, capsys):
    def ended(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    acting(monkeypatch)
    monkeypatch.setattr(stages.Life, "resume", ended)
    before = signal.getsignal(signal.SIGTERM)
    code, made = rehearsed(tmp_path, monkeypatch)
    told = capsys.readouterr()
    assert code == 130 and not made.exists() and signal.getsignal(signal.SIGTERM) is before
    assert "interrupted: no verdict" in told.err and "GO" not in told.out


def test_the_folder_that_is_kept_must_be_empty_and_stays(tmp_path, monkeypatch, capsys):
    acting(monkeypatch)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert rehearsed(tmp_path, monkeypatch, "--keep", str(tmp_path / "full"))[0] == 1
    assert "is not empty" in capsys.readouterr().err
    assert rehearsed(tmp_path, monkeypatch, "--keep", str(tmp_path / "kept"))[0] == 0
    assert (tmp_path / "kept" / "rehearsal.toml").exists()


def test_it_starts_its_own_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        command.main(["x.toml"])


LAUNCH = """
source scripts/launch.sh
python() { echo "$@"; }
_ranks_per_node() { echo 3; }
launch train_configs/x.toml --a.b 1
"""


@pytest.mark.parametrize(
    ("script", "variables", "ranks"),
    [
        ("train_primate_8B_131k.sh", {}, 144),
        ("train_synthetic_8B_131k.sh", {}, 48),
        ("train_primate_8B_131k.sh", {"SLURM_NNODES": "2", "GPUS_PER_NODE": "8"}, 16),
        ("train_debug.sh", {}, 3),
        ("train_debug.sh", {"NPROC": "5"}, 5),
    ],
)
def test_a_script_is_rehearsed_on_the_ranks_that_its_header_asks_for(script, variables, ranks):
    own = dict.fromkeys(("SLURM_NNODES", "GPUS_PER_NODE", "NPROC", "CONFIG_FILE"), "")
    found = run(["bash", "-c", LAUNCH, script], REHEARSE="1", **{**own, **variables})
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"-m torchtitan_rd rehearse train_configs/x.toml --ranks {ranks} --a.b 1\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_passes_its_rehearsal(path, tmp_path):
    ranks = ["--ranks", str(RANKS[path.stem])] if path.stem in RANKS else []
    arguments = ["rehearse", str(path), *ranks, f"--job.dump_folder={tmp_path / 'dump'}"]
    offline = {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    found = run(["python", "-m", "torchtitan_rd", *arguments], timeout=850, **offline)
    assert found.returncode == 0 and "\nGO in " in found.stdout, found.stdout + found.stderr
    assert found.stdout.count("\ngo ") == len(NEEDS)
    # torchrun and inductor leave folders of their own where a run is killed.
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("torch")] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_itself_is_rehearsed_on_real_rows(tmp_path):
    data = spikes_in(tmp_path / "rows", [[[number, 1], [2, 3]] for number in range(40)])
    arguments = [f"--training.dataset_path={data}", f"--job.dump_folder={tmp_path / 'dump'}"]
    found = run(["bash", "train_primate_8B_131k.sh", *arguments], timeout=850, REHEARSE="1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "144 ranks" in found.stdout and "its first rows are good" in found.stdout
    assert "made up here" not in found.stdout and not (tmp_path / "dump").exists()
