"""What a checkpoint costs: how long a save lets training wait, and how long checks and loads take.

    python benchmarks/checkpoints.py [--gigabytes 1] [--rounds 3] [--folder DIR]

One process saves a state of a model's shape (float32 parameters and two moments of AdamW, 24 layers) into a
folder of DIR (the temporary folder by default), at once and in the background, then verifies and loads it.
Beside them, with the same bytes, `write` writes one file, forces it to storage and reads it back for its
sha256, which is what any save with checksums has to do at least. `cold` means that the operating system was
asked to forget the files before (posix_fadvise). Prints the median of the rounds as seconds per GB (1e9
bytes), with the file system and the machine's load before and after.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan_rd.checkpoint import CheckpointConfig, Checkpointer, verify

LAYERS, PER_LAYER = 24, 7
CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()

    tensors, before = state(chosen.gigabytes), os.getloadavg()[0]
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) / 1e9
    rounds = []
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
            rounds.append(one_round(Path(name), tensors, number))
            place = file_system(Path(name))
    print(f"{size:.2f} GB of tensors, {place}, load {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    for what in rounds[0]:
        seconds = [found[what] / size for found in rounds]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"  {what:34} {statistics.median(seconds):6.2f} s/GB   ({spread})")


def state(gigabytes: float) -> dict[str, dict[str, torch.Tensor]]:
    """Random, so that nothing on the way can be compressed."""
    numel = int(gigabytes * 1e9 / 4 / 3 / (LAYERS * PER_LAYER))
    names = [f"layers.{layer}.w{part}.weight" for layer in range(LAYERS) for part in range(PER_LAYER)]
    model = {name: torch.rand(numel) for name in names}
    moments = {
        f"{name}.{moment}": torch.rand(numel) for name in names for moment in ("exp_avg", "exp_avg_sq")
    }
    return {"model": model, "optimizer": moments}


def one_round(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], number: int) -> dict[str, float]:
    """-> seconds of each"""
    found: dict[str, float] = {}
    save(folder / "first", tensors, "disabled")  # touches memory that the allocator keeps from then on
    found["write, force, read back, sha256"] = timed(lambda: plain_write(folder / "plain", tensors))
    found["save, disabled: training waits"] = save(folder / "disabled", tensors, "disabled")[0]
    waits, commits = save(folder / "async", tensors, "async")
    found["save, async: training waits"] = waits
    found["save, async: until committed"] = commits

    step = folder / "async" / "checkpoint" / "step-2"
    found["verify, in the page cache"] = timed(lambda: require_good(step))
    forget(step)
    found["verify, cold"] = timed(lambda: require_good(step))
    for hashes in (True, False):
        forget(step)
        what = "load with verification, cold" if hashes else "load without hashes, cold"
        found[what] = timed(lambda hashes=hashes: load(folder / "async", tensors, hashes))
    return found


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def checkpointer(folder: Path, **keys: object) -> Checkpointer:
    config = CheckpointConfig(enable=True, **keys)
    shape = {"name": "none", "flavor": "none"}
    return Checkpointer(config, dump_folder=folder, job_config={}, must_match=frozenset(), model_shape=shape)


def save(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], mode: str) -> tuple[float, float]:
    """-> (seconds that training waits, seconds until it is committed), of the second save of a run"""
    checkpoints = checkpointer(folder, async_mode=mode)
    for step in (1, 2):
        os.sync()
        started = time.perf_counter()
        checkpoints.save(step, tensors, {"step": step})
        waited = time.perf_counter() - started
        checkpoints.wait()
        committed = time.perf_counter() - started
    checkpoints.close()
    return waited, committed


def load(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], hashes: bool) -> None:
    checkpoints = checkpointer(folder, verify_hashes=hashes)
    fresh = {
        group: {n: torch.empty_like(t) for n, t in members.items()} for group, members in tensors.items()
    }
    if checkpoints.load(fresh) != {"step": 2}:
        raise RuntimeError("the newest checkpoint was not loaded")
    checkpoints.close()


def require_good(step: Path) -> None:
    if problems := verify(step):
        raise RuntimeError("; ".join(problems))


def plain_write(path: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    with path.open("wb", buffering=0) as file:
        for members in tensors.values():
            for tensor in members.values():
                file.write(tensor.numpy().data)
        os.fsync(file.fileno())
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    path.unlink()


def forget(folder: Path) -> None:
    """Asks the operating system to drop the files from its cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def file_system(folder: Path) -> str:
    """Device and type of the mount that `folder` lies on."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [one for one in mounts if folder.resolve().is_relative_to(one[1])]
    device, _, kind = max(inside, key=lambda one: len(one[1]))
    return f"{kind} on {device}"


if __name__ == "__main__":
    main()
