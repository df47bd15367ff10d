"""Several sources of a Huginn run config have at each update the shares that they have there."""

import json
import math

import pytest

from tests.test_huginn_config import ALONE
from torchtitan_rd.config import load
from torchtitan_rd.data.mixture import weights_at
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.huginn_mixture import Clock, mixture_of

LENGTH = 960  # microbatches
HEAD = "model_name: magpie-150m\nworld_batch_size: {batch}\nmicro_batch_size: 2\nmax_steps: 960\n"
PLAIN = {
    "even": None,
    "steps": ["step", 8.0, 64, 0.5],
    "line": ["linear", 4.0, 1.0],
    "short line": ["linear", 4.0, 0.0, 320],
    "wave": ["cosine", 6.0, 2.0, 192],
}
PIECES = {
    "pieces": [
        [32, ["const", 5.0]],
        [64, ["linear", 5.0, 1.0, 128]],
        [256, ["step", 3.0, 32, 0.5]],
        [480, ["base"]],
        [640, ["cosine", 7.0, 0.0, 64]],
        [800, ["linear", 7.0, 0.0]],
    ],
    "even": ["const", 2.0],
}
ENDING = {"pieces": [[0, ["const", 40.0]], [480, ["const", 0.0]]], "rest": ["base-renorm"]}


def their_weight(scheduler, default, microbatch):
    """Written from the description of that trainer's schedules, not from the translation."""
    if scheduler is None:
        return default
    if isinstance(scheduler[0], list):
        begun = [(begin, own) for begin, own in scheduler if begin <= microbatch]
        return their_weight(begun[-1][1], default, microbatch - begun[-1][0]) if begun else default
    kind, *numbers = scheduler
    if kind in ("base", "base-renorm"):
        return 0.0
    if kind == "const":
        return numbers[0]
    if kind == "step":
        return numbers[0] * numbers[2] ** (microbatch // numbers[1])
    first, last, span = [*numbers, LENGTH][:3]
    if kind == "linear":
        return first + (last - first) * min(microbatch, span) / span
    return last + (first - last) * (1 + math.cos(math.pi * (microbatch % span) / span)) / 2


def their_shares(schedulers, microbatch):
    weights = {name: their_weight(own, 3, microbatch) for name, own in schedulers.items()}
    for name, own in schedulers.items():
        if own and own[0] in ("base", "base-renorm"):
            others = sum(weights.values())
            if own[0] == "base-renorm" and others:
                weights = {other: weight * 100.0 / others for other, weight in weights.items()}
            weights[name] = 100.0 - sum(weights.values())
    total = sum(weights.values())
    return [weight / total for weight in weights.values()]


@pytest.fixture
def sources_of(tmp_path):
    def read(entries, microbatches=16):
        table = json.dumps({"train_data": entries}).replace("{", "{{").replace("}", "}}")
        text = HEAD + f"data_config: {table}\n"
        (tmp_path / "run.yaml").write_text(text.format(batch=2 * microbatches))
        loaded = load(["--job.config_file", str(tmp_path / "run.yaml")], ALONE)
        return loaded.config.training, loaded.warnings

    return read


def entries_of(schedulers):
    own = {"type": "pqds", "data_dir": "/rows", "weight": 3}
    return [{**own, "name": name, "scheduler": scheduler} for name, scheduler in schedulers.items()]


@pytest.mark.parametrize("microbatches", [1, 16])
@pytest.mark.parametrize(
    "schedulers", [PLAIN, PIECES, {**PLAIN, "rest": ["base"]}, {**PIECES, "rest": ["base-renorm"]}, ENDING]
)
def test_each_update_has_the_shares_that_it_has_there(schedulers, microbatches, sources_of):
    training, warnings = sources_of(entries_of(schedulers), microbatches)
    assert training.steps == LENGTH // microbatches and training.dataset == "pydoc"
    assert not any("rounded" in warning for warning in warnings)
    for step in range(1, training.steps + 1):
        weights = weights_at(training.mixture, step)
        shares = [weight / math.fsum(weights) for weight in weights]
        expected = their_shares(schedulers, (step - 1) * microbatches)
        assert shares == pytest.approx(expected, abs=1e-12), step


def test_names_places_and_epochs_are_carried_over_and_rounding_is_told(sources_of):
    entries = [
        {"type": "pqds-pure", "data_dir": "/a", "prefix": "train", "max_epoch": 4},
        {"type": "pqds-pure", "data_dir": "/b", "prefix": "train", "weight": 2},
        {"type": "pqds", "data_dir": "/c", "name": "9 x/y", "scheduler": [[8, ["const", 5]]]},
    ]
    training, warnings = sources_of(entries)
    found = [(one.name, one.dataset_path, one.weight, one.max_epochs) for one in training.mixture]
    assert found == [
        ("train", "/a/train/*.parquet", 1.0, 4),
        ("train-2", "/b/train/*.parquet", 2.0, None),
        ("source-9-x-y", "/c/*.parquet", 1.0, None),
    ]
    assert [weights_at(training.mixture, step)[2] for step in (1, 2)] == [1.0, 5.0]
    assert any("rounded up" in warning for warning in warnings)


WRONG = [
    ({"type": "hfds"}, "[1]: type 'hfds' is not carried over"),
    ({"weight": -1}, "[1]: weight = -1 must be a number"),
    ({"max_epoch": 0}, "[1]: max_epoch = 0 must be a whole number"),
    ({"weihgt": 1}, "[1]: unknown field 'weihgt'"),
    ({"scheduler": ["square", 1]}, "[1]: scheduler ['square', 1]: expected const and a weight"),
    ({"scheduler": ["linear", 1, 0, 0]}, "microbatches at least 1"),
    ({"scheduler": [[5, ["const", 1]], [5, ["const", 2]]]}, "begin at [5, 5]: expected a growing order"),
    ({"scheduler": [[0, [[0, ["const", 1]]]]]}, "expected const and a weight"),
    ({"scheduler": ["base"]}, "several entries are a base"),
    ({"scheduler": 3}, "scheduler = 3 must be a list"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_cannot_be_carried_over_is_named_with_its_entry(changes, message, sources_of):
    base, other = entries_of({"rest": ["base"], "other": None})
    with pytest.raises(ConfigError) as caught:
        sources_of([base, {**other, **changes}])
    assert message in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_wave_of_too_many_pieces_is_refused():
    entries = entries_of({"wave": ["cosine", 1, 0, 2], "other": None})
    with pytest.raises(ConfigError, match="changes 5000 times, more than 1000"):
        mixture_of(entries, Clock(float, 10_000))
