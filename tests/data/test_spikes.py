"""Spike counts as tokens, from memory and from every arrow type they are stored in."""

import numpy as np
import pyarrow as pa
import pytest

from tests.data.helpers import Ranks
from torchtitan_rd.data import DatasetKeys, get_dataset
from torchtitan_rd.data.arrow import TableSource, open_table
from torchtitan_rd.data.spikes import SpikeEncoder, SyntheticRecordings, read_matrix
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.validation import ValidationConfig, validation_keys

EXAMPLE = [[1, 0, 2], [0, 3, 0]]
TOKENS = [255, 1, 0, 255, 0, 3, 255, 2, 0]


def test_the_example_of_the_neural_pile_is_tokenised_bin_by_bin():
    ids = SpikeEncoder().encode(np.array(EXAMPLE, np.uint8), "here")
    assert ids.tolist() == TOKENS
    assert ids.dtype == np.uint8


def test_the_separator_is_the_last_id_of_the_vocabulary():
    ids = SpikeEncoder(1000).encode(np.array([[300], [998]], np.int64), "here")
    assert ids.tolist() == [999, 300, 998]


@pytest.mark.parametrize("count", [255, -1])
def test_a_count_outside_0_to_254_is_refused_with_its_row_neuron_and_bin(count, tmp_path):
    samples = [EXAMPLE, [[0, 0], [0, 0], [0, count]]]
    source = TableSource("primate", _table(samples, pa.int64(), tmp_path), SpikeEncoder())
    assert source.tokens(0).tolist() == TOKENS
    with pytest.raises(DataError, match=rf"primate: row 1, neuron 2, time bin 1: spike count {count} "):
        source.tokens(1)


def test_neurons_of_unequal_length_are_refused_with_their_row(tmp_path):
    source = TableSource("primate", _table([[[1, 2], [3]]], pa.uint8(), tmp_path), SpikeEncoder())
    with pytest.raises(DataError, match="primate: row 0: neuron 1 has 1 time bins, but neuron 0 has 2"):
        source.tokens(0)


@pytest.mark.parametrize("integer", [pa.uint8(), pa.int8(), pa.int16(), pa.int64(), pa.uint32()], ids=str)
def test_lists_of_any_integer_give_the_same_tokens(integer, tmp_path):
    source = TableSource("primate", _table([[[7]], EXAMPLE, [[9]]], integer, tmp_path), SpikeEncoder())
    assert [source.tokens(i).tolist() for i in range(3)] == [[255, 7], TOKENS, [255, 9]]


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.list_(pa.uint8())),
        pa.large_list(pa.large_list(pa.uint8())),
        pa.list_(pa.list_(pa.uint8(), 3)),
        pa.list_(pa.list_(pa.uint8(), 3), 2),
    ],
    ids=str,
)
def test_lists_of_every_arrow_kind_are_read_where_they_lie(type_):
    cells = pa.array([[[4, 4, 4], [4, 4, 4]], EXAMPLE], type_)
    counts = read_matrix(cells[1:], "here")
    assert counts.tolist() == EXAMPLE
    assert not counts.flags.owndata  # no copy was made


def test_a_two_dimensional_array_type_of_the_datasets_library_is_read(tmp_path):
    import datasets

    features = datasets.Features({"spike_counts": datasets.Array2D((None, 3), "uint8")})
    table = datasets.Dataset.from_dict({"spike_counts": [EXAMPLE, EXAMPLE]}, features=features)
    assert TableSource("primate", table, SpikeEncoder()).tokens(1).tolist() == TOKENS


@pytest.mark.parametrize(
    "cell", [pa.array(["text"]), pa.array([[1, 2]]), pa.array([[[0.5]]]), pa.array([[[None, 1]]])]
)
def test_anything_but_whole_lists_of_lists_of_integers_is_refused(cell):
    with pytest.raises(DataError, match=r"^here: "):
        read_matrix(cell, "here")


def test_a_recording_without_neurons_has_no_tokens():
    assert (
        SpikeEncoder()
        .encode(read_matrix(pa.array([[]], pa.list_(pa.list_(pa.uint8()))), "here"), "here")
        .size
        == 0
    )


def test_synthetic_recordings_depend_on_seed_and_index_alone_and_have_the_stated_sizes():
    recordings = SyntheticRecordings(seed=1)
    for index in (0, 5, 1 << 31):
        counts = recordings[index]
        neurons, bins = counts.shape
        assert 10 <= neurons < 1000 and 100 <= bins < 2000
        active = counts.all(axis=1)
        assert active.sum() == neurons // 10 and not counts[~active].any()
        assert np.array_equal(counts, SyntheticRecordings(seed=1)[index])
    assert recordings[0].shape != SyntheticRecordings(seed=2)[0].shape


def test_synthetic_batches_are_the_same_on_any_number_of_ranks_and_differ_between_seeds():
    config = DatasetKeys(dataset="synthetic", seq_len=512, local_batch_size=1, global_batch_size=2)
    with Ranks(config, 1, vocab_size=256) as one, Ranks(config, 2, vocab_size=256) as two:
        [batch], [same] = one.read(1), two.read(1)
    assert batch.equal(same) and not batch[0].equal(batch[1])
    with Ranks(config, 1, vocab_size=256, seed=1) as other:
        assert not other.read(1)[0].equal(batch)


def _table(samples, integer, folder):
    import datasets

    table = pa.table({"spike_counts": pa.array(samples, pa.list_(pa.list_(integer)))})
    datasets.Dataset(table).save_to_disk(str(folder / "saved"))
    return open_table("primate", str(folder / "saved"), None, stream=False)


@pytest.mark.parametrize(
    ("n_neurons", "neurons"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 0]), (5, [0, 1, 0, 1, 0]), (4, [0, 1, 0, 1])]
)
def test_recordings_are_cropped_to_their_first_neurons_or_tiled_in_order(n_neurons, neurons):
    expected = np.array(EXAMPLE)[neurons].T.tolist()
    ids = SpikeEncoder(n_neurons=n_neurons).encode(np.array(EXAMPLE, np.uint8), "here")
    assert ids.tolist() == [id_ for counts in expected for id_ in (255, *counts)]
    assert SpikeEncoder(n_neurons=n_neurons).check(np.array(EXAMPLE), "here") == 3 * n_neurons


def test_a_count_is_refused_only_if_its_neuron_is_kept():
    counts = np.array([[0, 1], [2, 255]])
    assert SpikeEncoder(n_neurons=1).encode(counts, "here").tolist() == [255, 0, 255, 1]
    for n_neurons in (2, 3, None):
        with pytest.raises(DataError, match="here, neuron 1, time bin 1: spike count 255"):
            SpikeEncoder(n_neurons=n_neurons).encode(counts, "here")


def test_a_recording_without_neurons_stays_empty_when_it_should_have_some():
    assert SpikeEncoder(n_neurons=4).encode(np.empty((0, 3), np.uint8), "here").size == 0
    assert SpikeEncoder(n_neurons=4).check(np.empty((0, 3), np.uint8), "here") == 0


@pytest.mark.parametrize("num_lanes", [2, 8], ids=["whole recordings", "recordings in pieces"])
def test_windows_of_n_neurons_have_their_separators_and_resume_exactly_on_two_ranks(num_lanes, tmp_path):
    """40 recordings of 3 to 42 neurons: 8 lanes want 16 pieces each, and cut them between time bins."""
    import datasets

    rows = [np.full((3 + i, 6), i).tolist() for i in range(40)]
    datasets.Dataset.from_dict({"spike_counts": rows}).save_to_disk(str(tmp_path / "saved"))
    keys = {"dataset": "primate", "dataset_path": str(tmp_path / "saved"), "seq_len": 21, "n_neurons": 10}
    config = DatasetKeys(**keys, local_batch_size=1, global_batch_size=num_lanes, shuffle_seed=3)

    with Ranks(config, 1, vocab_size=256) as one:
        batches = one.read(6)
    for batch in batches:  # 22 ids are two time bins of 10 neurons, so every window begins with one
        assert (
            batch[:, [0, 11]].eq(255).all() and batch[:, 1:11].lt(255).all() and batch[:, 12:].lt(255).all()
        )
        assert batch[:, 1:11].eq(batch[:, 1:2]).all() and batch[:, 12:].eq(batch[:, 12:13]).all()

    with Ranks(config, 2, vocab_size=256) as two, Ranks(config, 1, vocab_size=256) as again:
        begun = two.read(2)
        continued = again.load(two.save()).read(4)
    assert all(a.equal(b) for a, b in zip(begun + continued, batches, strict=True))


def test_n_neurons_is_for_spikes_alone_and_holds_for_their_held_out_set():
    with pytest.raises(ConfigError, match=r"'pydoc' holds no spikes: unset training\.n_neurons"):
        get_dataset(DatasetKeys(n_neurons=5))
    training = DatasetKeys(dataset="synthetic", n_neurons=5, local_batch_size=1)
    for dataset, expected in ((None, 5), ("rodent", 5), ("pydoc", None)):
        keys = validation_keys(ValidationConfig(enable=True, dataset=dataset), training, 1)
        assert keys.n_neurons == expected
