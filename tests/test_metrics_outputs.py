"""The outputs besides metrics.jsonl: the terminal, TensorBoard, Weights & Biases."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_metrics import TOKENS, make, result_of, rows, train
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import init_logging, logger


def output_on_a_terminal(tmp_path, monkeypatch, columns=200, **keys) -> str:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    handlers = logger.handlers[:]
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        init_logging()
        stream = logger.handlers[0].stream
        metrics = make(tmp_path, total_steps=2, peak_tflops=1e3, **keys)
        metrics.start(0, 0)
        metrics.add(result_of(1))
        metrics.log(1, lr=0.1, tokens_seen=TOKENS)
        logger.info("a line of another room")
        metrics.add(result_of(2))
        metrics.log(2, lr=0.1, tokens_seen=2 * TOKENS)
        metrics.close()
        assert logger.handlers[0].stream is stream
        written = b""
        # One read gives only what the kernel has passed on by then.
        while select.select([master], [], [], 0.5)[0]:
            written += os.read(master, 100_000)
        text = written.decode()
    os.close(master)
    logger.handlers[:] = handlers
    return text


def test_a_terminal_shows_coloured_whole_lines_and_a_progress_bar(tmp_path, monkeypatch):
    text = output_on_a_terminal(tmp_path, monkeypatch)
    assert "\033[32mloss: " in text and "% (causal " in text and "eta" not in text
    assert "2/2" in text and "100%" in text
    # The bar is cleared before a log line is written, so that each one starts at the left edge.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    logged = [line for line in lines if " I " in line]
    assert len(logged) == 3 and all(re.match(r"\d\d:\d\d:\d\d I ", line) for line in logged)


def test_a_terminal_of_unknown_width_gets_the_eta_in_the_line_instead_of_a_bar(tmp_path, monkeypatch):
    text = output_on_a_terminal(tmp_path, monkeypatch, columns=0)
    assert "\033[32mloss: " in text and "50.0% eta: 0:00:00" in text and "2/2" not in text


def test_colours_can_be_switched_off_on_a_terminal(tmp_path, monkeypatch):
    assert "\033[3" not in output_on_a_terminal(tmp_path, monkeypatch, disable_color_printing=True)


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_the_ancestors_names_and_each_step_once_after_a_restart(tmp_path):
    train(tmp_path, 0, 10, enable_tensorboard=True, peak_tflops=1.0)  # killed
    (run,) = (tmp_path / "tb").iterdir()
    assert re.fullmatch(r"\d{8}-\d{4}", run.name)
    run.rename(tmp_path / "tb" / "20260101-0000")
    train(tmp_path, 3, 12, enable_tensorboard=True, peak_tflops=1.0)
    (run,) = (tmp_path / "tb").iterdir()
    points = tensorboard_points(run)
    assert {
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "wps",
        "mfu(%)",
        "mfu_causal(%)",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "time_metrics/data_loading(%)",
        "memory/max_rss(GiB)",
    } <= points.keys()
    assert [step for step, _ in points["loss_metrics/global_avg_loss"]] == [1, 5, 10, 12]
    assert points["mfu(%)"][-1][1] == pytest.approx(100 * rows(tmp_path)[-1]["mfu_full"], rel=1e-6)


class FakeWandb(types.ModuleType):
    """A wandb whose server keeps, for each run id, the rows it was sent,
    and the metadata that wandb adds itself.

    meta_field: what the setting that turns off metadata is called in its version.
    """

    def __init__(self, meta_field="x_disable_meta"):
        super().__init__("wandb")
        self.runs, self.calls, self.metadata = {}, [], []

        class Settings:
            def __init__(self, **given):
                assert set(given) <= {meta_field}, "wandb refuses settings that it does not know"
                self.__dict__ |= {meta_field: False, **given}

        self.Settings, self._meta_field = Settings, meta_field

    def init(self, **keys):
        self.calls.append(keys)
        if not getattr(keys.get("settings", self.Settings()), self._meta_field):
            self.metadata.append({"args": sys.argv[1:]})
        history = self.runs.setdefault(keys["id"], [])
        run = SimpleNamespace(step=history[-1][0] + 1 if history else 0, finish=lambda: None)

        def log(values, step):
            history.append((step, values))
            run.step = step

        run.log = log
        return run


def test_wandb_continues_one_run_over_restarts_with_each_step_once(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path, 0, 10, enable_wandb=True, wandb_project="rd")  # killed
    train(tmp_path, 3, 12, enable_wandb=True)
    (history,) = wandb.runs.values()
    assert [step for step, _ in history] == [1, 5, 10, 12]
    assert history[0][1]["loss_metrics/global_avg_loss"] == result_of(1).loss
    assert wandb.calls[0]["project"] == "rd" and wandb.calls[0]["config"] == {"training": {"steps": 12}}
    train(tmp_path, 0, 1, enable_wandb=True)  # a new run in the same folder
    assert len(wandb.runs) == 2


def test_after_going_back_to_other_batches_wandb_has_a_run_of_its_own(tmp_path, monkeypatch):
    """It cannot take rows back, and those of the batches that were left are not this run's."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path, 0, 10, enable_wandb=True)
    train(tmp_path, 4, 10, enable_wandb=True, differs=True)
    assert [[step for step, _ in history] for history in wandb.runs.values()] == [[1, 5, 10], [5, 10]]


@pytest.mark.parametrize("field", ["x_disable_meta", "_disable_meta", "of_a_later_version"])
def test_wandb_does_not_upload_the_command_line_or_says_that_it_does(field, tmp_path, monkeypatch, caplog):
    wandb = FakeWandb(field)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "argv", ["train.py", "--job.description=https://name:password@host.org"])
    monkeypatch.setattr(logger, "propagate", True)
    train(tmp_path, 0, 1, enable_wandb=True)
    if field == "of_a_later_version":
        assert "no setting that keeps the command line out" in caplog.text
        assert "password" in str(wandb.metadata)
    else:
        assert wandb.metadata == [] and "command line" not in caplog.text


def test_wandb_enabled_and_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"metrics.enable_wandb = true.*pip install wandb"):
        make(tmp_path, enable_wandb=True).start(0, 0)
    assert not (tmp_path / "metrics.jsonl").exists()
