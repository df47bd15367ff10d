"""The life of a run, a stage each, started as a user starts it: torchrun trains, a command does the rest.

Each function returns what to say of it and raises NoGo with what went wrong, or NotTried.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from torchtitan_rd.checkpoint.folders import MANIFEST, STEP, step_of
from torchtitan_rd.config import JobConfig
from torchtitan_rd.job import child_environment
from torchtitan_rd.models import get_spec
from torchtitan_rd.rehearsal.shrink import STEPS, Ranks
from torchtitan_rd.rehearsal.verdicts import NoGo, NotTried

ENDLESS = 1_000_000
"""Steps of the run that is killed: more than it can take."""

_ERROR = re.compile(r"(?:rank \d+ failed:|\w*Error(?: on rank \d+)?:) ?.*")
_NEW_TOKENS, _NEURONS, _BINS = 8, 5, 2


@dataclass
class Life:
    """config: that is rehearsed, written to `file`. kind: of the data. limit: seconds of one stage.

    has_rows: whether the data lies in files of the rehearsal. is_offline: the hub does not answer.
    """

    config: JobConfig
    file: Path
    folder: Path
    ranks: Ranks
    kind: str
    limit: float
    has_rows: bool
    is_offline: bool
    logs: list[Path] = field(default_factory=list)

    @property
    def run_folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    def train(self) -> str:
        """A few steps with their checkpoints, whose checksums are compared afterwards."""
        self._finish(self._torchrun("train", self.ranks.total))
        rows = self._rows()
        if not rows or rows[-1]["step"] != STEPS:
            raise NoGo(f"ended without an error, but metrics.jsonl has no step {STEPS}")
        self._finish(self._command("verify", "verify", str(self._checkpoints)))
        return (
            f"{STEPS} steps on {self.ranks.total} ranks, loss {rows[0]['loss']:.3f} -> "
            f"{rows[-1]['loss']:.3f}; checkpoints of steps {_listed(self._saved())} are sound"
        )

    def kill(self) -> str:
        """The same command trains on, and all of its processes end without a word behind a checkpoint."""
        before = self._saved()[-1]
        process = self._torchrun("kill", self.ranks.total, f"--training.steps={ENDLESS}")
        try:
            self._wait_for_checkpoint(process, before)
        finally:  # an interrupted rehearsal must not leave a run that trains on
            kill_tree(process)
        return (
            f"all processes were killed (SIGKILL) after step {self._last_step()}; "
            f"the last checkpoint is of {self._saved()[-1]}"
        )

    def _wait_for_checkpoint(self, process: "subprocess.Popen[bytes]", before: int) -> None:
        """Until there is one behind the step `before`, and a step behind that."""
        deadline = time.monotonic() + self.limit
        while not (before < self._saved()[-1] < self._last_step()):
            if process.poll() is not None:
                raise NoGo(self._why_it_ended(process))
            if time.monotonic() > deadline:
                raise NoGo(f"no checkpoint behind step {before} within {self.limit:.0f} s")
            time.sleep(0.05)

    def resume(self) -> str:
        """From the last good checkpoint, on another number of ranks."""
        saved = self._saved()[-1]
        steps, total, degrees = saved + STEPS, self.ranks.resumed_total, self.ranks.resumed
        if self.config.training.stream:
            total, degrees = self.ranks.total, {}
        overrides = [f"--parallelism.{key}={degree}" for key, degree in degrees.items()]
        process = self._torchrun("resume", total, f"--training.steps={steps}", *overrides)
        self._finish(process)

        said = re.search(r"resuming after step (\d+)", self.logs[-1].read_text(errors="replace"))
        rows = self._rows()
        if said is None or int(said[1]) != saved or not rows or rows[-1]["step"] != steps:
            raise NoGo(f"did not go on from step {saved} to {steps}: {self.logs[-1]}")
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            raise NoGo(f"metrics.jsonl does not hold each of the steps 1 to {steps} once")
        why = "; a stream is bound to its number of ranks" if self.config.training.stream else ""
        return f"went on from step {said[1]} to {steps} on {total} ranks, loss {rows[-1]['loss']:.3f}{why}"

    def validate(self) -> str:
        """The loss on held-out rows, of a recurrent model at each depth of partial_depth_eval too."""
        enabled, training = self.config.validation.enable, self.config.training
        held_out = self.config.validation.dataset or training.dataset
        if not enabled and (training.mixture or held_out != training.dataset):
            raise NotTried("[validation] is not enabled, and the held-out data would be another data set")
        result = self.folder / "losses.json"
        split = [] if enabled or not self.has_rows else ["--split", "train"]
        output = ["--output", str(result), "--device", "cpu"]
        self._finish(
            self._command("validate", "eval", "loss", str(self.file), str(self.run_folder), *output, *split)
        )
        losses = json.loads(result.read_text())["losses"]
        shown = ", ".join(f"{name} {_nats(entry):.3f}" for name, entry in losses.items())
        return shown if enabled else f"{shown} (no [validation]: on rows of training)"

    def export(self) -> str:
        """To a Hugging Face folder whose logits are those of the checkpoint."""
        model, step = self.config.model, self._step_folder()
        what = [get_spec(model.name).name, model.flavor, str(step), str(self._exported)]
        flags = ["--verify", "--export_dtype", self.config.checkpoint.export_dtype]
        self._finish(self._command("export", "convert-ckpt", *what, *flags))
        said = self.logs[-1].read_text().splitlines()
        proof = [line for line in said if line.startswith("verified")]
        if not proof:
            raise NoGo(f"{self._exported} was written and not verified: {self.logs[-1]}")
        return f"{step.name} as a Hugging Face folder, {proof[0].strip()}"

    def generate(self) -> str:
        """A few tokens from the exported folder."""
        folder = str(self._exported)
        if self.kind == "spikes":
            out = self.folder / "generated"
            size = ["--n-neurons", str(_NEURONS), "--gen-t", str(_BINS), "--out", str(out)]
            self._finish(self._command("generate", "generate-spikes", folder, "--unconditional", *size))
            return f"{_BINS} time bins of {_NEURONS} neurons from the exported folder"
        prompt = ["--prompt", "The"]
        if self.kind == "packed":
            prompt = ["--prompt-ids", "1 2 3"]
        length = ["--max-new-tokens", str(_NEW_TOKENS), "--ignore-eos", "--device", "cpu"]
        self._finish(self._command("generate", "generate", folder, *prompt, *length))
        return f"{_NEW_TOKENS} tokens from the exported folder"

    @property
    def _checkpoints(self) -> Path:
        return self.run_folder / self.config.checkpoint.folder

    @property
    def _exported(self) -> Path:
        return self.folder / "exported"

    def _saved(self) -> list[int]:
        """Steps with a finished checkpoint, ascending; 0 is none."""
        places = self._checkpoints.iterdir() if self._checkpoints.is_dir() else []
        done = (p for p in places if STEP.fullmatch(p.name) and (p / MANIFEST).is_file())
        return sorted({0, *(step_of(place.name) or 0 for place in done)})

    def _step_folder(self) -> Path:
        return self._checkpoints / f"step-{self._saved()[-1]}"

    def _rows(self) -> list[dict[str, Any]]:
        path = self.run_folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()[: text.count("\n")]]

    def _last_step(self) -> int:
        rows = self._rows()
        return rows[-1]["step"] if rows else 0

    def _torchrun(self, name: str, ranks: int, *overrides: str) -> "subprocess.Popen[bytes]":
        launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
        program = ("-m", "torchtitan_rd.train", "--job.config_file", str(self.file), *overrides)
        return self._start(name, [*launcher, *program])

    def _command(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        return self._start(name, ["torchtitan_rd", *arguments])

    def _start(self, name: str, module: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Without a GPU, in this folder, with a cache of its own. What it says goes to a file."""
        log = self.folder / f"{name}.log"
        self.logs.append(log)
        environment = child_environment(
            CUDA_VISIBLE_DEVICES="",
            HIP_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
            HF_DATASETS_CACHE=str(self.folder / "datasets"),
            **({"HF_HUB_OFFLINE": "1"} if self.is_offline else {}),
        )
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is answered here, once
            )

    def _finish(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            process.wait(self.limit)
        except subprocess.TimeoutExpired:
            raise NoGo(
                f"not done after {self.limit:.0f} s (--limit); what it last said:\n{_tail(self.logs[-1])}"
            ) from None
        finally:
            kill_tree(process)
        if process.returncode:
            raise NoGo(self._why_it_ended(process))

    def _why_it_ended(self, process: "subprocess.Popen[bytes]") -> str:
        said = complaint(self.logs[-1].read_text(errors="replace"))
        return f"{said or _tail(self.logs[-1])}\n(exit status {process.returncode}; {self.logs[-1]})"


def complaint(log: str) -> str:
    """The first error that a program of ours names in its log, with its lines; empty if there is none."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if _ERROR.fullmatch(line):
            following = lines[number + 1 :]
            told = [line]
            if line.endswith("failed:"):  # a traceback, whose last line says what
                return next(
                    (text for text in following if re.match(r"[\w.]+(Error|Exception)\b", text)), line
                )
            for text in following:
                if not text or re.match(r"[EWI]\d{4} |\S+ \S*\[?(INFO|WARN|ERROR)|Traceback|\[", text):
                    break
                told.append(text)
            return "\n".join(told[:8])
    return ""


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it has started, at once. Torchrun starts ranks in sessions of their own."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.kill()  # first, so that it sees none of them end
    for member in below:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(below, timeout=10)


def _nats(entry: Any) -> float:
    return float(next(iter(entry.values())))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(str(step) for step in steps if step)
