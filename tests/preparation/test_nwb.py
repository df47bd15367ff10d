"""`torchtitan-rd data prepare-spikes` on files that pynwb itself has written."""

import json
from datetime import datetime, timezone

import numpy as np
import pytest

from tests.preparation.recordings import prepare, rows_of, sessions_of

pynwb = pytest.importorskip("pynwb", reason="the extra `nwb` is not installed")

TRAINS = {3: [0.005, 0.1, 0.03], 10: [], 12: [0.0, 0.0199, 0.02, 0.06]}
COUNTS = {3: [1, 1, 0, 0, 0, 1], 10: [0] * 6, 12: [2, 1, 0, 1, 0, 0]}


@pytest.fixture
def recording(tmp_path):
    """Three units, of which two lie in V1 and two are good, and three trials."""
    session = pynwb.NWBFile("about", "identifier", datetime(2020, 1, 1, tzinfo=timezone.utc))
    device = session.create_device("probe")
    for area in ("V1", "M1"):
        group = session.create_electrode_group(area, description=area, location=area, device=device)
        session.add_electrode(location=area, group=group)
    session.add_unit_column("quality", "by hand")
    for (unit, train), electrode, quality in zip(
        TRAINS.items(), (0, 1, 0), ("good", "good", "mua"), strict=True
    ):
        session.add_unit(id=unit, spike_times=train, electrodes=[electrode], quality=quality)
    for start, stop in ((0.0, 0.06), (0.02, 0.0799), (0.0, 0.01)):
        session.add_trial(start_time=start, stop_time=stop)
    path = tmp_path / "session.nwb"
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(session)
    return path


def counts_of(folder):
    return sessions_of(folder).popitem()[1].tolist()


def test_all_units_are_read_in_seconds_and_silent_ones_are_kept(recording, tmp_path):
    assert prepare(tmp_path / "out", recording, "--unit", "ms") == 0
    assert counts_of(tmp_path / "out") == list(COUNTS.values())
    (facts,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"]
    assert facts["silent"] == ["10"] and facts["session"] == "session"


@pytest.mark.parametrize(
    ("where", "units"),
    [
        (["location=V1"], [3, 12]),
        (["location=M1,V1", "quality=good"], [3, 10]),
        (["quality=mua", "location=V1"], [12]),
    ],
)
def test_units_are_chosen_by_their_columns_and_by_those_of_their_electrodes(
    where, units, recording, tmp_path
):
    arguments = [argument for condition in where for argument in ("--where", condition)]
    prepare(tmp_path / "out", recording, *arguments, "--start", 0, "--stop", 0.12)
    assert counts_of(tmp_path / "out") == [COUNTS[unit] for unit in units]


def test_each_interval_becomes_a_recording_of_whole_bins(recording, tmp_path):
    prepare(tmp_path / "out", recording, "--intervals", "trials")
    found = {row["session"]: np.array(row["spike_counts"]) for row in rows_of(tmp_path / "out")}
    assert {name: counts.tolist() for name, counts in found.items()} == {
        "session/trials-0": [counts[:3] for counts in COUNTS.values()],
        "session/trials-1": [counts[1:3] for counts in COUNTS.values()],
    }
    # 0.1 and, in the second trial, what ends before 0.06 lies in no bin of any trial.
    (facts,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"]
    assert facts["rows"] == 2 and facts["spikes"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "location=V2"], "has no unit with location = V2; there are location: M1, V1"),
        (["--where", "locations=V1"], "--where locations: neither the units"),
        (["--intervals", "trial"], "has no intervals 'trial'; did you mean 'trials'?"),
        (["--intervals", "trials", "--start", "0"], "leave out --start and --stop"),
    ],
)
def test_what_a_file_does_not_have_is_one_line(arguments, message, recording, tmp_path, capsys):
    assert prepare(tmp_path / "out", recording, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_times_before_the_reference_time_are_read_and_a_start_leaves_them_out(tmp_path):
    session = pynwb.NWBFile("about", "identifier", datetime(2020, 1, 1, tzinfo=timezone.utc))
    session.add_unit_column("areas", "of several electrodes", index=True)
    session.add_unit(spike_times=[-0.05, -0.04, 0.0, 0.01], areas=["V1", "MT"])
    session.add_unit(spike_times=[-0.001, 0.03], areas=["V1"])
    session.add_trial(start_time=-0.04, stop_time=0.02)
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(session)

    for name, arguments, counts in (
        ("all", (), [[1, 1, 0, 2, 0], [0, 0, 1, 0, 1]]),  # from -0.06 on
        ("start", ("--start", 0), [[2, 0], [0, 1]]),
        ("trial", ("--intervals", "trials"), [[1, 0, 2], [0, 1, 0]]),
        ("area", ("--where", "areas=MT"), [[1, 1, 0, 2]]),
    ):
        assert prepare(tmp_path / name, tmp_path / "a.nwb", *arguments) == 0
        assert counts_of(tmp_path / name) == counts
    (facts,) = json.loads((tmp_path / "start" / "manifest.json").read_text())["sessions"]
    assert (facts["spikes"], facts["outside"]) == (6, 3)


@pytest.mark.parametrize(("times", "message"), [([-1e10, 1.0], "too early"), ([1.0, np.nan], "not finite")])
def test_a_bad_time_is_one_line_that_names_its_unit(times, message, tmp_path, capsys):
    session = pynwb.NWBFile("about", "identifier", datetime(2020, 1, 1, tzinfo=timezone.utc))
    session.add_unit(id=7, spike_times=times)
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(session)
    assert prepare(tmp_path / "out", tmp_path / "a.nwb") == 1
    error = capsys.readouterr().err
    assert "a.nwb: unit 7, spike" in error and message in error


def test_a_file_without_units_is_one_line(tmp_path, capsys):
    session = pynwb.NWBFile("about", "identifier", datetime(2020, 1, 1, tzinfo=timezone.utc))
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(session)
    assert prepare(tmp_path / "out", tmp_path / "a.nwb") == 1
    assert "a.nwb: has no table of units with spike times" in capsys.readouterr().err
