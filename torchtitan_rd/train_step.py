"""[training]: the microbatches of one step -> loss -> backward -> clip -> one optimizer update.
Returns numbers.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from torchtitan_rd.batch import Batch, at_positions
from torchtitan_rd.chunked_loss import loss_read_out
from torchtitan_rd.config_loader import MUST_MATCH
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.log import logger
from torchtitan_rd.loss import (
    ObjectiveKeys,
    count_valid,
    exceeds_guard,
    goldfish_labels,
    guard_error,
    sum_of_weights,
)
from torchtitan_rd.metrics import StepNumbers, StepResult
from torchtitan_rd.model_spec import NO_INPUTS, ForwardInputs
from torchtitan_rd.optimizer import take_back_counts, takes_flag, update_unless
from torchtitan_rd.parallelism import GradientExchange, ShardingKeys, StepSums, StepTotals, TilingKeys
from torchtitan_rd.reliability.replay import ReplayKeys, checksum
from torchtitan_rd.reliability.rollback import SpikeKeys


class TrainingConfig(DatasetKeys, ObjectiveKeys, ShardingKeys, TilingKeys, SpikeKeys, ReplayKeys):
    steps: int = Field(10000, ge=1)
    """Optimizer updates of the whole run, those before a resume included."""
    max_norm: float = Field(1.0, gt=0.0)
    """Gradients are scaled down to this global L2 norm."""
    z_loss_weight: float = Field(0.0, ge=0.0)
    """Weight of logsumexp(logits)^2 in the objective (PaLM used 1e-4)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does, on all ranks alike, before it reaches the parameters.
    stop: no update happens any more, and the error that names the step comes at once, on a GPU one step
    later. skip: that update is left out, without a trace in parameters, moments and counts.
    """
    max_consecutive_skips: int = Field(10, ge=1)
    """on_nonfinite = "skip": more skipped updates in a row than this stop the run,
    as on_nonfinite = "stop" does.
    """
    seed: int = Field(0, ge=0, lt=2**64, json_schema_extra=MUST_MATCH)
    """Decides initial weights, the state noise of a recurrent model and synthetic data; the same for every
    number of ranks."""
    deterministic: bool = False
    """Only kernels that repeat bit for bit (slower on GPUs)."""
    gc_freq: int = Field(50, ge=1)
    """Steps between two runs of Python's garbage collector, which is off in between."""


class ValidTokens:
    """The number of labels in the global batch that are not ignored, and the sum of their weights: what
    losses are divided by. Summed over the ranks while the first forward runs.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        token_weights: torch.Tensor | None = None,
        *,
        counts: bool = True,
    ):
        """batches: this rank's microbatches, on the device. token_weights: (V,), there too; without it every
        label weighs 1 and the sum is their number. counts: see TrainStep. Collective.
        """
        numbers = [count_valid(batch.labels) for batch in batches]
        sums = [torch.stack(numbers).sum()]
        if token_weights is not None:  # float64, which holds the number exactly too
            weights = [sum_of_weights(batch.labels, token_weights) for batch in batches]
            sums = [sums[0].double(), torch.stack(weights).sum()]

        local = torch.stack(sums)
        self.local_weight = local[-1]
        self._totals = local.clone() if counts else torch.zeros_like(local)
        self._summing: dist.Work | None = dist.all_reduce(self._totals, async_op=True)

    def number(self) -> torch.Tensor:
        """Labels of all ranks: scalar, int64 or (with weights) float32."""
        return self._summed()[0]

    def weight(self) -> torch.Tensor:
        """The sum of their weights, in the type of `number`."""
        return self._summed()[-1]

    def _summed(self) -> torch.Tensor:
        if self._summing is not None:
            self._summing.wait()
            self._summing = None
            if self._totals.is_floating_point():
                self._totals = self._totals.float()
        return self._totals


class Verdict:
    """Decides on the device whether an update may happen, so that the host need not wait for the numbers.

    Once training must stop, no update may happen any more: the host may learn of it a step later.
    """

    def __init__(self, config: TrainingConfig, device: torch.device):
        self.config = config
        self.skips_allowed = config.max_consecutive_skips if config.on_nonfinite == "skip" else 0
        self.consecutive_skips = torch.zeros((), device=device)
        self.must_stop = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, loss: torch.Tensor, grad_norm: torch.Tensor, tokens_seen: int) -> torch.Tensor:
        """-> 1.0 if the update is to be left out, else 0.0: float32 scalar on the device,
        the same on all ranks.
        """
        finite = loss.isfinite() & grad_norm.isfinite()
        self.consecutive_skips = (self.consecutive_skips + 1) * ~finite
        too_many = self.consecutive_skips > self.skips_allowed
        self.must_stop = self.must_stop | too_many | (finite & exceeds_guard(self.config, loss, tokens_seen))
        return (self.must_stop | ~finite).float()


class Readback:
    """Brings one small float32 vector a step to the host without making the host wait for it."""

    def __init__(self, size: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self._host = torch.empty(size, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def post(self, vector: torch.Tensor) -> Callable[[], list[float]]:
        """Starts the copy; returns what waits for it. The vector before must have been read:
        there is one buffer.
        """
        self._host.copy_(vector, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return self._read

    def _read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class TrainStep:
    """One optimizer update.

    The numbers of a step decide whether its update may happen. On a GPU that is decided on the device and
    the host learns of it during the next step (`late`), when the numbers arrived long ago; a GPU never runs
    out of work for it. On a CPU, and for an optimizer that takes no flag from the device, the host reads
    them before the update.

    Nothing of it is kept in a checkpoint: a resumed run counts the updates skipped in a row anew.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainingConfig,
        device: torch.device,
        *,
        beat: Callable[[int, str], None] = lambda step, phase: None,
        forward_inputs: Callable[[int, int, Batch], ForwardInputs] = lambda step, number, batch: NO_INPUTS,
        asked_to_stop: Callable[[], bool] = lambda: False,
        has_saved: Callable[[], bool] = lambda: False,
        late: bool | None = None,
        token_weights: torch.Tensor | None = None,
        exchange: GradientExchange | None = None,
        counts: bool = True,
        positions: range | None = None,
    ):
        """beat: told the step and the phase that begins, so that a hang can be placed (heartbeat.py).

        forward_inputs: (step, microbatch from 0, batch) -> what forward takes beside tokens (draws.py).
        asked_to_stop: whether a signal told this rank to stop (signals.py). has_saved: whether this
        rank has written its share of the checkpoint that is written in the background. late: see above;
        by default as it says. token_weights: `training.token_weights`, one for each logit.
        exchange: how ranks sum gradients, as the keys say with which `model` was sharded;
        by default as those keys' defaults.
        counts: whether this rank's tokens go into the sums over ranks: of ranks that compute the same, one.
        positions: those of each row that the model computes on this rank; None: all.
        """
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.beat = beat
        self.forward_inputs = forward_inputs
        self.asked_to_stop = asked_to_stop
        self.has_saved = has_saved
        self.token_weights = None if token_weights is None else token_weights.to(device)
        self.positions = positions
        self.late = (device.type == "cuda" and takes_flag(optimizer, device)) if late is None else late

        self.exchange = exchange or GradientExchange(model)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.counts = counts
        self.sums = StepSums(
            self.parameters, device, loss_counts=counts, is_first_copy=self.exchange.is_first_copy
        )

        self.verdict = Verdict(config, device)
        self.readback = Readback(len(fields(StepNumbers)), device)
        self.stop_requested = False
        self.saved = False
        self._unread: StepResult | None = None

    def __call__(self, step: int, batches: Sequence[Batch], tokens_seen: int = 0) -> StepResult:
        """Runs this rank's microbatches of update `step`. tokens_seen: this step's included,
        for the loss guard.

        Raises TrainingError on all ranks if training must stop, before any update that must not happen:
        for this step, or (`late`) for the one before.
        """
        batches = [self._place(batch) for batch in batches]
        # The count comes first: every microbatch's gradient is then final,
        # whatever the padding of the others.
        valid = ValidTokens(batches, self.token_weights, counts=self.counts)
        self.optimizer.zero_grad()

        local_sum = torch.zeros((), device=self.device)
        depths = []
        for number, batch in enumerate(batches):
            self.beat(step, f"microbatch {number + 1} of {len(batches)}")
            self.exchange.before_microbatch(is_last=number == len(batches) - 1)
            drawn = self.forward_inputs(step, number, batch)
            local_sum += self._backward(batch, valid, drawn)
            depths.append(drawn.num_steps)
        self.exchange.after_backward(self.parameters, self.device)

        self.beat(step, "update")
        has_loss = valid.local_weight > 0
        mean_loss = torch.where(has_loss, local_sum / valid.local_weight, 0.0)
        totals = self.sums(local_sum, mean_loss, stop=self.asked_to_stop(), saved=self.has_saved())
        loss = totals.loss_sum / valid.weight()
        self.sums.scale_gradients(totals.grad_norm, self.config.max_norm)
        skip = self.verdict(loss, totals.grad_norm, tokens_seen)

        self.settle()  # the step before
        read = self.readback.post(self._numbers(loss, totals, skip, valid.weight()))
        result = StepResult(step, lambda: _parse(read()), depths=tuple(depths), tokens_seen=tokens_seen)
        self._unread = result
        if self.late:
            update_unless(skip, self.optimizer)
            return result
        self.settle()
        if not result.numbers.skipped:
            self.optimizer.step()
        return result

    def rehearse(self, step: int, batches: Sequence[Batch]) -> tuple[int, int]:
        """Runs the first microbatch of update `step` forward and backward, and leaves nothing behind.

        -> checksums of this rank's cross-entropy sum and of its gradients. Collective; waits for the device.
        """
        self.beat(step, "replay")
        batch = self._place(batches[0])
        valid = ValidTokens([batch], self.token_weights, counts=self.counts)
        self.optimizer.zero_grad()
        self.exchange.before_microbatch(is_last=True)
        loss = self._backward(batch, valid, self.forward_inputs(step, 0, batch))
        self.exchange.after_backward(self.parameters, self.device)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        found = checksum([loss]), checksum(gradients)
        self.optimizer.zero_grad()
        return found

    def settle(self) -> None:
        """Waits until the numbers of the last step are known, and acts on them:
        before anything outlives the step.

        To be called before a checkpoint, a validation or an export.
        Raises TrainingError on all ranks if training must stop.
        """
        if self._unread is None:
            return
        result, self._unread = self._unread, None
        numbers = result.numbers
        self.stop_requested, self.saved = numbers.stop_requested, numbers.saved
        if not numbers.skipped:
            return
        if self.late:
            take_back_counts(self.optimizer)

        what = f"step {result.step}: loss {numbers.loss}, gradient norm {numbers.grad_norm}"
        if not numbers.has_labels:
            what = (
                f"step {result.step}: no label in its batch counts toward the loss, as within a long prompt "
                "of a conversation or in padding (set training.on_nonfinite = 'skip' to pass over such a "
                "step, or raise training.global_batch_size)"
            )
        if not numbers.must_stop:
            logger.warning("%s: update skipped (%d in a row)", what, numbers.consecutive_skips)
        elif numbers.consecutive_skips == 0:
            raise guard_error(self.config, result.step, numbers.loss, result.tokens_seen)
        else:
            raise TrainingError(
                f"{what}: stopped before the update; "
                f"training.on_nonfinite = {self.config.on_nonfinite!r} allows "
                f"{self.verdict.skips_allowed} skipped updates in a row (training.max_consecutive_skips)"
            )

    def _place(self, batch: Batch) -> Batch:
        """On the device: ids of whole rows, and the labels of the objective, of this rank's tokens alone.
        Batches in page-locked memory are copied without a wait.
        """
        labels = batch.labels.to(self.device, non_blocking=True)
        documents = (
            None if batch.document_ids is None else batch.document_ids.to(self.device, non_blocking=True)
        )
        inputs = batch.inputs.to(self.device, non_blocking=True)
        # Which labels are left out is decided in the whole row.
        labels = at_positions(goldfish_labels(labels, self.config), self.positions)
        return replace(batch, inputs=inputs, labels=labels, document_ids=documents)

    def _backward(self, batch: Batch, valid: ValidTokens, drawn: ForwardInputs) -> torch.Tensor:
        """Adds one microbatch's share to the gradients; returns its cross-entropy sum."""
        z_loss_weight: float | torch.Tensor = self.config.z_loss_weight
        if z_loss_weight and self.token_weights is not None:
            # Of a plain mean over tokens, though the sum below is divided by weights.
            z_loss_weight = z_loss_weight * (valid.weight() / valid.number())
        read_out = loss_read_out(
            batch.labels, z_loss_weight, self.token_weights, self.config.loss_chunk_tokens
        )
        (sums,) = self.model(batch.inputs, batch.document_ids, read_out=read_out, **drawn.kwargs)

        scale = valid.weight() * max(drawn.num_steps[1], 1) if self.config.throttle else valid.weight()
        (sums.objective / scale).backward()
        return sums.cross_entropy

    def _numbers(
        self, loss: torch.Tensor, totals: StepTotals, skip: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The fields of StepNumbers, as float32 on the device."""
        loss_max, rank = totals.rank_losses.max(dim=0)
        return torch.stack(
            [
                loss,
                loss_max,
                rank.float(),
                totals.grad_norm,
                skip,
                self.verdict.consecutive_skips,
                self.verdict.must_stop.float(),
                totals.stops,
                (totals.saved == len(totals.rank_losses)).float(),
                (weight > 0).float(),
            ]
        )


def _parse(values: Sequence[float]) -> StepNumbers:
    loss, loss_max, rank, grad_norm, skipped, in_a_row, *flags = values
    return StepNumbers(loss, loss_max, int(rank), grad_norm, bool(skipped), int(in_a_row), *map(bool, flags))


def hash_ids(batches: Sequence[Batch]) -> str | None:
    """sha256 of the global batch's input ids, int64 little-endian, in row order; on rank 0 alone, else None.

    Gathers the ids of all ranks: a check to switch on when two runs are to be compared.
    """
    numbers = torch.tensor([row for batch in batches for row in batch.rows])
    ids = torch.cat([batch.inputs for batch in batches])
    numbered = torch.cat([numbers[:, None], ids], dim=1)
    gathered = (
        [torch.empty_like(numbered) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    )
    dist.gather(numbered, gathered)
    if gathered is None:
        return None
    rows = {int(row[0]): row[1:] for row in torch.cat(gathered)}  # ranks that share a row both have it
    in_order = torch.stack([rows[number] for number in sorted(rows)])
    return hashlib.sha256(in_order.numpy().astype("<i8").tobytes()).hexdigest()
