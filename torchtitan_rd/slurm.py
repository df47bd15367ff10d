"""Slurm jobs of a run: what a cluster's profile says, the script of a job, and a chain of jobs."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SIGNAL_SECONDS = 300
"""Before a job's end. launch.sh gives ranks 240 of them to finish a step and save it."""
_MINUTES = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_LINE = re.compile(r"#LAUNCH (\w+)=(\S.*)")
_KEYS = ("scheduler", "card", "gpus_per_node", "minutes", "sbatch")


@dataclass(frozen=True)
class Profile:
    """path: a shell file, sourced in the job. card: of planning's table, or None. gpus_per_node: None where
    launch.sh counts them. limits: (nodes, minutes) pairs, rising: from so many nodes on, the longest job.
    options: of sbatch. has_slurm: else a job is a program of this machine.
    """

    path: Path
    card: str | None
    gpus_per_node: int | None
    limits: tuple[tuple[int, int], ...]
    options: tuple[str, ...]
    has_slurm: bool

    def longest(self, nodes: int) -> int | None:
        """Minutes that a job of so many nodes may take; None where no limit is known."""
        known = [minutes for least, minutes in self.limits if least <= nodes]
        return known[-1] if known else None


def profiles() -> list[str]:
    """Names of the profiles that say what `launch` needs."""
    paths = sorted((SCRIPTS / "profiles").glob("*.sh"))
    return [path.stem for path in paths if _LINE.search(path.read_text())]


def read_profile(name: str) -> Profile:
    """name: one of `profiles()`, or the path of such a file. Raises ConfigError."""
    path = Path(name).absolute() if name.endswith(".sh") else SCRIPTS / "profiles" / f"{name}.sh"
    if not (SCRIPTS / "launch.sh").is_file():
        raise ConfigError(
            f"launch needs the repository's folder scripts, which is not at {SCRIPTS}: clone it"
        )
    if not path.is_file():
        raise ConfigError(
            f"--profile {name}: no such profile{nearest(name, profiles())} "
            "(another one is named by its path, which ends in .sh)"
        )

    found: dict[str, list[str]] = {key: [] for key in _KEYS}
    for line in path.read_text().splitlines():
        if not line.startswith("#LAUNCH"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None or match[1] not in _KEYS:
            raise ConfigError(f"{path}: {line!r}: want #LAUNCH KEY=VALUE with one of {', '.join(_KEYS)}")
        found[match[1]].append(match[2])
    if not any(found.values()):
        raise ConfigError(f"{path}: has no line #LAUNCH KEY=VALUE, so it is no profile for launch")
    return _profile(path, found)


def _profile(path: Path, found: dict[str, list[str]]) -> Profile:
    last = {key: values[-1] for key, values in found.items() if values}
    if last.get("scheduler", "slurm") not in ("slurm", "none"):
        raise ConfigError(f"{path}: scheduler={last['scheduler']}: it is slurm or none")
    try:
        gpus = int(last["gpus_per_node"]) if "gpus_per_node" in last else None
        pairs = [pair.split(":") for pair in last.get("minutes", "").split()]
        limits = tuple(sorted((int(nodes), int(minutes)) for nodes, minutes in pairs))
    except ValueError:
        raise ConfigError(f"{path}: gpus_per_node is a number, minutes are pairs NODES:MINUTES") from None
    return Profile(
        path,
        last.get("card"),
        gpus,
        limits,
        tuple(found["sbatch"]),
        last.get("scheduler", "slurm") == "slurm",
    )


def minutes_of(text: str) -> int:
    """Of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; a part of a minute counts whole.
    Raises ValueError.
    """
    match = _MINUTES.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time: want M, H:M:S or D-H:M:S")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        minutes += 60 * (24 * int(match["days"]) + hours)
    elif len(parts) == 3:
        minutes, seconds = 60 * parts[0] + parts[1], parts[2]
    else:
        minutes, seconds = (*parts, 0)[:2]
    total = minutes + -(-seconds // 60)
    if total < 1:
        raise ValueError(f"{text!r} is no time at all")
    return total


def as_time(minutes: int) -> str:
    """H:MM:SS, as sbatch reads it."""
    return f"{minutes // 60}:{minutes % 60:02}:00"


@dataclass(frozen=True)
class Job:
    """arguments: of `launch` in scripts/launch.sh, the file first. jobs: how many follow each other.
    is_array: as tasks of one array, one at a time, and not as a chain of dependencies.
    folder: where paths start. remarks: of its header.
    """

    name: str
    profile: Profile
    nodes: int
    minutes: int | None
    arguments: tuple[str, ...]
    folder: Path
    remarks: tuple[str, ...]
    jobs: int = 1
    is_array: bool = False
    dependency: str | None = None
    options: tuple[str, ...] = ()

    def script(self) -> str:
        """A Bash script: submitted with sbatch, or run where there is no Slurm."""
        profile = self.profile
        remarks = [line for remark in self.remarks for line in remark.splitlines()]
        lines = ["#!/bin/bash", *(f"# {line}".rstrip() for line in remarks)]
        if profile.has_slurm:
            lines += [f"#SBATCH {option}" for option in self._sbatch()]

        lines += ["", f"cd {shlex.quote(str(self.folder))} || exit 1"]
        if profile.gpus_per_node is not None:
            lines.append(f"export GPUS_PER_NODE={profile.gpus_per_node}")
        if self.jobs > 1:
            lines.append("export REQUEUE=0  # the job behind this one goes on from its checkpoint")
        sourced = (SCRIPTS / "env.sh", profile.path, SCRIPTS / "launch.sh")
        for path in sourced:
            lines += ["# shellcheck disable=SC1091", f"source {shlex.quote(str(path))}"]
        lines.append(f"launch {shlex.join(self.arguments)}")
        return "\n".join(lines) + "\n"

    def _sbatch(self) -> list[str]:
        """Later options win over earlier ones, so the user's come last."""
        gpus = self.profile.gpus_per_node
        options = [
            shlex.quote(f"--job-name={self.name}"),  # sbatch reads quotes as a shell does
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            *([] if gpus is None else [f"--gpus-per-node={gpus}"]),
            *([] if self.minutes is None else [f"--time={as_time(self.minutes)}"]),
            f"--output={'%x_%A_%a.out' if self.is_array else '%x_%j.out'}",
            "--open-mode=append",  # a requeued job would empty the file of its first part
            "--requeue",
            f"--signal=B:TERM@{SIGNAL_SECONDS}",
        ]
        if self.is_array:
            options.append(f"--array=1-{self.jobs}%1")
        return [*options, *self.profile.options, *self.options]

    def submit(self) -> list[str]:
        """The numbers of the jobs, first to last. Raises ConfigError with those that were submitted."""
        script, made = self.script(), list[str]()
        for _ in range(1 if self.is_array else self.jobs):
            after = f"afterany:{made[-1]}" if made else self.dependency
            command = ["sbatch", "--parsable", *([] if after is None else [f"--dependency={after}"])]
            try:
                done = subprocess.run(command, input=script, text=True, capture_output=True, cwd=self.folder)
            except FileNotFoundError:
                raise ConfigError(
                    "there is no sbatch here: call this where jobs are submitted, or pass --dry_run"
                ) from None
            if done.returncode != 0:
                standing = f"; submitted were {', '.join(made)} (scancel takes them back)" if made else ""
                raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}{standing}")
            made.append(done.stdout.strip().split(";")[0])  # NUMBER, or NUMBER;CLUSTER
        return made
