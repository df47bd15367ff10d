"""Programs and libraries: what is installed, and the command that installs what is not."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys

import torch

from torchtitan_rd.diagnosis.finding import Finding, Mark

# Module of a package that is no dependency -> what needs it, and how to get it.
EXTRAS = {
    "matplotlib": ("report, pareto --png, rasters", "pip install 'torchtitan_rd[plots]'"),
    "wandb": ("metrics.enable_wandb", "pip install 'torchtitan_rd[wandb]'"),
    "pynwb": ("data prepare-spikes on .nwb files", "pip install 'torchtitan_rd[nwb]'"),
    "lm_eval": ("eval hf-lm-eval, eval lm-eval", "pip install 'torchtitan_rd[lm-eval]'"),
    "zstandard": (".zst files of data", "pip install zstandard"),
}
PACKAGE = "torchtitan_rd"


def look_at_software() -> list[Finding]:
    found = [
        Finding(Mark.GOOD, "python", f"{platform.python_version()} ({sys.executable})"),
        Finding(Mark.GOOD, "torch", _torch()),
        *_dependencies(),
    ]
    for module, (needed_by, command) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            found.append(Finding(Mark.ABSENT, module, f"not installed; needed by {needed_by}", command))
        else:
            found.append(Finding(Mark.GOOD, module, f"{_version(module)}; for {needed_by}"))
    if shutil.which("torchrun") is None:
        remedy = "python -m torch.distributed.run is the same program"
        found.append(Finding(Mark.ABSENT, "torchrun", "not on PATH", remedy))
    return found


def _dependencies() -> list[Finding]:
    """Those of pyproject.toml that are not there, or a line with the versions of all."""
    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        remedy = "pip install -e . in the repository (scripts/env.sh does it)"
        return [Finding(Mark.ABSENT, PACKAGE, "runs from its folder and is not installed", remedy)]
    names = [re.split(r"[<>=!~;\[ ]", line)[0] for line in requirements if "extra ==" not in line]
    absent = [name for name in names if _version(name) == "absent"]
    if absent:
        remedy = f"pip install {' '.join(absent)}"
        return [Finding(Mark.WRONG, "dependencies", f"not installed: {', '.join(absent)}", remedy)]
    shown = ", ".join(f"{name} {_version(name)}" for name in names if name != "torch")
    return [Finding(Mark.GOOD, "dependencies", shown)]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _torch() -> str:
    built = "CPU"
    if torch.version.cuda:
        built = f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    return f"{torch.__version__}, built for {built}"
