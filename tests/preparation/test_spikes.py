"""`torchtitan-rd data prepare-spikes`: recordings as files -> rows of the Neural Pile."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import Ranks
from tests.preparation.common import contents
from tests.preparation.recordings import TRAINS, prepare, rows_of, sessions_of
from torchtitan_rd.__main__ import main
from torchtitan_rd.config import load
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.errors import DataError
from torchtitan_rd.job import Environment
from torchtitan_rd.preparation import spike_folder
from torchtitan_rd.preparation.recordings import read_npz
from torchtitan_rd.preparation.spike_times import END, NANOSECONDS, nanoseconds
from torchtitan_rd.preparation.spikes import count, cut, shuffled, split
from torchtitan_rd.train import Trainer

ROOT = Path(__file__).parent.parent.parent


def test_counts_of_real_spikes_are_those_of_numpys_histogram(tmp_path):
    inputs = [f"grasshopper={file}" for file in TRAINS]
    assert prepare(tmp_path / "out", *inputs, "--unit", "us", "--max-tokens", 300) == 0
    found = sessions_of(tmp_path / "out")
    assert len(found) == 2 and len(rows_of(tmp_path / "out")) == 8
    for file, spikes in zip(TRAINS, (929, 868), strict=True):
        times = np.loadtxt(file, dtype=np.int64)
        expected, _ = np.histogram(times, np.arange(0, times.max() + 20_001, 20_000))
        assert expected.sum() == spikes == len(times)
        assert found["grasshopper", file.stem].tolist() == [expected.tolist()]


def test_a_row_has_the_columns_and_types_of_the_neural_pile(tmp_path):
    prepare(tmp_path / "out", TRAINS[0], "--unit", "us")
    schema = pq.read_schema(tmp_path / "out" / "train-00000.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "spike_counts": "list<element: list<element: uint8>>",
        "source_dataset": "string",
        "session": "string",
        "first_bin": "int64",
    }
    (row,) = rows_of(tmp_path / "out")
    assert (row["source_dataset"], row["session"]) == ("grasshopper", "grasshopper_spike_times1")


def test_spikes_on_an_edge_begin_a_bin_whatever_binary_fractions_make_of_them(tmp_path):
    times = [f"{20 * number / 1000:.3f}" for number in range(1000)]
    (tmp_path / "edges.txt").write_text("\n".join(times))
    prepare(tmp_path / "out", tmp_path / "edges.txt")
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[1] * 1000]
    # The reason for nanoseconds: in floats, some edges lie above what is written the same way.
    floats = np.array(times, float)
    assert np.histogram(floats, np.arange(1001) * 0.02)[0].tolist() != [1] * 1000
    exact = nanoseconds(floats, 10**9, "here")
    assert count([exact], 0, 20_000_000, 1000).tolist() == [[1] * 1000]


def test_a_spike_at_the_stop_lies_outside_and_so_does_what_makes_no_whole_bin(tmp_path):
    (tmp_path / "a.csv").write_text("unit,time\n1,100\n1,119\n1,120\n1,139\n1,140\n1,99\n1,150\n")
    arguments = ("--unit", "ms", "--start", 0.1, "--stop")
    prepare(tmp_path / "out", tmp_path / "a.csv", *arguments, 0.14)
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[2, 2]]
    (facts,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"]
    assert (facts["spikes"], facts["outside"], facts["bins"]) == (7, 3, 2)
    prepare(tmp_path / "longer", tmp_path / "a.csv", *arguments, 0.159)
    assert sessions_of(tmp_path / "longer").popitem()[1].tolist() == [[2, 2]]


def test_a_session_begins_with_the_bin_of_its_first_spike_and_ends_with_that_of_its_last(tmp_path):
    (tmp_path / "late.csv").write_text("unit,time\nb,1000.050\na,1000.039\na,1000.10\n")
    prepare(tmp_path / "out", tmp_path / "late.csv")
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]


def write_formats(folder):
    """The same three units, of which the second is silent, in every format but NWB."""
    trains = [[0.005, 0.1, 0.03], [], [0.0, 0.0199, 0.02, 0.06]]
    (folder / "txt").mkdir()
    for number, train in zip((1, 2, 10), trains, strict=True):
        lines = ["# a comment", *map(str, train)]
        (folder / "txt" / f"unit_{number}.txt").write_text("\n".join(lines) + "\n")
    objects = np.empty(3, object)
    objects[:] = [np.array(train) for train in trains]
    np.savez(folder / "objects.npz", spike_times=objects)
    np.savez(folder / "arrays.npz", **{f"u{i}": np.array(train) for i, train in enumerate(trains)})
    np.savez(folder / "ms.npz", **{f"u{i}": np.array(train) * 1000 for i, train in enumerate(trains)})
    return trains, [[1, 1, 0, 0, 0, 1], [0] * 6, [2, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("name", ["txt", "objects.npz", "arrays.npz", "ms.npz"])
def test_every_format_gives_the_same_rows_and_keeps_silent_neurons(name, tmp_path):
    _, expected = write_formats(tmp_path)
    prepare(tmp_path / "out", tmp_path / name, *(("--unit", "ms") if name == "ms.npz" else ()))
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == expected
    (facts,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"]
    assert len(facts["silent"]) == 1 and facts["units"] == 3 and facts["spikes"] == 7


def test_trains_of_equal_length_in_one_array_of_objects_are_units_too(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([np.array([1, 2]), np.array([0, 3])], dtype=object))
    prepare(tmp_path / "out", tmp_path / "a.npz", "--bin-ms", 1000)
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


class Harmful:
    def __reduce__(self):
        return (print, ("this code was run",))


def test_an_array_of_objects_runs_no_code(tmp_path, capsys):
    harmful = np.empty(1, object)
    harmful[0] = Harmful()
    np.savez(tmp_path / "a.npz", spike_times=harmful)
    assert prepare(tmp_path / "out", tmp_path / "a.npz") == 1
    printed = capsys.readouterr()
    assert "it names builtins.print" in printed.err and "this code was run" not in printed.out


def test_units_and_times_of_a_csv_may_stand_in_any_order_among_other_columns(tmp_path):
    lines = ["depth,time,unit", "5,40,10", "5,25,2", "7,10,2", "7,0,10"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    prepare(tmp_path / "out", tmp_path / "a.csv", "--unit", "ms")
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[1, 1, 0], [1, 0, 1]]


def test_counts_are_taken_as_they_are_and_clipped_on_request_alone(tmp_path, capsys):
    counts = np.array([[0, 254, 255], [900, 1, 2]], np.int32)
    np.savez(tmp_path / "a.npz", spike_counts=counts, other=np.arange(3))
    assert prepare(tmp_path / "out", tmp_path / "a.npz") == 1
    assert "a.npz: unit 0, time bin 2: the count 255 is not in 0..254" in capsys.readouterr().err
    assert prepare(tmp_path / "out", tmp_path / "a.npz", "--clip") == 0
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[0, 254, 254], [254, 1, 2]]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"][0]["clipped"] == 2


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_counts_may_be_of_any_integer_type(kind, tmp_path, capsys):
    most = min(np.iinfo(kind).max, 2**40)
    counts = np.array([[0, 127, most], [1, 2, 3]], kind)
    np.savez(tmp_path / "a.npz", spike_counts=counts)
    assert prepare(tmp_path / "out", tmp_path / "a.npz", "--clip") == 0
    assert sessions_of(tmp_path / "out").popitem()[1].tolist() == [[0, 127, min(most, 254)], [1, 2, 3]]

    if np.iinfo(kind).min < 0:
        np.savez(tmp_path / "b.npz", spike_counts=-counts)
        assert prepare(tmp_path / "none", tmp_path / "b.npz") == 1
        assert "unit 0, time bin 1: the count -127 is not in 0..254" in capsys.readouterr().err


def test_long_sessions_are_cut_equally_into_as_few_rows_as_possible():
    for bins, neurons, most in ((1000, 9, 999), (1000, 9, 1000), (1000, 9, 1001), (7, 3, 1), (999, 0, 100)):
        ranges = cut(bins, neurons, most)
        lengths = [end - begin for begin, end in ranges]
        assert ranges[0][0] == 0 and ranges[-1][1] == bins and sum(lengths) == bins
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) == 1 or max(lengths) * (neurons + 1) <= most
        longest = max(most // (neurons + 1), 1)
        assert len(ranges) == int(np.ceil(bins / longest))


def test_one_percent_of_the_rows_and_at_least_one_of_two_is_held_out():
    held_out = [len(split(list(range(rows)), 0.01)[1]) for rows in (0, 1, 2, 3, 149, 151, 1000)]
    assert held_out == [0, 0, 1, 1, 1, 2, 10]
    assert [len(split([0, 1, 2], share)[1]) for share in (0, 0.99)] == [0, 2]
    train, test = split([3, 1, 0, 2], 0.5)
    assert sorted(train + test) == [0, 1, 2, 3]


def test_the_order_follows_the_seed_and_not_the_order_of_the_inputs(tmp_path):
    names = [("s", f"session {number}", first) for number in range(50) for first in (0, 10)]
    orders = [[names[i] for i in shuffled(names, seed)] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(names)
    assert orders[0] != orders[1] and orders[0] != names
    assert [names[::-1][i] for i in shuffled(names[::-1], 0)] == orders[0]
    # No rank correlation with the order of the sessions that would be seen in 1 of 10 000 draws.
    assert abs(np.corrcoef(shuffled(names, 0), np.arange(100))[0, 1]) < 0.39

    for out, inputs in (("a", TRAINS), ("b", TRAINS[::-1])):
        prepare(tmp_path / out, *inputs, "--unit", "us", "--max-tokens", 300)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_is_searched_for_sessions_named_after_what_holds_them(tmp_path):
    root = tmp_path / "pile"
    (root / "monkey" / "day1").mkdir(parents=True)
    write_formats(root / "monkey" / "day1")
    (root / "notes.md").write_text("not a recording")
    prepare(tmp_path / "out", root)
    sessions = [f"monkey/day1/{name}" for name in ("arrays", "ms", "objects", "txt")]
    assert sorted(sessions_of(tmp_path / "out")) == [("pile", session) for session in sessions]


KILLED = """
import os, signal, sys
import pandas, pyarrow.parquet  # pyarrow imports pandas where it first converts, in each child anew
import torchtitan_rd.commands.data_prepare_spikes as command, torchtitan_rd.preparation.spike_folder

first, step, arguments, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:-1], sys.argv[-1]
EVENTS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open")

def run(events_left, out):
    "In a process of its own, that is killed at an event; its exit status."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def hook(event, values):
        nonlocal events_left
        if event == "open" and "w" not in str(values[1]):
            return
        if event in EVENTS and "out-" in str(values[0]):
            events_left -= 1
            if events_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if events_left:
        sys.addaudithook(hook)
    os._exit(command.main([*arguments, "--output", out]))

assert run(0, f"{out}-whole") == 0
for number in range(first, 1000, step):
    status = run(number, f"{out}-{number:03d}")
    if status == 0:
        break
    assert status == -signal.SIGKILL
    assert run(0, f"{out}-{number:03d}") == 0
print(number)
"""


@pytest.mark.parametrize("first, step", [(2, 6), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_after_a_kill_at_any_moment_the_same_line_makes_the_same_bytes(first, step, tmp_path):
    arguments = [*map(str, TRAINS), "--unit", "us", "--max-tokens", "500"]
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(first), str(step), *arguments, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    whole = contents(tmp_path / "out-whole")
    assert sorted(whole) == [
        "manifest.json",
        "test-00000.parquet",
        "train-00000.parquet",
    ]
    others = sorted(tmp_path.glob("out-[0-9]*"))
    assert [int(path.name[4:]) for path in others] == list(range(first, int(found.stdout) + 1, step))
    assert int(found.stdout) > 15
    assert all(contents(other) == whole for other in others)


def test_finished_work_is_kept_and_other_arguments_are_refused(tmp_path, capsys):
    arguments = (*TRAINS, "--unit", "us")
    prepare(tmp_path / "out", *arguments)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(tmp_path / "out", *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    capsys.readouterr()

    assert prepare(tmp_path / "out", TRAINS[0], "--unit", "us", "--bin-ms", 10) == 1
    error = capsys.readouterr().err
    assert "--bin-ms was 20.0 and is 10.0" in error and "grasshopper_spike_times2 is gone" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "any.txt").touch()
    assert prepare(tmp_path / "foreign", *arguments) == 1
    assert "is not empty (any.txt) and has no manifest.json" in capsys.readouterr().err


def test_a_bad_file_can_be_mended_where_nothing_was_done(tmp_path):
    (tmp_path / "b.txt").write_text("1\n-2\n")
    assert prepare(tmp_path / "out", tmp_path / "b.txt") == 1 and not (tmp_path / "out").exists()
    (tmp_path / "b.txt").write_text("1\n3\n")
    assert prepare(tmp_path / "out", tmp_path / "b.txt") == 0


def test_a_bad_file_leaves_nothing_in_a_folder_that_is_a_link(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "b.txt").write_text("1\n-2\n")
    assert prepare(tmp_path / "out", tmp_path / "b.txt") == 1
    assert "the time -2 is negative" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_session_that_was_read_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "b.txt").write_text("1\n-2\n")
    arguments = (tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt")
    assert prepare(*arguments) == 1

    read = []
    plain = spike_folder.read_recording
    monkeypatch.setattr(
        spike_folder, "read_recording", lambda one, *rest: read.append(one.session) or plain(one, *rest)
    )
    assert prepare(*arguments) == 1 and read == ["b"]


def test_a_folder_that_another_process_makes_is_left_alone(tmp_path, capsys, monkeypatch):
    arguments = (tmp_path / "out", TRAINS[0], "--unit", "us")
    plain = spike_folder.read_recording
    answers = []

    def meanwhile(*given):
        monkeypatch.setattr(spike_folder, "read_recording", plain)
        answers.append(prepare(*arguments))
        return plain(*given)

    monkeypatch.setattr(spike_folder, "read_recording", meanwhile)
    assert prepare(*arguments) == 0 and answers == [1]
    assert "another process is making spikes of it" in capsys.readouterr().err


BAD = {
    "empty.txt": ("", "empty.txt: the file is empty"),
    "blank.txt": ("\n\n", "blank.txt: the file is empty"),
    "silent.txt": ("# nothing\n", "silent.txt: none of its 1 units has a spike"),
    "negative.txt": ("1\n-0.5\n", "negative.txt: line 2: the time -0.5 is negative"),
    "nan.txt": ("1\n2\nnan\n", "nan.txt: line 3: the time nan is not finite"),
    "word.txt": ("1\ntwo\n", "word.txt: line 2: 'two' is no time"),
    "two.txt": ("1 2\n", "two.txt: line 1: '1 2' is no time"),
    "unit.txt": ("1\n99999999999\n", "unit.txt: line 2: the time 99999999999 is too large"),
    "long.txt": ("1\n999999999\n", "long.txt: lasts 999,999,998 seconds"),
    "binary.txt": (b"1\n\xff\n", "binary.txt: line 2: is not UTF-8 text"),
    "binary.csv": (b"unit,time\na,1\n\xff,2\n", "binary.csv: line 3: is not UTF-8 text"),
    "empty.csv": ("", "empty.csv: the file is empty"),
    "column.csv": ("neuron,time\n1,2\n", "column.csv: has no column 'unit', only neuron, time"),
    "none.csv": ("unit,time\n", "none.csv: holds no units"),
    "row.csv": ("unit,time\n1,2\n1\n", "row.csv: line 3: '' is no time"),
    "nobody.csv": ("unit,time\n,2\n", "nobody.csv: line 2: names no unit"),
    "comma.csv": ("unit,time\n1,0,25\n", "comma.csv: line 2: has more cells than the 2"),
    "twice.csv": ("unit,time,time\n1,2,3\n", "twice.csv: its first line names the column 'time' twice"),
    "quote.csv": ('unit,time\n"1,2\n', "quote.csv: line 1: unexpected end"),
    "a.npz": (b"PK not a zip", "a.npz: is no .npz file of plain arrays"),
    "a.nwb": (b"not HDF5", "a.nwb: "),
    "a.mat": (b"MATLAB", "a.mat: not a recording; expected one of .nwb, .npz, .csv, .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_it_and_the_row(name, tmp_path, capsys):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    assert prepare(tmp_path / "out", path) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


BAD_ARRAYS = {
    "negative": ({"u": np.array([1.0, -1.0])}, "unit u, spike 1: the time -1.0 is negative"),
    "nan": ({"u": np.array([np.nan])}, "unit u, spike 0: the time nan is not finite"),
    "shape": ({"u": np.zeros((2, 2))}, "unit u: holds float64 of shape (2, 2); expected one list"),
    "text": ({"u": np.array(["a"])}, "unit u: holds <U1 of shape (1,)"),
    "counts": ({"spike_counts": np.ones((2, 2))}, "spike_counts holds float64 of shape (2, 2)"),
    "below": ({"spike_counts": np.array([[0, -1]])}, "unit 0, time bin 1: the count -1 is not in 0..254"),
    "nothing": ({}, "holds no arrays"),
    "no units": ({"spike_counts": np.zeros((0, 4), int)}, "holds no units"),
    "lists": (
        {"spike_times": np.array([[[1], [1, 2]], [3]], dtype=object)},
        "unit 0: holds lists in a list; expected one list of times",
    ),
    # A unit for each spike, as spike sorters write it: read by name, the numbers of units would be times.
    "clusters": (
        {"spike_times": np.array([0.1, 0.2]), "spike_clusters": np.array([3, 4])},
        "spike_times holds float64 of shape (2,), beside spike_clusters; expected an array of objects",
    ),
    "matrix": ({"spike_times": np.zeros((2, 3))}, "spike_times holds float64 of shape (2, 3); expected an"),
    "one object": ({"spike_times": np.array(None, dtype=object)}, "spike_times is one object"),
    "no bins": ({"spike_counts": np.zeros((4, 0), int)}, "nothing of it is as long as one bin"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_one_line_that_names_unit_and_place(name, tmp_path, capsys):
    arrays, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "a.npz", **arrays)
    assert prepare(tmp_path / "out", tmp_path / "a.npz", "--clip") == 1
    error = capsys.readouterr().err
    assert "a.npz: " in error and message in error and error.count("\n") == 1


def test_damage_anywhere_in_an_npz_file_is_one_line_or_harmless(tmp_path):
    trains = np.empty(2, object)
    trains[:] = [np.arange(200) / 3, np.arange(100) / 7]
    np.savez_compressed(tmp_path / "a.npz", spike_times=trains)
    content = (tmp_path / "a.npz").read_bytes()

    refused = 0
    for place in range(0, len(content), 7):
        (tmp_path / "a.npz").write_bytes(content[:place] + b"\xa5" + content[place + 1 :])
        try:
            read_npz(tmp_path / "a.npz", NANOSECONDS["s"])
        except DataError as error:
            assert "a.npz: " in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(content) // 14


def test_more_than_254_spikes_in_a_bin_are_an_error_that_says_how_to_go_on(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("unit,time\n" + "x,1\n" * 3 + "y,30\n" * 255)
    assert prepare(tmp_path / "out", tmp_path / "a.csv", "--unit", "ms") == 1
    error = capsys.readouterr().err
    assert "a.csv: unit y, time bin 1: the count 255" in error and "(--bin-ms), or --clip" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bin-ms", "0"], "--bin-ms must be a time above 0"),
        (["--bin-ms", "nan"], "--bin-ms must be a time above 0"),
        (["--bin-ms", "1e14"], "--bin-ms must be a time above 0, and at most 100000000000"),
        (["--bin-ms", "1e305"], "--bin-ms must be a time above 0, and at most 100000000000"),
        (["--start", "1e305"], "--start must be a number of seconds from 0 to 9000000000"),
        (["--start", "1e12"], "--start must be a number of seconds from 0 to 9000000000"),
        (["--stop", "1e12"], "--stop must be later than --start, and at most 9000000000"),
        (["--unit", "h"], "--unit must be one of s, ms, us, ns"),
        (["--test-share", "1"], "--test-share must be at least 0 and below 1"),
        (["--start", "2", "--stop", "1"], "--stop must be later than --start"),
        (["--start", "-1"], "--start must be a number of seconds from 0"),
        (["--where", "location"], "--where location: expected COLUMN=VALUE"),
        (["--where", "location=V1"], "--where and --intervals are for .nwb files alone"),
        (["--start", "99999", "--unit", "us"], "has no spike between --start and --stop"),
        (["elsewhere"], "elsewhere: no such file or folder"),
        ([str(TRAINS[0])], "are both session 'grasshopper_spike_times1' of source 'grasshopper'"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, tmp_path, capsys):
    assert prepare(tmp_path / "out", TRAINS[0], *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_same_line_goes_on(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    arguments = (tmp_path / "out", TRAINS[0], "--unit", "us")
    with monkeypatch.context() as patch:
        patch.setattr(spike_folder, "_write_file", full)
        assert prepare(*arguments) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"out: no room to write \(No space left on device: [\d,]+ bytes are free in \S+/out\): free some",
        error,
    )
    assert error.count("\n") == 1
    assert prepare(*arguments) == 0


def test_a_loader_reads_the_rows_as_tokens_and_a_run_trains_on_them(tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(out, *TRAINS, "--unit", "us", "--max-tokens", 300)
    (first, *_) = rows_of(out, "train")
    expected = [id_ for count_ in first["spike_counts"][0] for id_ in (255, count_)]
    keys = DatasetKeys(dataset="primate", dataset_path=str(out), seq_len=64, local_batch_size=1)
    with Ranks(keys, vocab_size=256) as ranks:
        (window,) = ranks.read(1)
    assert window[0].tolist() == expected[:65]

    environment = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
    run = {
        "model.overrides.n_layers": 1,
        "training.dataset": "rodent",
        "training.dataset_path": out,
        "training.source_dataset": "grasshopper",
        "training.seq_len": 32,
        "training.local_batch_size": 4,
        "training.steps": 8,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 0,
        "optimizer.lr": 3e-3,
        "metrics.log_freq": 1,
        "job.dump_folder": tmp_path / "run",
    }
    Trainer(load([f"--{key}={value}" for key, value in run.items()], environment), environment).run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 8 and losses[-1] < losses[0] - 1


def test_the_library_that_a_format_needs_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynwb", None)
    (tmp_path / "a.nwb").write_bytes(b"any")
    assert prepare(tmp_path / "out", tmp_path / "a.nwb") == 1
    assert "pip install 'torchtitan_rd[nwb]'" in capsys.readouterr().err


def test_nanoseconds_of_integers_are_exact():
    large = 2**53 + 1
    assert nanoseconds(np.array([large, 3]), 1, "here").tolist() == [3, large]
    assert nanoseconds(np.array([7], np.uint8), 10**9, "here").tolist() == [7 * 10**9]
    with pytest.raises(DataError, match="too large"):
        nanoseconds(np.array([10**10]), 10**9, "here")
    # Of a format whose time 0 lies within a session (test_nwb.py, which needs pynwb).
    assert nanoseconds(np.array([2, -1.5]), 10**9, "here", -END).tolist() == [-1_500_000_000, 2 * 10**9]


def test_large_results_are_several_files_of_bounded_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(spike_folder, "_TOKENS_PER_FILE", 700)
    monkeypatch.setattr(spike_folder, "_TOKENS_PER_GROUP", 250)
    out = tmp_path / "out"
    prepare(out, *TRAINS, "--unit", "us", "--max-tokens", 100, "--test-share", 0.4)
    files = sorted(path.name for path in out.glob("*.parquet"))
    assert files == [f"test-0000{n}.parquet" for n in range(2)] + [f"train-0000{n}.parquet" for n in range(2)]

    groups = [pq.ParquetFile(out / name).metadata for name in files]
    sizes = [m.row_group(g).column(0).num_values * 2 for m in groups for g in range(m.num_row_groups)]
    assert max(sizes) < 250 + 100 and sum(sizes) == 1998
    counts = [m.num_rows for m in groups]
    manifest = json.loads((out / "manifest.json").read_text())
    assert [manifest["files"][name]["rows"] for name in files] == counts and sum(counts) == 20
    assert {name: split_["rows"] for name, split_ in manifest["splits"].items()} == {"train": 12, "test": 8}
    assert sum(counts_.sum() for counts_ in sessions_of(out).values()) == 929 + 868


@pytest.mark.slow
def test_the_lines_of_the_page_run_as_they_are_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for folder in ("tests", "train_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "spikes.md").read_text().replace("\\\n", " ")
    lines = re.findall("^    (torchtitan-rd .*)$", page, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["data", "data", "train", "eval", "generate-spikes"]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line

    records = [json.loads(line) for line in Path("outputs/spikes/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] > 5 and losses[-1] < 0.4
    assert len(list(Path("outputs").rglob("*.png"))) == 2
