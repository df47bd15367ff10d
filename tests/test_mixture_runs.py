"""Whole runs on a mixture: killed and resumed, on other ranks, with other weights; pinned and checked."""

import json
import signal

import datasets
import pytest

from tests.data.helpers import documents_of_letters
from tests.data.test_hub import NEW, OLD, FakeHub
from tests.launch import TOLD, arguments_of, launch, rows
from tests.test_resume import compare_across_ranks, history
from tests.test_run_plan import plan, problems
from torchtitan_rd import train
from torchtitan_rd.__main__ import main
from torchtitan_rd.data import trained_kind

STEPS = 14
CONFIG = """
[job]
dump_folder = "{dump}"
[model.overrides]
dim = 32
n_layers = 2
ffn_dim = 64
[training]
shuffle_seed = 3
seq_len = 32
local_batch_size = 1
global_batch_size = 4
steps = {steps}
mixed_precision_param = "float32"
batch_ramp_steps = 4
batch_ramp_stages = {stages}
[lr_scheduler]
warmup_steps = 3
[checkpoint]
enable = true
interval = 3
async_mode = "async"

[[training.mixture]]
name = "own"
dataset = "text"
dataset_path = "{data}"
weight = 0.7
schedule = "linear"
end_weight = 0.3
end_step = 10

[[training.mixture]]
name = "help"
dataset = "pydoc-validation"
weight = 0.3
max_epochs = 1
"""
CONFIG += TOLD


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """About 400 bytes: every lane passes its end within the run."""
    return documents_of_letters(tmp_path_factory.mktemp("data"), 10, 60)


def arguments_for(folder, documents, stages=2):
    return arguments_of(folder, CONFIG, data=documents, steps=STEPS, stages=stages)


def of_sources(folder):
    """(step, tokens, epoch, weight of each source) of every row."""
    names = [f"{what}_{name}" for name in ("own", "help") for what in ("tokens", "epoch", "weight")]
    return [(row["step"], *(row[name] for name in names)) for row in rows(folder / "dump")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finished = launch(2, arguments_for(folder, documents))
    assert finished.codes == [0, 0], finished.errors
    return folder, history(folder), of_sources(folder)


def test_rows_tell_the_tokens_the_epoch_and_the_weight_of_each_source(uninterrupted, documents):
    folder, expected, sources = uninterrupted
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    for (_, _, _, tokens_seen), (step, own, _, weight, others, _, other_weight) in zip(
        expected, sources, strict=True
    ):
        assert own + others == tokens_seen
        falling = 0.7 - 0.4 * min(step, 10) / 10
        assert weight == pytest.approx(falling / (falling + 0.3))
        assert weight + other_weight == pytest.approx(1.0)
    assert sources[-1][2] >= 1, "the small source is read again"
    record = json.loads((folder / "dump" / "data.json").read_text())
    assert record["sources"]["own"]["path"] == str(documents) and record["sources"]["help"]["rows"] > 1


def test_kills_leave_no_trace_in_losses_batches_and_counts(uninterrupted, documents, tmp_path):
    arguments = arguments_for(tmp_path, documents)
    for rank, step, microbatch in ((1, 5, 0), (0, 12, 1)):
        finished = launch(2, arguments, ("--die-at", str(rank), str(step), str(microbatch)))
        assert finished.codes[rank] == -signal.SIGKILL
    finished = launch(2, arguments)
    assert finished.codes == [0, 0], finished.errors
    assert "resuming after step " in finished.errors[0]
    assert history(tmp_path) == uninterrupted[1]
    assert of_sources(tmp_path) == uninterrupted[2]


@pytest.mark.slow
def test_a_killed_run_goes_on_alike_on_one_rank(uninterrupted, documents, tmp_path):
    arguments = arguments_for(tmp_path, documents)
    assert launch(2, arguments, ("--die-at", "0", "8", "0")).codes[0] == -signal.SIGKILL
    finished = launch(1, arguments)
    assert finished.codes == [0], finished.errors
    compare_across_ranks(history(tmp_path), uninterrupted[1])
    for found, expected in zip(of_sources(tmp_path), uninterrupted[2], strict=True):
        assert found == pytest.approx(expected)


SMALL = [
    "--training.seq_len=8",
    "--training.local_batch_size=1",
    "--model.overrides.n_layers=1",
    "--model.overrides.dim=32",
    "--checkpoint.enable",
]


def small(folder, mixture, *arguments):
    folder.mkdir(exist_ok=True)
    path = folder / "small.toml"
    path.write_text(f'[job]\ndump_folder = "{folder / "dump"}"\n{mixture}')
    return ["--job.config_file", str(path), *SMALL, *arguments]


TWO = """
[[training.mixture]]
name = "a"
dataset = "pydoc-train"
weight = 1
[[training.mixture]]
name = "b"
dataset = "text"
dataset_path = "some/data"
weight = 1
"""


def test_each_source_keeps_its_commit_on_the_hub_when_the_run_goes_on(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "hub")

    def run(steps):
        assert train.main(small(tmp_path, TWO, f"--training.steps={steps}")) == 0
        return json.loads((tmp_path / "dump" / "data.json").read_text())["sources"]["b"]["commit"]

    assert run(1) == OLD
    hub.moves_on(["new"] * 40)
    assert run(2) == OLD and hub.asked == 1
    state = json.loads((tmp_path / "dump" / "checkpoint" / "step-2" / "state.json").read_text())
    assert state["data"]["fingerprint"]["sources"]["b"]["revision"]["commit"] == OLD != NEW


def test_weights_may_change_between_two_runs_and_a_source_may_not_leave(tmp_path, capsys):
    mixture = TWO.replace('"text"\ndataset_path = "some/data"', '"pydoc-validation"')
    assert train.main(small(tmp_path, mixture, "--training.steps=2")) == 0
    changed = small(tmp_path, mixture, "--training.steps=6", "--training.mixture.b.weight=0")
    assert train.main(changed) == 0
    last = rows(tmp_path / "dump")[-1]
    assert (last["step"], last["weight_b"]) == (6, 0.0) and last["tokens_b"] <= 2 * 8
    capsys.readouterr()
    alone = mixture[: mixture.index('[[training.mixture]]\nname = "b"')]
    assert train.main(small(tmp_path, alone, "--training.steps=8")) == 1
    assert "training.mixture has no source b, which the checkpoint holds" in capsys.readouterr().err


def test_data_check_reads_each_source_and_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": ["good", None, "good"]}).save_to_disk(str(tmp_path / "texts"))
    arguments = small(tmp_path, TWO.replace("some/data", str(tmp_path / "texts")))
    assert main(["data", "check", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "training.mixture.a: 72 rows" in printed
    assert "training.mixture.b: text: row 1: column 'text' holds string None" in printed
    assert "training.mixture.b: 3 rows" in printed and "1 that would stop a run" in printed
    assert "to leave these out: skip_ranges = [[1, 1]]" in printed
    assert main(["data", "check", *arguments, "--training.mixture.b.skip_ranges=[[1, 1]]"]) == 0
    assert "1 skipped by training.mixture.b.skip_ranges" in capsys.readouterr().out


def test_a_plan_names_the_sources_and_every_mistake_in_them(tmp_path):
    arguments = small(tmp_path, TWO.replace('"text"\ndataset_path = "some/data"', '"pydoc-validation"'))
    assert "mixture of a (pydoc-train), b (pydoc-validation)" in plan(*arguments).report()
    wrong = ["--training.mixture.b.dataset=pydocs", "--training.mixture.a.weight=0", "--training.stream"]
    found = problems(*arguments, *wrong, "--training.mixture.b.weight=0", "--validation.enable")
    assert [line.partition(":")[0].partition(" = ")[0] for line in found] == [
        "training.stream has no place beside [[training.mixture]]",
        "training.mixture",
        "training.mixture.b.dataset",
        "validation.dataset must be given beside [[training.mixture]], which is several",
    ]


def test_a_held_out_set_of_its_own_is_measured_beside_a_mixture(tmp_path):
    mixture = TWO[: TWO.index('[[training.mixture]]\nname = "b"')]
    arguments = small(tmp_path, mixture, "--training.steps=1", "--validation.enable")
    assert train.main([*arguments, "--validation.dataset=pydoc-validation", "--validation.sequences=1"]) == 0
    assert rows(tmp_path / "dump")[-1]["val_loss"] > 0


@pytest.mark.parametrize(
    ("datasets_", "kind"),
    [
        (["text", "packed"], "text"),
        (["packed"], "packed"),
        (["synthetic", "packed"], "spikes"),
        (["?"], None),
    ],
)
def test_what_ids_mean_is_told_by_the_sources_of_a_stored_config(datasets_, kind):
    """Not by training.dataset, which a mixture leaves at its default."""
    mixture = [{"name": f"s{i}", "dataset": name} for i, name in enumerate(datasets_)]
    assert trained_kind({"dataset": "pydoc", "mixture": mixture}) == kind
    assert trained_kind({"dataset": "rodent", "mixture": []}) == "spikes"
