"""[training]: the microbatches of one step -> loss -> backward -> clip -> one optimizer update. Returns numbers."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchtitan_rd.data import Batch
from torchtitan_rd.data.batch_ramp import BatchRampKeys
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.log import logger
from torchtitan_rd.loss import ObjectiveKeys, check_loss, count_valid, cross_entropy_sums, goldfish_labels
from torchtitan_rd.metrics import StepResult
from torchtitan_rd.models.spec import NO_INPUTS, ForwardInputs
from torchtitan_rd.parallelism import ShardingKeys


class TrainingConfig(DatasetKeys, BatchRampKeys, ObjectiveKeys, ShardingKeys):
    steps: int = Field(10000, ge=1)
    """Optimizer updates of the whole run, those before a resume included."""
    max_norm: float = Field(1.0, gt=0.0)
    """Gradients are scaled down to this global L2 norm."""
    z_loss_weight: float = Field(0.0, ge=0.0)
    """Weight of logsumexp(logits)^2 in the objective (PaLM used 1e-4)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does, on all ranks alike, before it reaches the parameters."""
    max_consecutive_skips: int = Field(10, ge=1)
    """on_nonfinite = "skip": more skipped updates in a row than this stop the run."""
    seed: int = Field(0, ge=0, lt=2**64, json_schema_extra={"on_resume": "must_match"})
    """Decides initial weights and synthetic data; the same for every number of ranks."""
    deterministic: bool = False
    """Only kernels that repeat bit for bit (slower on GPUs)."""
    gc_freq: int = Field(50, ge=1)
    """Steps between two runs of Python's garbage collector, which is off in between."""


class TrainStep:
    """One optimizer update.

    draws: the (n, k) iterations of the last call's microbatches, if the model draws any. `consecutive_skips` is the
    only state; a resumed run starts counting anew.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainingConfig,
        device: torch.device,
        *,
        beat: Callable[[int, str], None] = lambda step, phase: None,
        inputs: Callable[[int, int, Batch], ForwardInputs] = lambda step, number, batch: NO_INPUTS,
    ):
        """beat: told the step and the phase that begins, so that a hang can be placed (heartbeat.py).

        inputs: (step, microbatch from 0, batch) -> what forward takes beside tokens (a recurrent model's draws).
        """
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.beat, self.inputs = beat, inputs
        self.draws: list[tuple[int, int]] = []
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skips_allowed = config.max_consecutive_skips if config.on_nonfinite == "skip" else 0
        self.consecutive_skips = 0

    def __call__(self, step: int, batches: Sequence[Batch], tokens_seen: int = 0) -> StepResult:
        """Runs this rank's microbatches of update `step`. tokens_seen: this step's included, for the loss guard.

        Raises TrainingError on all ranks if training must stop, before the update.
        """
        batches = [replace(batch, labels=goldfish_labels(batch.labels, self.config)) for batch in batches]
        self.draws = []
        # The count comes first: every microbatch's gradient is then final, whatever the padding of the others.
        local_valid = torch.stack([count_valid(batch.labels) for batch in batches]).sum().to(self.device)
        valid = local_valid.clone()
        dist.all_reduce(valid)
        self.optimizer.zero_grad()
        local_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            self.beat(step, f"microbatch {number + 1} of {len(batches)}")
            local_sum += self._backward(batch, valid, self.inputs(step, number, batch))
        self.beat(step, "update")
        grad_norm = self._clip()
        loss_max = local_sum / local_valid.clamp(min=1)
        dist.all_reduce(local_sum)
        dist.all_reduce(loss_max, op=dist.ReduceOp.MAX)
        # The one host synchronisation of a step: an update must not happen if these are not finite.
        numbers = torch.stack([local_sum / valid, loss_max, grad_norm.to(self.device)]).tolist()
        result = StepResult(*numbers)
        if self._is_finite(step, result):
            check_loss(self.config, step, result.loss, tokens_seen)
            self.optimizer.step()
        return result

    def _backward(self, batch: Batch, valid: torch.Tensor, extra: ForwardInputs) -> torch.Tensor:
        """Adds one microbatch's share to the gradients; returns its cross-entropy sum."""
        inputs = batch.inputs.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        documents = None if batch.document_ids is None else batch.document_ids.to(self.device, non_blocking=True)
        sums = cross_entropy_sums(self.model(inputs, documents, **extra.kwargs), labels, self.config.z_loss_weight)
        scale = valid * max(extra.num_steps[1], 1) if self.config.throttle else valid
        (sums.objective / scale).backward()
        self.draws.append(extra.num_steps)
        return sums.cross_entropy

    def _clip(self) -> torch.Tensor:
        """Scales the gradients to `max_norm` and returns their norm from before (scalar, the same on all ranks)."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # over all shards; until then every rank has its own part (T21)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_norm, norm)
        return norm

    def _is_finite(self, step: int, result: StepResult) -> bool:
        """Whether the update may happen: the same answer on all ranks, since the numbers are the same."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.consecutive_skips = 0
            return True
        self.consecutive_skips += 1
        what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if self.consecutive_skips > self.skips_allowed:
            raise TrainingError(
                f"{what}: stopped before the update; training.on_nonfinite = {self.config.on_nonfinite!r} allows "
                f"{self.skips_allowed} skipped updates in a row (training.max_consecutive_skips)"
            )
        logger.warning("%s: update skipped (%d in a row)", what, self.consecutive_skips)
        return False


def hash_ids(batches: Sequence[Batch], stages: int = 1) -> str | None:
    """sha256 of the global batch's input ids, int64 little-endian, in row order; on rank 0 alone, else None.

    stages: batches of the loader that this global batch consists of, each spread over all ranks (data/batch_ramp.py).

    Gathers the ids of all ranks: a check to switch on when two runs are to be compared.
    """
    rows = torch.cat([batch.inputs for batch in batches]).unflatten(0, (stages, -1)).contiguous()
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(rows, gathered)
    if gathered is None:
        return None
    return hashlib.sha256(torch.cat(gathered, dim=1).numpy().astype("<i8").tobytes()).hexdigest()
