"""A watch for silent corruption: the same microbatch twice must give the same bits.

A processor, a memory or a network that computes wrongly now and then raises no error; the run goes on, with
damage in its weights. Rarely enough to cost little, a microbatch is run forward and backward twice and both
results are compared, bit by bit, before it is trained on.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import ClusterError
from torchtitan_rd.log import logger
from torchtitan_rd.parallelism.local_part import local

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by bytes of an element


class ReplayKeys(Section):
    """The keys of [training] that are about the replay."""

    replay_interval: int = Field(0, ge=0)
    """Every so many steps run the first microbatch twice more, and compare the loss of each rank bit by bit;
    on a CPU, or with training.deterministic, the gradients too. Costs two microbatches. 0: never.
    """
    on_replay_mismatch: Literal["stop", "warn"] = "stop"
    """What a difference does, after the ranks in question are named: end the run before the step's update, or
    go on."""

    def replays_at(self, step: int) -> bool:
        return self.replay_interval > 0 and step % self.replay_interval == 0


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """A sum over the bit patterns of this rank's shards: any single flipped bit changes it."""
    total = 0
    for tensor in tensors:
        own = local(tensor.detach())
        words = own.contiguous().flatten().view(_WORDS[own.element_size()])
        total += int(words.sum(dtype=torch.int64))
    return total


def replay(
    run: Callable[[], tuple[int, int]],
    gather: Callable[[Any], list[Any]],
    keys: ReplayKeys,
    *,
    step: int,
    gradients: bool,
) -> None:
    """Runs a microbatch twice on all ranks. run: -> (checksum of this rank's loss, of its gradients).

    gradients: whether those repeat bit for bit on this machine. gather: of job.py. Collective. Raises
    ClusterError on all ranks, or warns, if anything differs.
    """
    stops = keys.on_replay_mismatch == "stop"
    first, second = run(), run()
    differs = [first[0] != second[0], gradients and first[1] != second[1]]
    found = gather(differs)
    forward = [rank for rank, (loss, _) in enumerate(found) if loss]
    backward = [rank for rank, (_, grads) in enumerate(found) if grads]
    if not forward and not backward:
        return
    # A wrong loss makes the gradients of all ranks wrong, so it is the one that names.
    what = (
        f"the loss of rank {_listed(forward)}"
        if forward
        else f"the gradients that rank {_listed(backward)} holds, computed there or sent there,"
    )
    text = (
        f"step {step}: {what} had other bits when the same microbatch was run again: a device, memory or "
        "network computes wrongly (heartbeat/rank_R.json names the host); take that node out, and go on from "
        "a checkpoint of the last replay without a difference, or an older one (checkpoint.load_step)"
    )
    if stops:
        raise ClusterError(text)
    logger.warning("%s", text)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
