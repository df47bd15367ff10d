"""Where rows go besides metrics.jsonl: TensorBoard and Weights & Biases.
Either library loads only when enabled.
"""

import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger

# Key of a row -> the ancestors' name and the factor to their unit.
_TENSORBOARD_NAMES = {
    "loss": ("loss_metrics/global_avg_loss", 1),
    "loss_max": ("loss_metrics/global_max_loss", 1),
    "tokens_per_second_per_device": ("wps", 1),
    "mfu_full": ("mfu(%)", 100),
    "mfu_causal": ("mfu_causal(%)", 100),
    "step_seconds": ("time_metrics/end_to_end(s)", 1),
    "data_loading_seconds": ("time_metrics/data_loading(s)", 1),
    "data_loading_share": ("time_metrics/data_loading(%)", 100),
    "memory_max_rss_gib": ("memory/max_rss(GiB)", 1),
    "memory_max_active_gib": ("memory/max_active(GiB)", 1),
    "memory_max_active_pct": ("memory/max_active(%)", 1),
    "memory_max_reserved_gib": ("memory/max_reserved(GiB)", 1),
    "memory_max_reserved_pct": ("memory/max_reserved(%)", 1),
    "memory_num_alloc_retries": ("memory/num_alloc_retries", 1),
    "memory_num_ooms": ("memory/num_ooms", 1),
}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under the ancestors' names; other numbers keep their key."""
    found = {}
    for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)):
            name, factor = _TENSORBOARD_NAMES.get(key, (key, 1))
            found[name] = value * factor
    return found


class TensorBoardSink:
    """Event files in `{folder}/YYYYMMDD-HHMM`. A resumed run continues the newest such folder."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        runs = sorted(p for p in folder.glob("*") if re.fullmatch(r"\d{8}-\d{4}", p.name)) if step > 0 else []
        run = runs[-1] if runs else folder / datetime.now().strftime("%Y%m%d-%H%M")
        # purge_step makes TensorBoard forget what a killed run had logged beyond the checkpoint.
        self._writer = SummaryWriter(str(run), purge_step=step + 1)
        logger.info("TensorBoard: %s", run)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # a killed run must not lose points that lie before its checkpoint

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run for the whole life of a dump folder: its id is kept in `wandb_run_id`. step: 0
    begins another one, since wandb cannot take rows back.

    Raises ConfigError if wandb is not installed.
    """

    def __init__(self, dump_folder: Path, step: int, *, project: str | None, job_config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"metrics.enable_wandb = true, but wandb cannot be imported ({error}): "
                "`pip install wandb`, or set metrics.enable_wandb = false"
            ) from None
        id_file = dump_folder / "wandb_run_id"
        if step == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        run_id = id_file.read_text()
        self._run = wandb.init(
            project=project,
            id=run_id,
            resume="allow",
            dir=str(dump_folder),
            config=dict(job_config),
            settings=_without_command_line(wandb),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        # wandb cannot rewind: after a crash it already holds the rows between the checkpoint and the crash.
        # They are computed again to the same values, so they are not sent again.
        if row["step"] >= self._run.step:
            self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _without_command_line(wandb: Any) -> Any:
    """Settings with which wandb does not upload its own metadata,
    which holds sys.argv and so what is secret in it.

    The field has had two names since wandb 0.17, the oldest version that is supported.
    It is no public API: a version without either name is warned about.
    """
    known = wandb.Settings()
    for name in ("x_disable_meta", "_disable_meta"):
        if hasattr(known, name):
            return wandb.Settings(**{name: True})
    logger.warning(
        "wandb %s has no setting that keeps the command line out of its metadata: pass no credential there, "
        "or set metrics.enable_wandb = false",
        getattr(wandb, "__version__", "(of unknown version)"),
    )
    return known
