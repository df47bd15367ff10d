"""What lies around a run: caches of data, the disk, the hub, the cluster's variables."""

import shutil
from pathlib import Path

from torchtitan_rd.data import DATASETS
from torchtitan_rd.diagnosis.disk import GIB, check_writable, measure, nearest_folder
from torchtitan_rd.diagnosis.finding import Finding, Mark
from torchtitan_rd.diagnosis.hub import endpoint, why_unreachable
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import variables
from torchtitan_rd.masking import mask_values

BYTES_A_PARAMETER = 12
"""Of a checkpoint: float32 weights and the two moments of Adam."""

_SHOWN = ("NCCL_", "GLOO_", "FI_", "TORCH_", "PYTORCH_", "HF_", "OMP_", "CUDA_", "HIP_", "ROCR_", "MASTER_")
_SLURM = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_JOB_NODELIST", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_END_TIME")


def caches() -> dict[str, Path]:
    """Name -> folder, as the libraries of the hub find them, which may begin with `~`."""
    given = variables("HF_", "XDG_CACHE_HOME")
    home = Path(given.get("HF_HOME") or Path(given.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folders = {
        "HF_HUB_CACHE": given.get("HF_HUB_CACHE") or home / "hub",
        "HF_DATASETS_CACHE": given.get("HF_DATASETS_CACHE") or home / "datasets",
    }
    return {name: Path(folder) for name, folder in folders.items()}


def look_at_caches() -> list[Finding]:
    """Whether each may be written, and which of the data sets that have a name here it holds."""
    found = []
    for name, folder in caches().items():
        try:
            folder = folder.expanduser()
            check_writable(folder, name)
        except (ConfigError, RuntimeError) as error:  # RuntimeError: the user of a container has no home
            remedy = f"export {name}=a folder that can be written"
            found.append(Finding(Mark.ABSENT, name, f"{folder}: {error}", remedy))
            continue
        free = shutil.disk_usage(nearest_folder(folder)).free / GIB
        held = [one for one, row in DATASETS.items() if row.hub and _is_cached(folder, row.hub)]
        holds = f"holds {', '.join(held)}" if held else "holds no data set of ours"
        there = holds if folder.is_dir() else "is not there yet"
        found.append(Finding(Mark.GOOD, name, f"{folder} {there}; {free:.0f} GiB are free"))
    return found


def _is_cached(folder: Path, repository: str) -> bool:
    owner, _, name = repository.partition("/")
    return (folder / f"datasets--{owner}--{name}").is_dir() or (folder / f"{owner}___{name}").is_dir()


def look_at_disk(folder: Path, parameters: int | None) -> list[Finding]:
    """How fast one process writes there, and so what a checkpoint of so many parameters takes."""
    try:
        place = nearest_folder(folder)
        speed = measure(place)
    except (ConfigError, OSError) as error:
        return [
            Finding(Mark.WRONG, "disk", f"{folder}: {error}", "name a folder that can be written: --folder")
        ]
    free = shutil.disk_usage(place).free
    text = f"{place}: {speed.write / 1e6:,.0f} MB/s written to storage, {speed.read / 1e6:,.0f} MB/s read"
    size = (parameters or 10**9) * BYTES_A_PARAMETER
    of = f"{parameters:,}" if parameters else "1e9"
    estimate = (
        f"{of} parameters: {size / 1e9:.1f} GB, {size / speed.write:.0f} s from one process; "
        f"{free // size} fit in the {free / 1e9:.0f} GB that are free"
    )
    fits = Mark.GOOD if free >= size or parameters is None else Mark.WRONG
    remedy = "" if fits is Mark.GOOD else "make room, or name another job.dump_folder"
    return [Finding(Mark.GOOD, "disk", text), Finding(fits, "checkpoint", estimate, remedy)]


def look_at_hub(seconds: float) -> Finding:
    why = why_unreachable(seconds)
    if why is None:
        return Finding(Mark.GOOD, "hub", f"{endpoint()} answers")
    remedy = "download-dataset where it answers, and training.dataset_path or HF_HUB_OFFLINE=1 here"
    return Finding(Mark.ABSENT, "hub", f"{endpoint()}: {why}", remedy)


def look_at_cluster() -> list[Finding]:
    """Slurm's job, and the variables that decide how ranks talk."""
    slurm = {name: value for name, value in variables("SLURM_").items() if name in _SLURM}
    job = ", ".join(f"{name}={value}" for name, value in slurm.items())
    mark = Mark.GOOD if slurm else Mark.ABSENT
    given = mask_values(variables(*_SHOWN))
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    return [
        Finding(mark, "Slurm", job or "not in a job"),
        Finding(Mark.GOOD, "variables", listed or "none of NCCL, gloo, torch or the hub is set"),
    ]
