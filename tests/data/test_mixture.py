"""Mixtures: what each row reads, in which order, and how a run goes on from a checkpoint."""

import json
import math
from collections import Counter
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.helpers import Ranks, build, equal
from tests.ranks import run_on_ranks
from torchtitan_rd.data import (
    BatchDims,
    DatasetKeys,
    dataset_vocab_size,
    load_tokenizer,
    merge_states,
    training_sets,
)
from torchtitan_rd.data.config import MixtureSource
from torchtitan_rd.data.mixture import Mixture, weight_at
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.job import gather_numbers

VOCAB = 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@dataclass
class Folders:
    """Packed sources. Row r of source number k holds the ids (k, r // 500, r % 500)."""

    folder: object

    def write(self, number: int, rows: int) -> str:
        path = self.folder / f"{number}-{rows}.parquet"
        if not path.exists():
            ids = [[number, row // 500, row % 500] for row in range(rows)]
            pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), path)
        return str(path)

    def source(self, number: int, rows: int, **keys) -> MixtureSource:
        path = self.write(number, rows)
        return MixtureSource(name=f"s{number}", dataset="packed", dataset_path=path, **keys)


@pytest.fixture
def packed(tmp_path) -> Folders:
    return Folders(tmp_path)


def keys(sources, batch=4, degree=1, **others) -> DatasetKeys:
    options = {"local_batch_size": batch // degree, "global_batch_size": batch, **others}
    return DatasetKeys(mixture=sources, seq_len=2, **options)


def run(config, degree=1, **options) -> Ranks:
    return Ranks(config, degree, **{"vocab_size": VOCAB, **options})


def rows_read(batches) -> list[list[tuple[int, int]]]:
    """(source, row) of every row of each global batch."""
    return [[(ids[0], ids[1] * 500 + ids[2]) for ids in batch.tolist()] for batch in batches]


def within_four_sigma(count: int, draws: int, share: float) -> bool:
    return abs(count - draws * share) <= 4 * math.sqrt(draws * share * (1 - share))


def test_ten_thousand_rows_are_shared_as_the_weights_say(packed):
    sources = [packed.source(0, 9000, weight=0.7), packed.source(1, 4000, weight=0.3)]
    with run(keys(sources, batch=100)) as ranks:
        steps = rows_read(ranks.read(100))
    counts = Counter(source for step in steps for source, _ in step)
    assert within_four_sigma(counts[0], 10_000, 0.7)
    for lane in (0, 17, 99):  # in each row of the batch too
        assert within_four_sigma(sum(step[lane][0] == 0 for step in steps), 100, 0.7)
    for step in (0, 42):
        assert within_four_sigma(sum(source == 0 for source, _ in steps[step]), 100, 0.7)


def test_the_draws_of_two_seeds_differ(packed):
    sources = [packed.source(0, 200, weight=1), packed.source(1, 200, weight=1)]
    found = []
    for seed in (0, 1, 0):
        with run(keys(sources, batch=8), seed=seed) as ranks:
            found.append([[source for source, _ in step] for step in rows_read(ranks.read(8))])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("shuffle_seed", [None, 5])
def test_each_source_comes_row_for_row_as_it_would_alone(packed, shuffle_seed):
    """Over several epochs of the smaller one: nothing is lost or doubled."""
    sources = [packed.source(0, 60, weight=0.7), packed.source(1, 11, weight=0.3)]
    with run(keys(sources, shuffle_seed=shuffle_seed)) as ranks:
        mixed = rows_read(ranks.read(60))
        epochs = {name: cursor[0] for name, cursor in ranks.save()["positions"][0]["sources"].items()}
    assert epochs["s1"] >= 4
    for number, source in enumerate(sources):
        alone = DatasetKeys(
            dataset="packed",
            dataset_path=source.dataset_path,
            seq_len=2,
            local_batch_size=4,
            shuffle_seed=shuffle_seed,
        )
        with run(alone) as ranks:
            expected = rows_read(ranks.read(60))
        for lane in range(4):
            own = [step[lane] for step in mixed if step[lane][0] == number]
            assert own and own == [step[lane] for step in expected][: len(own)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, {1: 0.5, 10: 0.5, 1000: 0.5}),
        (
            {"schedule": "linear", "start_step": 2, "end_step": 12, "end_weight": 0.0},
            {1: 0.5, 2: 0.5, 7: 0.25, 11: 0.05, 12: 0.0, 99: 0.0},
        ),
        (
            {"schedule": "cosine", "end_step": 12, "end_weight": 0.1},
            {4: 0.4, 6: 0.3, 8: 0.2, 12: 0.1, 99: 0.1},
        ),
        (
            {"schedule": "step", "start_step": 2, "period": 3, "factor": 0.5},
            {1: 0.5, 5: 0.5, 6: 0.25, 8: 0.25, 9: 0.125, 12: 0.0625},
        ),
    ],
    ids=["constant", "linear", "cosine", "step"],
)
def test_a_weight_follows_its_schedule(schedule, expected):
    source = MixtureSource(name="a", dataset="pydoc", weight=0.5, **schedule)
    assert {step: round(weight_at(source, step), 12) for step in expected} == expected


def test_the_shares_of_a_step_are_those_of_its_weights(packed):
    """From all of the one to all of the other, in a batch that grows in four stages to 400 rows."""
    falling = {"weight": 1.0, "schedule": "linear", "end_weight": 0.0, "start_step": 1, "end_step": 9}
    rising = {"weight": 0.0, "schedule": "linear", "end_weight": 1.0, "start_step": 1, "end_step": 9}
    sources = [packed.source(0, 3000, **falling), packed.source(1, 3000, **rising)]
    config = keys(sources, batch=400, batch_ramp_steps=8, batch_ramp_stages=4, local_batch_size=100)
    dims = BatchDims.resolve(config, 0, 1)
    loader = build(config, vocab_size=VOCAB)
    for step in range(1, 11):
        batches = loader.next_step(dims.stages_at(step))
        first = torch.cat([batch.inputs[:, 0] for batch in batches])
        share = min(max(1 - (step - 1) / 8, 0.0), 1.0)
        assert len(first) == dims.rows_at(step)
        assert within_four_sigma(int((first == 0).sum()), len(first), share), step
    assert loader.describe(lambda numbers: [numbers])["weight_s1"] == 1.0
    loader.close()


def test_a_stage_of_the_data_belongs_to_the_step_that_reads_it():
    for ramp in ({}, {"batch_ramp_steps": 10, "batch_ramp_stages": 4}):
        dims = BatchDims.resolve(keys([], batch=16, **{"local_batch_size": 4, **ramp}), 0, 1)
        expected = [(step, stage) for step in range(1, 30) for stage in range(dims.stages_at(step))]
        assert [dims.stage_of(number) for number in range(len(expected))] == expected


def three(packed) -> list[MixtureSource]:
    """Of different kinds, with a schedule and an end: what a position must hold."""
    return [
        MixtureSource(name="text", dataset="pydoc-validation", weight=0.4),
        packed.source(1, 23, weight=0.4, schedule="cosine", end_weight=0.1, end_step=7),
        packed.source(2, 9, weight=0.4, max_epochs=2),
    ]


@pytest.fixture
def expected(packed):
    with run(keys(three(packed), shuffle_seed=3)) as ranks:
        return ranks.read(14)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_global_batches_do_not_depend_on_ranks_and_workers(packed, expected, degree, workers):
    config = keys(three(packed), degree=degree, shuffle_seed=3, num_workers=workers)
    with run(config, degree) as ranks:
        assert equal(ranks.read(14), expected)


@pytest.mark.parametrize("degrees", [(2, 2), (1, 4), (4, 1)])
def test_a_resume_at_any_step_and_on_other_ranks_is_exact(packed, expected, degrees):
    before, after = degrees
    with run(keys(three(packed), degree=before, shuffle_seed=3), before) as ranks:
        states = [ranks.save()]
        for _ in range(11):
            ranks.read(1)
            states.append(ranks.save())
    with run(keys(three(packed), degree=after, shuffle_seed=3), after) as ranks:
        for step in (0, 1, 5, 11):
            assert equal(ranks.load(states[step]).read(3), expected[step : step + 3])


def test_the_checkpoint_holds_a_cursor_of_each_source_by_its_name(packed):
    with run(keys(three(packed), degree=2), 2) as ranks:
        ranks.read(5)
        state = ranks.save()
    assert len(state["positions"]) == 4 and list(state["fingerprint"]["sources"]) == ["text", "s1", "s2"]
    for position in state["positions"]:
        assert position["stage"] == 5 == sum(cursor[3] for cursor in position["sources"].values())
        assert set(position["sources"]) <= {"text", "s1", "s2"}
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("skipped", [[], [[2, 2], [17, 21]]])
def test_a_source_ends_after_its_epochs_with_each_row_as_often(skipped, packed):
    ends = packed.source(0, 22, weight=5, max_epochs=2, skip_ranges=skipped)
    sources = [ends, packed.source(1, 50, weight=1)]
    kept = [row for row in range(22) if not any(first <= row <= last for first, last in skipped)]
    with run(keys(sources)) as ranks:
        seen = Counter(row for step in rows_read(ranks.read(80)) for row in step)
        described = ranks.loaders[0].describe(lambda numbers: [numbers])
    assert {row: count for row, count in seen.items() if row[0] == 0} == {(0, row): 2 for row in kept}
    assert described["tokens_s0"] == 2 * len(kept) * 2 and described["epoch_s0"] == 2
    assert (described["weight_s0"], described["weight_s1"]) == (0.0, 1.0)


def test_a_mixture_that_has_ended_says_so(packed):
    sources = [packed.source(0, 4, weight=1, max_epochs=1), packed.source(1, 9, weight=0)]
    with run(keys(sources)) as ranks:
        ranks.read(1)
        with pytest.raises(DataError, match=r"step 2, row 0: every source has weight 0 or has been"):
            ranks.read(1)


def test_a_row_of_metrics_tells_tokens_epoch_and_weight_of_each_source(packed):
    results = run_on_ranks(2, _described, keys(three(packed), degree=2))
    assert results[1] == {}
    found = results[0]
    with run(keys(three(packed))) as ranks:
        batches = ranks.read(6)
        assert ranks.loaders[0].describe(lambda numbers: [numbers]) == pytest.approx(found)
        positions = ranks.save()["positions"]
    first = torch.cat(batches)[:, 0].tolist()
    assert found["tokens_s1"] == 2 * sum(one == 1 for one in first if one < 3)
    assert found["tokens_s1"] + found["tokens_s2"] + found["tokens_text"] == 6 * 4 * 2
    assert found["epoch_s2"] == max(position["sources"].get("s2", [0])[0] for position in positions)
    weights = {"text": 0.4, "s1": 0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * 6 / 7)), "s2": 0.4}
    assert found["weight_s1"] == pytest.approx(weights["s1"] / sum(weights.values()))
    assert set(found) == {f"{what}_{name}" for what in ("tokens", "epoch", "weight") for name in weights}


def _described(rank, world_size, config):
    loader = build(config, rank, world_size, vocab_size=VOCAB)
    for _ in range(6):
        loader.next_step()
    found = loader.describe(gather_numbers)
    loader.close()
    return found


def test_one_data_set_alone_describes_nothing_and_asks_no_rank():
    loader = build(DatasetKeys(seq_len=8, local_batch_size=1))
    assert loader.describe(lambda numbers: pytest.fail("a collective")) == {}


def test_weights_may_change_at_a_resume_and_each_source_goes_on_where_it_was(packed):
    sources = [packed.source(0, 40, weight=0.5), packed.source(1, 40, weight=0.5)]
    with run(keys(sources)) as ranks:
        before = rows_read(ranks.read(6))
        state = ranks.save()
    changed = [source.model_copy(update={"weight": float(i == 1)}) for i, source in enumerate(sources)]
    with run(keys(changed)) as ranks:
        after = rows_read(ranks.load(state).read(4))
    assert all(source == 1 for step in after for source, _ in step)
    for lane in range(4):
        own = [step[lane][1] for step in before + after if step[lane][0] == 1]
        assert own == [(lane + 4 * i) for i in range(len(own))], "rows g, g + G, ... of the first epoch"


def test_a_source_may_be_added_at_a_resume_and_none_taken_away_or_renamed(packed, caplog):
    first, second = packed.source(0, 40, weight=1), packed.source(1, 40, weight=1)
    with run(keys([first])) as ranks:
        ranks.read(3)
        state = ranks.save()
    with run(keys([first, second])) as ranks:
        after = rows_read(ranks.load(state).read(6))
        both = ranks.save()
    assert min(row for step in after for source, row in step if source == 1) < 4, "from its start"
    assert all(row >= 12 for step in after for source, row in step if source == 0)
    renamed = second.model_copy(update={"name": "other"})
    for sources in ([first], [first, renamed]):
        with (
            run(keys(sources)) as ranks,
            pytest.raises(DataError, match=r"has no source s1, .* keep it with weight = 0"),
        ):
            ranks.load(both)


def test_what_the_others_leave_is_read_of_the_source_that_fills(packed):
    falling = {"weight": 30.0, "schedule": "linear", "end_weight": 0.0, "start_step": 1, "end_step": 31}
    rest = {"weight": 100.0, "fills": "rest"}
    gaps = {"weight": 7.0, "fills": "gaps"}
    for fills, at_start, at_end, after in ((rest, 60.0, 100.0, 70.0), (gaps, 0.0, 7.0, 0.0)):
        sources = [packed.source(0, 20, max_epochs=1, weight=10.0), packed.source(1, 20, **falling)]
        mixture = Mixture([*sources, packed.source(2, 20, **fills)], 0, BatchDims.resolve(keys([]), 0, 1), 2)
        ended = {"s0": [1, 0, 0, 0]}  # a lane that has read its share of the first
        assert mixture.weights(1, {}) == [10.0, 30.0, at_start]
        assert mixture.weights(1, ended) == [0.0, 30.0, after]
        assert mixture.weights(31, ended) == [0.0, 0.0, at_end]


def test_a_resume_of_one_data_set_as_a_mixture_or_the_other_way_is_refused(packed):
    source = packed.source(0, 40, weight=1)
    alone = DatasetKeys(dataset="packed", dataset_path=source.dataset_path, seq_len=2, local_batch_size=4)
    for one, other in ((alone, keys([source])), (keys([source]), alone)):
        with run(one) as ranks:
            state = ranks.save()
        with (
            run(other) as ranks,
            pytest.raises(DataError, match=r"dataset \(was .*a run that began with \[\[training"),
        ):
            ranks.load(state)


def test_data_of_a_source_that_changed_is_named_with_the_source(packed):
    sources = [packed.source(0, 8, weight=1), packed.source(1, 8, weight=1)]
    with run(keys(sources)) as ranks:
        state = ranks.save()
    other = [sources[0], sources[1].model_copy(update={"dataset_path": packed.write(2, 8)})]
    with (
        run(keys(other)) as ranks,
        pytest.raises(DataError, match=r"training\.mixture\.s1: .* what changed is the data: among rows 0"),
    ):
        ranks.load(state)


def test_ranks_that_read_different_sources_are_named_with_the_source(packed):
    configs = [keys([packed.source(0, rows, weight=1)], degree=2) for rows in (8, 12)]
    states = [build(config, rank, 2, vocab_size=VOCAB).state_dict() for rank, config in enumerate(configs)]
    with pytest.raises(DataError, match=r"rank 1: s0: num_samples.*was 8, now 12"):
        merge_states(states)


def test_a_bad_row_is_named_with_its_source(packed):
    with pytest.raises(DataError, match=r"^training\.mixture\.s9: packed: row 0: token 0 has id 9, but"):
        build(keys([packed.source(0, 8, weight=1), packed.source(9, 8, weight=1)]), vocab_size=9)


@pytest.mark.parametrize(
    ("second", "others", "message"),
    [
        ({"weight": 0.0}, {}, "all weights are 0 at step 1"),
        ({"dataset": "pydocs"}, {}, r"training\.mixture\.b\.dataset = 'pydocs' is not a data set"),
        ({"dataset": "synthetic"}, {}, r"spikes and text have different vocabularies"),
        (
            {"dataset": "text"},
            {},
            r"training\.mixture\.b\.dataset = 'text' needs training\.mixture\.b\.dataset_p",
        ),
        ({}, {"stream": True}, r"training\.stream has no place beside \[\[training\.mixture\]\]"),
        ({}, {"dataset": "c4"}, r"training\.dataset has no place"),
        ({}, {"dataset_path": "x"}, r"training\.dataset_path has no place"),
        ({}, {"lane_per_file": True}, r"training\.lane_per_file has no place"),
        ({}, {"pad_id": 3}, r"no source is packed: unset training\.pad_id"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_any_data_is_read(second, others, message):
    first = MixtureSource(name="a", dataset="pydoc", weight=0.0)
    other = MixtureSource(**{"name": "b", "dataset": "pydoc", "weight": 1.0, **second})
    with pytest.raises(ConfigError, match=message):
        training_sets(DatasetKeys(mixture=[first, other], **others))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -0.5}, "greater than or equal to 0"),
        ({"schedule": "square"}, "'constant', 'linear', 'cosine' or 'step'"),
        ({"schedule": "linear", "end_step": 3}, 'schedule = "linear" needs end_weight'),
        ({"period": 3}, 'schedule = "constant" has no period'),
        (
            {"pieces": [{"weight": 1.0, "start_step": 4}, {"weight": 2.0, "start_step": 4}]},
            r"steps \[4, 4\]: expected each to begin after the one before",
        ),
        (
            {"pieces": [{"weight": 1.0}], "schedule": "step", "period": 1, "factor": 1.0},
            'schedule = "step" has no effect',
        ),
        ({"pieces": [{"weight": 1.0, "name": "b"}]}, "Extra inputs"),
        (
            {"schedule": "cosine", "end_weight": 0.0, "start_step": 5, "end_step": 5},
            "must come after start_step",
        ),
        ({"name": "seen"}, r"tokens_seen is another number in metrics\.jsonl"),
        ({"name": "0"}, "must begin with a letter"),
        ({"max_epochs": 0}, "greater than or equal to 1"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MixtureSource(**{"name": "a", "dataset": "pydoc", "weight": 1.0, **changes})


def test_two_sources_of_one_name_are_refused():
    source = MixtureSource(name="a", dataset="pydoc", weight=1.0)
    with pytest.raises(ValueError, match="two sources are called a"):
        DatasetKeys(mixture=[source, source])


def test_weights_that_are_all_zero_later_in_the_run_are_found_at_its_start():
    ending = {"schedule": "linear", "end_weight": 0.0}
    sources = [
        MixtureSource(name="a", dataset="pydoc", weight=1.0, end_step=40, **ending),
        MixtureSource(name="b", dataset="pydoc", weight=1.0, end_step=50, **ending),
    ]
    assert training_sets(DatasetKeys(mixture=sources), steps=49)
    with pytest.raises(ConfigError, match="all weights are 0 at step 50"):
        training_sets(DatasetKeys(mixture=sources), steps=60)
    growing = MixtureSource(name="c", dataset="pydoc", weight=1.0, schedule="step", period=1, factor=9.0)
    with pytest.raises(ConfigError, match=r"mixture\.c: its weight at step 9999 is beyond all numbers"):
        training_sets(DatasetKeys(mixture=[growing]), steps=9999)


def test_text_and_packed_rows_share_the_tokenizers_vocabulary_and_document_masks(packed):
    sources = [MixtureSource(name="a", dataset="pydoc", weight=1.0), packed.source(2, 9, weight=1.0)]
    config = keys(sources, document_mask=True, eos_id=0, pad_id=7)
    assert dataset_vocab_size(config, load_tokenizer("bytes")) == 258
    loader = build(config)
    [batch] = loader.next_step()
    loader.close()
    assert batch.document_ids.shape == batch.inputs.shape
    [_, of_packed] = training_sets(config)
    assert (of_packed.keys.pad_id, training_sets(config)[0].keys.pad_id) == (7, None)
    with pytest.raises(ConfigError, match=r"model\.vocab_size must be given"):
        dataset_vocab_size(keys([sources[1]]), None)


def test_a_row_of_metrics_counts_what_ranks_of_one_row_have_read_once():
    sources = [MixtureSource(name=name, dataset="pydoc", weight=1.0) for name in "ab"]
    mixture = Mixture(
        sources, 0, BatchDims(data_rank=0, data_degree=2, local_batch_size=1, accumulation=1), 8
    )
    of_readers = [[3, 0, 0.5, 1, 0, 0.5], [2, 1, 0.25, 4, 0, 0.75]]  # windows, epoch and share of each source
    alone = mixture.row(of_readers)
    assert (alone["tokens_a"], alone["epoch_a"], alone["weight_a"], alone["tokens_b"]) == (40, 1, 0.375, 40)
    assert mixture.row([numbers for numbers in of_readers for _ in range(3)]) == alone


def test_a_draw_is_a_function_of_seed_step_and_row_alone():
    sources = [MixtureSource(name=name, dataset="pydoc", weight=1.0) for name in "ab"]
    dims = BatchDims.resolve(keys([]), 0, 1)

    def draws(seed):
        mixture = Mixture(sources, seed, dims, seq_len=2)
        return [[mixture.draw(step, row, {}) for row in range(9)] for step in range(1, 10)]

    assert draws(1) == draws(1) != draws(2)
    by_step = draws(1)
    assert len(set(map(tuple, by_step))) > 5 and len(set(zip(*by_step, strict=True))) > 5
