"""[job] and [comm]: this process among its peers. The only reader of os.environ.

Ranks come from torchrun's variables; without them the process is the only one,
and everything else is the same code.
"""

import base64
import gc
import os
import random
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan_rd.config_loader import OptionalUserPath, Section, Subfolder, UserPath
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.parallelism import groups_of
from torchtitan_rd.reliability.rendezvous import Meeting, meet

PREPARING = 24 * 3600.0
"""Seconds that a rank waits for another one that fetches and converts data.
A rank that dies meanwhile is noticed.
"""


class JobKeys(Section):
    config_file: OptionalUserPath = None
    """The TOML file that this config came from."""
    dump_folder: UserPath = "./outputs"
    """Everything a run writes goes below this folder: checkpoints, metrics, traces, the resolved config."""
    description: str = ""
    """One line for humans, printed at the start."""


class CommConfig(Section):
    init_timeout_seconds: int = Field(600, ge=1)
    """A collective that takes longer during start-up and the first step ends the job."""
    train_timeout_seconds: int = Field(300, ge=1)
    """The same after the first step."""
    rendezvous_timeout_seconds: int = Field(120, ge=1)
    """How long a rank tries to reach the address where the ranks meet. Once there it waits
    init_timeout_seconds for the others."""
    trace_buf_size: int = Field(20000, ge=0)
    """Entries of NCCL's flight recorder, dumped when a collective times out. 0: off."""
    save_traces_folder: Subfolder = "comm_traces"
    """Where the flight recorder writes, below job.dump_folder."""
    heartbeat_seconds: float = Field(10.0, ge=0.0)
    """How often each rank writes where it is to dump_folder/heartbeat. 0: never."""
    hang_warning_seconds: float = Field(60.0, gt=0.0)
    """Rank 0 names the ranks that lag when no rank has advanced for this long,
    or for three times the run's own median step (or its longest phase of that kind), whichever is longer.
    The ranks that have not joined so long after the first are named, too.
    """


@dataclass(frozen=True)
class Environment:
    """What the launcher said."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    log_level: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """Config keys that environment variables set (`section.key` -> value)."""
    grace_seconds: float | None = None
    """How long torchrun waits for its ranks after it has passed a signal on, before it kills them."""

    @classmethod
    def read(cls) -> "Environment":
        """Raises ConfigError where a launcher set some but not all of its variables, or not to numbers."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        found = {name: os.environ.get(name) for name in names}
        try:
            rank = int(found["RANK"] or 0)
            numbers = (rank, int(found["LOCAL_RANK"] or 0), int(found["WORLD_SIZE"] or 1))
            local_world_size = int(found["LOCAL_WORLD_SIZE"] or 1)
        except ValueError:
            raise ConfigError(
                f"environment: {found} must be whole numbers; start ranks with torchrun"
            ) from None
        if not 0 <= rank < numbers[2]:
            raise ConfigError(
                f"environment: RANK {rank} does not fit WORLD_SIZE {numbers[2]}; unset both or use torchrun"
            )
        stream = os.environ.get("STREAM_HF_DATA")
        overrides = {} if stream is None else {"training.stream": stream.lower() in ("1", "true", "yes")}
        log_level = os.environ.get("LOGLEVEL", "INFO").upper()
        return cls(*numbers, local_world_size, log_level, overrides, _grace_seconds())

    def device(self) -> torch.device:
        """This rank's accelerator, or the CPU. Raises ConfigError if there are more local ranks than GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {self.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "start at most one rank a GPU (torchrun --nproc_per_node)"
            )
        return torch.device("cuda", self.local_rank)


def is_started_by_torchrun() -> bool:
    """Whether this process's parent is a torchrun, which signals it, waits for it and restarts it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _grace_seconds() -> float | None:
    if not is_started_by_torchrun():
        return None
    told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")  # torchrun's own default
    if torch.__version__.startswith("2.11."):  # whose torchrun does not know the variable
        told = "30"
    return float(told) if told.isdecimal() and int(told) > 0 else None


# What torchrun tells its ranks; prefixes of names.
_OF_TORCHRUN = (
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "LOCAL_",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "TORCH_NCCL_ASYNC",
)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a program that this process starts: its own with `changes`, without what torchrun
    has told this rank.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_TORCHRUN)}
    return {**own, **changes}


def variables(*prefixes: str) -> dict[str, str]:
    """Those of the environment whose names begin so, in the order of their names."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


def work_offline() -> None:
    """Lets the libraries of the hub look into their caches alone, here (before they are imported) and in
    programs that are started from here, instead of asking a hub that does not answer again and again.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"


def expand_variables(text: str) -> str:
    """`$NAME` and `${NAME}` as a shell reads them; one that is not set stays as it is written."""
    return os.path.expandvars(text)


def init_process_group(
    environment: Environment, device: torch.device, comm: CommConfig, dump_folder: Path
) -> None:
    """Starts torch.distributed: gloo for CPU tensors, NCCL for GPU tensors. A lone process needs no launcher.

    Writes nothing: the flight recorder is only told where its folder will be (`make_traces_folder`).
    """
    options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(seconds=comm.init_timeout_seconds)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With its device known NCCL connects here, and the mesh splits its groups off this one
        # (ncclCommSplit, one call a dimension) instead of making each group of each dimension anew on every
        # rank.
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
        if comm.trace_buf_size > 0:
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault(
                "TORCH_FR_DUMP_TEMP_FILE", str(dump_folder / comm.save_traces_folder / "rank_")
            )
    if "MASTER_ADDR" in os.environ:
        store = meet(_meeting(environment, comm, dump_folder))
    elif environment.world_size == 1:
        store = dist.HashStore()
    else:
        raise ConfigError(
            f"environment: WORLD_SIZE is {environment.world_size} and MASTER_ADDR is not set; "
            "start ranks with torchrun"
        )
    options |= {"store": store, "rank": environment.rank, "world_size": environment.world_size}
    forget_meshes()
    dist.init_process_group(**options)


def forget_meshes() -> None:
    """Clears what DTensor remembers of its operations, on the mesh of that time. The mesh of an earlier run
    in this process equals this run's if ranks and dimensions do; its groups' names are others' by now.
    """
    # What torch.distributed.tensor.debug does, whose import takes half a second.
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()


def _meeting(environment: Environment, comm: CommConfig, dump_folder: Path) -> Meeting:
    """Where torchrun's variables say that the ranks meet. Raises ConfigError unless the port is a number."""
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"environment: MASTER_PORT is {port!r}, not a port; start ranks with torchrun")
    is_torchrun_s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_torchrun_s and _restarts_on_several_nodes() and environment.rank == 0:
        logger.warning(
            "torchrun on several nodes restarts ranks with a store that remembers those that died: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, as scripts/launch.sh does"
        )
    return Meeting(
        os.environ["MASTER_ADDR"],
        int(port),
        environment.rank,
        environment.world_size,
        is_host=environment.rank == 0 and not is_torchrun_s,
        # A store of rank 0's is of one attempt; torchrun's outlives it.
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_torchrun_s else "0",
        run=f"job.dump_folder = {str(dump_folder)!r}",
        connect_seconds=comm.rendezvous_timeout_seconds,
        warn_seconds=comm.hang_warning_seconds,
        limit_seconds=comm.init_timeout_seconds,
    )


def _restarts_on_several_nodes() -> bool:
    """Whether there are several torchruns, each of which counts the restarts for itself."""
    told = (os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return told[0] != "1" and told[1] != "0"


def raise_where_nccl_times_out() -> None:
    """For groups that are made after this: a collective raises in the rank that waits for it, where NCCL's
    watchdog would end the process.
    """
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"


def make_traces_folder(device: torch.device, comm: CommConfig, dump_folder: Path) -> None:
    """Where NCCL's flight recorder writes; made with the other outputs, once the input is known
    to be good.
    """
    if device.type == "cuda" and comm.trace_buf_size > 0:
        (dump_folder / comm.save_traces_folder).mkdir(parents=True, exist_ok=True)


def set_timeouts(mesh: DeviceMesh, seconds: float) -> None:
    """Gives WORLD and every group of `mesh`, on CPU and GPU alike, this limit for one collective.

    A mesh makes its groups with torch's defaults (10 minutes for NCCL, 30 for gloo), whatever WORLD has. The
    checkpoint's own group is not among them: its limit is `checkpoint.timeout_seconds` throughout.
    """
    for group in dict.fromkeys([dist.group.WORLD, *groups_of(mesh).values()]):
        # torch has no public setter; torchtitan uses the same one.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def shorten_timeouts(comm: CommConfig, mesh: DeviceMesh) -> None:
    """From start-up's timeout (compilation, first touch of the data) to training's.
    All ranks call it together.
    """
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    set_timeouts(mesh, comm.train_timeout_seconds)


# gloo's errors come as a plain RuntimeError. Nearly all begin with the place in gloo's source; the
# others are what the remaining operations of a rank end with once one of them has taken too long.
_LOST_RANK = re.compile(
    r"/gloo/\S+\.(cc|h):\d+\]|application timeout caused pair closure|"
    r"timed out waiting \d+ms for (send|recv) operation",
    re.IGNORECASE,
)


def is_of_a_lost_rank(error: BaseException | None) -> bool:
    """Whether a collective has failed: a rank has died, or was silent for as long as it may."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _LOST_RANK.search(str(error)) is not None


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(numbers: list[float]) -> list[list[float]] | None:
    """The numbers, equally many, of every rank, in rank order; on rank 0 alone, else None."""
    own = torch.tensor(numbers, dtype=torch.float64)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(own, gathered)
    return None if gathered is None else [rank.tolist() for rank in gathered]


def set_determinism(seed: int, deterministic: bool, device: torch.device) -> None:
    """Seeds every generator of this process alike on all ranks;
    `deterministic` makes kernels repeat bit for bit.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = False
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_tokenizers_on_one_core() -> None:
    """Lets the tokenizers library encode in the calling thread alone, here and in processes started from
    here, unless the user wants it otherwise: work that is shared out to processes needs no threads.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def rng_state() -> dict[str, Any]:
    """The state of this rank's generators, as JSON."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    mersenne = numpy["state"]
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            numpy["bit_generator"],
            mersenne["key"].tolist(),
            mersenne["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def own_rng_state(saved: Any, environment: Environment) -> dict[str, Any] | None:
    """This rank's state, as a checkpoint holds it; those of earlier versions list the states of all ranks."""
    if not isinstance(saved, list):
        return saved
    return saved[environment.rank] if len(saved) == environment.world_size else None


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


class GarbageCollector:
    """Collects every `frequency` steps, on all ranks at once:
    a rank that collects alone lets all others wait.
    """

    def __init__(self, frequency: int):
        self.frequency = frequency
        gc.disable()
        gc.collect(1)

    def run(self, step: int) -> None:
        if step % self.frequency == 0:
            gc.collect(1)
