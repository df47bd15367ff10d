"""Lanes, their cursors and the order of the samples."""

import numpy as np
import pytest

from torchtitan_rd.data.cursor import Cursor, LaneReader, SkippingSource, permuted, piece_of
from torchtitan_rd.errors import DataError


class Counted:
    """Samples of ids that count how often they are read."""

    name, border_id = "counted", None

    def __init__(self, samples):
        self.samples, self.reads = samples, 0

    def __len__(self):
        return len(self.samples)

    def tokens(self, index):
        self.reads += 1
        return np.asarray(self.samples[index])

    def piece(self, index, part, parts):
        return piece_of(self.tokens(index), part, parts)


class Endless:
    """A million samples of 1000 ids, none of which is kept."""

    name, border_id = "endless", None

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 1_000_000

    def tokens(self, index):
        self.reads += 1
        return np.arange(index, index + 1000)


def windows(reader, count, cursor=Cursor()):  # noqa: B008 (a tuple)
    found = []
    for _ in range(count):
        row = reader.read(cursor)
        found.append(row.ids.tolist())
        cursor = row.position
    return found, cursor


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_every_epoch_is_a_permutation_of_the_samples(size):
    orders = [[permuted(i, size, seed=3, epoch=epoch) for i in range(size)] for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 64:
        assert orders[0] != orders[1] != orders[2] != list(range(size))


def test_the_permutation_is_spread_evenly():
    size, seeds = 8, 4000
    counts = np.zeros((size, size), int)
    for seed in range(seeds):
        for position in range(size):
            counts[position, permuted(position, size, seed, epoch=0)] += 1
    expected = seeds / size
    chi_square = ((counts - expected) ** 2 / expected).sum() / (size * size)
    assert chi_square < 2  # about 0.87 for uniform draws


def test_windows_run_across_samples_and_epochs_without_gap_or_overlap():
    samples = [[0, 1, 2], [10, 11], [20, 21, 22, 23], [30]]
    even = LaneReader(Counted(samples), lane=0, num_lanes=2, seq_len=3)
    odd = LaneReader(Counted(samples), lane=1, num_lanes=2, seq_len=3)
    # File order: lane 0 reads samples 0 and 2, and after the epoch (shifted by one) 1 and 3;
    # lane 1 the other way.
    assert windows(even, 3) == ([[0, 1, 2, 20], [21, 22, 23, 10], [11, 30, 0, 1]], Cursor(2, 0, 2))
    assert windows(odd, 2) == ([[10, 11, 30, 0], [1, 2, 20, 21]], Cursor(1, 1, 2))


def test_an_epoch_of_all_lanes_holds_every_sample_once_also_when_shuffled():
    samples = [[i] for i in range(103)]
    found = []
    for lane in range(4):
        reader = LaneReader(Counted(samples), lane, num_lanes=4, seq_len=1, shuffle_seed=5)
        cursor = Cursor()
        while cursor.epoch == 0:
            row = reader.read(cursor)
            cursor = row.position
            found += row.ids[: 2 if cursor.epoch == 0 or cursor.unit == 0 else 1].tolist()
    assert sorted(found) == list(range(103))


def test_fewer_samples_than_lanes_are_cut_into_pieces_that_cover_them():
    samples = [list(range(10)), list(range(100, 111))]
    readers = [LaneReader(Counted(samples), lane, num_lanes=5, seq_len=1) for lane in range(5)]
    assert [reader.num_units for reader in readers] == [6] * 5
    found = [windows(reader, 1)[0][0] for reader in readers]
    assert found == [[0, 1], [3, 4], [6, 7], [100, 101], [103, 104]]
    units = [reader._unit(0, index).tolist() for reader in readers for index in range(reader._units_in(0))]
    assert sorted(id_ for unit in units for id_ in unit) == [*range(10), *range(100, 111)]


def test_pieces_even_out_the_shares_of_lanes_when_documents_are_few_and_unequal():
    lengths = np.random.default_rng(0).lognormal(8, 1.2, 79).astype(int)
    source = Counted([np.zeros(length, np.uint8) for length in lengths])

    def shares(units_per_lane):
        readers = [
            LaneReader(source, lane, 32, seq_len=1, shuffle_seed=0, units_per_lane=units_per_lane)
            for lane in range(32)
        ]
        return [sum(len(r._unit(0, index)) for index in range(r._units_in(0))) for r in readers]

    whole, pieces = shares(1), shares(16)
    assert sum(whole) == sum(pieces) == lengths.sum()
    assert max(pieces) < 4 * min(pieces) and max(whole) > 10 * min(whole)


@pytest.mark.parametrize("samples", [[[5]], [[], [5]], [[1, 2], [], []]])
def test_tiny_data_feeds_any_number_of_lanes(samples):
    for lane in range(7):
        found, _ = windows(LaneReader(Counted(samples), lane, num_lanes=7, seq_len=4, shuffle_seed=0), 3)
        assert {len(window) for window in found} == {5}


def test_data_without_a_token_is_refused_instead_of_searched_for_ever():
    with pytest.raises(DataError, match="counted: none of its 3 samples holds a token"):
        LaneReader(Counted([[], [], []]), 0, num_lanes=2, seq_len=4).read(Cursor())


@pytest.mark.parametrize("shuffle_seed", [None, 11])
def test_a_cursor_is_all_the_state(shuffle_seed):
    samples = [list(range(100 * i, 100 * i + 7 * (i % 5))) for i in range(20)]
    make = lambda: LaneReader(Counted(samples), 1, 3, seq_len=9, shuffle_seed=shuffle_seed)  # noqa: E731
    expected, _ = windows(make(), 60)
    for stop in (1, 2, 13, 59):
        head, cursor = windows(make(), stop)
        tail, _ = windows(make(), 60 - stop, list(cursor))
        assert head + tail == expected


def test_a_resume_far_into_the_data_reads_no_more_samples_than_an_early_one():
    reads = []
    for count in (100, 100_000):
        source = Endless()
        reader = LaneReader(source, 0, num_lanes=8, seq_len=249, shuffle_seed=1)
        cursor = Cursor(0, count // 4, 0)  # window number `count`: four windows of 250 a sample
        reader.read(cursor)
        reads.append(source.reads)
    assert reads == [1, 1]


def test_a_sample_is_read_once_however_many_windows_it_holds():
    source = Endless()
    windows(LaneReader(source, 0, num_lanes=8, seq_len=249), 40)
    assert source.reads == 10


def test_document_ids_change_where_a_sample_ends():
    reader = LaneReader(Counted([[1, 2, 3], [], [4], [5, 6, 7, 8]]), 0, 1, seq_len=5, document_mask=True)
    row = reader.read(Cursor())
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.document_ids.tolist() == [0, 0, 0, 1, 2]
    assert row.document_ids.dtype == np.int32


def skipping(ranges, lane, rows=8, lanes=2, **options):
    """A lane of rows of one window each: row r is the ids r, r."""
    source = SkippingSource(Counted([[row, row] for row in range(rows)]), ranges)
    return LaneReader(source, lane, lanes, seq_len=1, skip_ranges=ranges, **options)


def rows_of_epoch_0(reader, cursor=Cursor()):  # noqa: B008 (a tuple)
    found = []
    while cursor[0] == 0:
        window = reader.read(cursor)
        found.append(int(window.ids[0]))
        cursor = window.position
    return found, cursor


def test_an_epoch_ends_with_the_last_row_that_is_not_skipped():
    for lane, rows in ((0, [0, 2, 4]), (1, [1, 3, 5])):
        assert rows_of_epoch_0(skipping([[6, 7]], lane)) == (rows, (1, 0, 0))
    # A share that is skipped as a whole is passed too: in epoch 1 lane 0 would read the odd rows.
    odd = [[row, row] for row in (1, 3, 5, 7)]
    assert rows_of_epoch_0(skipping(odd, 0)) == ([0, 2, 4, 6], (2, 0, 0))
    even, odd = (rows_of_epoch_0(skipping([[3, 9]], lane, 23, shuffle_seed=5))[0] for lane in range(2))
    assert sorted(even + odd) == [0, 1, 2, *range(10, 23)]


def test_skipped_rows_inside_an_epoch_keep_their_places_and_old_positions_go_on():
    reader = skipping([[2, 3], [6, 7]], 0)
    assert reader.read(Cursor()).position == (0, 1, 0)  # row 2, which a resume may read again
    found, cursor = windows(reader, 4)
    assert found == [[0, 0], [4, 4], [1, 1], [5, 5]] and cursor == (2, 0, 0)
    # Versions before stopped in front of the rows that are skipped at the end.
    assert windows(reader, 2, [0, 3, 0]) == ([[1, 1], [5, 5]], (2, 0, 0))
