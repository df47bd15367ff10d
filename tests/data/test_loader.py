"""The sequence of global batches, whatever the ranks, workers and accumulation; and resuming it."""

import copy
import json
import logging
import re

import pytest
import torch

from tests.data.helpers import Ranks, build, equal
from tests.ranks import run_on_ranks
from torchtitan_rd.data import DATASETS, DatasetKeys, get_dataset, merge_states
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger

GLOBAL = 8
STEPS = 6


def keys(degree=1, accumulation=1, **others):
    local = GLOBAL // degree // accumulation
    return DatasetKeys(
        seq_len=others.pop("seq_len", 600),
        local_batch_size=local,
        global_batch_size=GLOBAL,
        shuffle_seed=7,
        **others,
    )


@pytest.fixture(scope="module")
def expected():
    with Ranks(keys()) as run:
        return run.read(STEPS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_global_batches_do_not_depend_on_ranks_accumulation_and_workers(
    degree, accumulation, workers, expected
):
    with Ranks(keys(degree, accumulation, num_workers=workers), degree) as run:
        assert run.loaders[0].num_workers == workers
        assert equal(run.read(STEPS), expected)


@pytest.mark.parametrize("workers_before,workers_after", [(0, 2), (2, 0)])
@pytest.mark.parametrize("degree_before,degree_after", [(2, 2), (2, 1), (1, 4)])
def test_a_resume_on_other_ranks_and_workers_continues_the_same_batches(
    degree_before, degree_after, workers_before, workers_after, expected
):
    with Ranks(keys(degree_before, num_workers=workers_before), degree_before) as before:
        head = before.read(2)
        state = before.save()
    with Ranks(keys(degree_after, 2, num_workers=workers_after), degree_after) as after:
        assert equal(head + after.load(state).read(STEPS - 2), expected)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_a_resume_at_every_step_around_the_ends_of_epochs_is_exact(shuffle_seed, tmp_path):
    config = _small_text(tmp_path, shuffle_seed=shuffle_seed)
    with Ranks(config, 2) as run:
        states, batches = [run.save()], []
        for _ in range(12):
            batches += run.read(1)
            states.append(run.save())
    epochs = [max(position[0] for position in state["positions"]) for state in states]
    assert epochs[0] == 0 and epochs[-1] >= 3
    for step in range(0, 10, 2 if shuffle_seed is None else 3):
        with Ranks(config, 2) as resumed:
            assert equal(resumed.load(states[step]).read(3), batches[step : step + 3])


def test_a_state_taken_between_steps_is_that_of_the_steps_returned_and_not_of_those_read_ahead(expected):
    with Ranks(keys(num_workers=2)) as run:
        start = run.save()
        run.read(3)
        middle = run.save()
        assert equal(run.read(1), expected[3:4])
        assert equal(run.load(middle).read(3), expected[3:6])
        assert equal(run.load(start).read(1), expected[:1])


def test_the_second_and_the_third_resume_are_as_exact_as_the_first(expected):
    found, state = [], None
    for _ in range(3):
        with Ranks(keys(2), 2) as run:
            found += (run.load(state) if state else run).read(2)
            state = run.save()
    assert equal(found, expected)


def test_closing_and_reading_on_loses_nothing(expected):
    with Ranks(keys(num_workers=2)) as run:
        head = run.read(2)
        for loader in run.loaders:
            loader.close()
            loader.close()
        assert equal(head + run.read(2), expected[:4])


def test_ranks_of_a_process_group_read_what_one_process_reads(expected):
    results = run_on_ranks(2, _rank_body)
    assert torch.equal(torch.cat(results), expected[1])


def _rank_body(rank, world_size):
    loader = build(keys(2, 2), rank, world_size)
    loader.next_step()
    batches = loader.next_step()
    loader.close()
    return torch.cat([torch.cat([batch.inputs[:, :1], batch.labels], dim=1) for batch in batches])


def test_the_state_is_json_and_small_and_the_same_from_all_ranks():
    with Ranks(keys(4), 4) as run:
        run.read(1)
        state = run.save()
    assert json.loads(json.dumps(state)) == state
    assert [len(state["positions"]), len(state["positions"][0])] == [GLOBAL, 3]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seq_len": 32}, r"seq_len \(was 600, now 32\); set training\.seq_len = 600"),
        ({"shuffle_seed": 8}, r"shuffle_seed \(was 7, now 8\); set training\.shuffle_seed = 7"),
        (
            {"global_batch_size": 4},
            r"was 8, now 4\); set training\.global_batch_size = 8, which any number of ranks",
        ),
        ({"dataset": "synthetic"}, r"dataset \(was 'pydoc', now 'synthetic'\)"),
    ],
)
def test_a_resume_with_other_settings_is_refused_with_the_key_and_both_values(change, message):
    with Ranks(keys()) as run:
        state = run.save()
    config = keys().model_copy(update={"local_batch_size": 4, **change})
    loader = build(config)
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(state)


def test_a_batch_size_that_follows_the_ranks_is_refused_on_other_ranks_with_the_key_to_fix():
    config = DatasetKeys(seq_len=16, local_batch_size=2)
    with Ranks(config, 2) as run:
        state = run.save()
    with pytest.raises(DataError, match=r"set training\.global_batch_size = 4"):
        build(config, 0, 1).load_state_dict(state)
    build(config.model_copy(update={"global_batch_size": 4}), 0, 1).load_state_dict(state)


def test_a_resume_with_other_data_is_refused(tmp_path):
    config = _small_text(tmp_path)
    with Ranks(config) as run:
        state = run.save()
    (tmp_path / "0.txt").write_text("another beginning")
    with pytest.raises(
        DataError, match=r"among rows 0 of 7, .*0\.txt had 11 bytes and has 17\); put the former data"
    ):
        build(config).load_state_dict(state)


def test_ranks_that_see_different_data_are_found_when_their_states_meet():
    states = [build(keys(2), rank, 2).state_dict() for rank in range(2)]
    states[1] = copy.deepcopy(states[1])
    states[1]["fingerprint"]["num_samples"] = 5
    with pytest.raises(
        DataError, match=r"other data than data rank 0[^$]*rank 1: num_samples.*was 79, now 5"
    ):
        merge_states(states)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_data_arrives_with_its_own_words_and_kind(workers, tmp_path):
    import datasets

    counts = [[[1] * 40]] * 5 + [[[1] * 20 + [255] + [1] * 19], [[1] * 40]]
    datasets.Dataset.from_dict({"spike_counts": counts}).save_to_disk(str(tmp_path / "saved"))
    config = DatasetKeys(
        dataset="rodent",
        dataset_path=str(tmp_path / "saved"),
        seq_len=19,
        local_batch_size=2,
        num_workers=workers,
    )
    with Ranks(config, vocab_size=256) as run, pytest.raises(DataError) as caught:
        run.read(10)
    assert str(caught.value).startswith("rodent: row 5, neuron 0, time bin 20: spike count 255")
    assert "\n" not in str(caught.value)


def test_workers_serve_whole_rows_and_the_log_says_when_fewer_are_used(caplog):
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger=logger.name):
        loader = build(DatasetKeys(seq_len=8, local_batch_size=4, num_workers=3))
    assert loader.num_workers == 2
    assert "2 of training.num_workers = 3" in caplog.text


def test_the_end_of_an_epoch_is_logged_once(caplog, tmp_path):
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger=logger.name), Ranks(_small_text(tmp_path)) as run:
        run.read(12)
    begun = re.findall(r"epoch (\d+) of text begins", caplog.text)
    assert len(begun) >= 3 and sorted(set(begun)) == begun


def test_document_ids_follow_the_rows_through_workers():
    config = keys(document_mask=True, seq_len=3000, num_workers=2)
    loader = build(config)
    [batch] = loader.next_step()
    loader.close()
    starts = batch.inputs == 256  # bos
    starts[:, 0] = False
    steps = batch.document_ids.diff(dim=1, prepend=torch.zeros(len(starts), 1, dtype=torch.int32))
    assert set(steps.unique().tolist()) == {0, 1}
    assert (steps[starts] == 1).all() and starts.any(), (
        "a document begins at its bos (and at a piece of another)"
    )
    assert steps.sum() < 100 * len(starts), "and nowhere else"


def test_a_data_set_that_is_not_in_the_table_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"training\.dataset = 'primates' is not a data set; did you mean 'primate'"
    ):
        get_dataset(DatasetKeys(dataset="primates"))


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_of_the_table_is_complete(name, tmp_path):
    row = DATASETS[name]
    assert not (row.hub and row.samples)
    (tmp_path / "rows.parquet").touch()
    path = None if row.hub or row.samples else str(tmp_path)
    assert get_dataset(DatasetKeys(dataset=name, dataset_path=path)) is row


def _small_text(folder, **others):
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    return DatasetKeys(
        dataset="text",
        dataset_path=str(folder),
        seq_len=20,
        local_batch_size=2,
        global_batch_size=4,
        **others,
    )
