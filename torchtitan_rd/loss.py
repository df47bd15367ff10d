"""The training objective, always as a SUM over valid tokens: the caller divides by their global number, or,
where ids have weights, by the global sum of the weights of their labels.

Also the labels that goldfish loss leaves out, and a guard that stops a run once the loss of a step exceeds a
bound. What a NaN does is decided in train_step.py (`Verdict`).
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.config_loader import OptionalUserPath, Section
from torchtitan_rd.errors import ConfigError, TrainingError
from torchtitan_rd.parallelism.vocabulary import LogSums, VocabularyPart

_TABLE_SIZE, _TABLE_SEED = 1_000_003, 2971215073  # of goldfish loss; two primes


class ObjectiveKeys(Section):
    """The keys of [training] that this file reads; z_loss_weight is TrainStep's, which hands it in."""

    goldfish_strategy: Literal["none", "static", "hash-table"] = "none"
    """Goldfish loss (arXiv 2406.10209): leave labels out of the loss so that text is not learned by heart.
    static: every goldfish_k-th position; hash-table: about every goldfish_k-th label, the same one
    wherever its context is.
    """
    goldfish_k: int = Field(4, ge=2)
    """Goldfish: one label in so many is left out."""
    goldfish_start_position: int = Field(0, ge=0)
    """Goldfish, static: the first position (from 0) that is left out."""
    goldfish_context_width: int = Field(13, ge=1)
    """Goldfish, hash-table: the labels that decide together whether the last of them is left out."""
    token_weights: OptionalUserPath = None
    """File of one weight for each id of the vocabulary: .npy, .npz, .pt or .txt. The loss is then the
    weighted mean sum(w * loss) / sum(w) over the labels of the global batch, w being the weight of the label
    (`weight` of torch's cross_entropy). The z-loss stays a plain mean, and so does val_loss.
    """
    throttle: bool = False
    """Recurrent models: divide the objective by the recurrences that have
    a gradient (num_steps_with_grad).
    """
    loss_guard: float | None = Field(None, gt=0.0)
    """Stop the run when the loss of a step exceeds this: neither its update nor a later one happens,
    and the error comes at once, on a GPU while the next step runs. The Huginn runs used 6.
    """
    loss_guard_after_tokens: int = Field(10_000_000_000, ge=0)
    """loss_guard: the number of tokens that must have been trained on before it watches."""

    loss_chunk_tokens: int | None = Field(None, ge=1)
    """Multiply with the head and take the loss so many tokens at a time, with their gradients, in place of
    all logits at once: for large vocabularies or long sequences. The same numbers up to rounding.
    """

    @model_validator(mode="after")
    def _no_idle_keys(self) -> "ObjectiveKeys":
        used = {"none": (), "static": ("k", "start_position"), "hash-table": ("k", "context_width")}
        for key in ("k", "start_position", "context_width"):
            name = f"goldfish_{key}"
            value, default = getattr(self, name), ObjectiveKeys.model_fields[name].default
            if value != default and key not in used[self.goldfish_strategy]:
                raise ValueError(
                    f'{name} = {value} has no effect on goldfish_strategy = "{self.goldfish_strategy}": '
                    f"unset {name} or change goldfish_strategy"
                )
        watch_from = ObjectiveKeys.model_fields["loss_guard_after_tokens"].default
        if self.loss_guard is None and self.loss_guard_after_tokens != watch_from:
            raise ValueError("loss_guard_after_tokens has no effect without loss_guard: set both or neither")
        return self


class LossSums(NamedTuple):
    objective: torch.Tensor
    """What is differentiated: cross entropy plus z-loss, summed over the valid tokens."""
    cross_entropy: torch.Tensor
    """What is reported, in nats (times the label's weight), summed over the valid tokens; detached."""


def load_token_weights(path: str, vocab_size: int, padded: int) -> torch.Tensor:
    """The vector of `training.token_weights`: float32 (padded,), with 0 for ids from `vocab_size` on, which
    are no labels.

    Raises ConfigError unless the file holds `vocab_size` finite numbers, none negative and not all 0.
    """
    weights = _read_vector(Path(path)).astype(np.float64)
    problem = None
    if weights.shape != (vocab_size,):
        shape = " x ".join(map(str, weights.shape)) or "no"
        problem = f"holds {shape} numbers, but the vocabulary has {vocab_size} ids, and each needs one weight"
    elif (bad := ~np.isfinite(weights) | (weights < 0)).any():
        id_ = int(np.argmax(bad))
        problem = f"gives id {id_} the weight {weights[id_]}: weights are finite numbers of at least 0"
    elif not weights.any():
        problem = "gives every id the weight 0: no label would count"
    if problem:
        raise ConfigError(f"training.token_weights = {path!r} {problem}")
    return torch.from_numpy(np.pad(weights, (0, padded - vocab_size))).float()


def _read_vector(path: Path) -> np.ndarray:
    """The one array of a file. Raises ConfigError."""
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True).double().numpy()
        if path.suffix == ".txt":
            return np.loadtxt(path, ndmin=1)
        if path.suffix not in (".npy", ".npz"):
            raise ValueError("expected a file .npy, .npz, .pt or .txt")
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npz" and len(loaded.files) != 1:
            raise ValueError(f"it holds the arrays {', '.join(loaded.files) or 'none'}; expected one")
        array = loaded[loaded.files[0]] if path.suffix == ".npz" else loaded
        return array.astype(np.float64)
    except Exception as error:  # of NumPy, torch and pickle, each of which has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"training.token_weights = {str(path)!r} cannot be read: {reason}") from None


def count_valid(labels: torch.Tensor) -> torch.Tensor:
    """The number of labels that are not ignored (int64 scalar on the labels' device)."""
    return (labels != IGNORE_INDEX).sum()


def sum_of_weights(labels: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """The weights (V,) of the labels that are not ignored, summed (float64 scalar on the labels' device)."""
    valid = labels != IGNORE_INDEX
    return torch.where(valid, token_weights[labels.where(valid, 0)].double(), 0.0).sum()


def cross_entropy_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    z_loss_weight: float | torch.Tensor = 0.0,
    token_weights: torch.Tensor | None = None,
) -> LossSums:
    """Next-token loss of `logits` (B, S, V) against `labels` (B, S) int64, ignoring labels of -100.

    z-loss: z_loss_weight * logsumexp(logits)^2 for every valid token (PaLM, arXiv 2204.02311, section 5).
    token_weights: (V,) float32; the cross entropy of a token counts as often as its label's weight says.
    Logits may be a DTensor that is sharded over V; the sums are the same on all of its ranks.
    """
    if isinstance(logits, DTensor):
        return _sums_of_shards(logits, labels.flatten(), z_loss_weight, token_weights)
    logits, labels = logits.flatten(0, 1), labels.flatten()
    cross_entropy = _CrossEntropySum.apply(logits, labels, token_weights)
    if isinstance(z_loss_weight, float) and z_loss_weight == 0.0:
        return LossSums(cross_entropy, cross_entropy.detach())
    squares = logits.logsumexp(dim=-1).square()
    z_loss = torch.where(labels != IGNORE_INDEX, squares, 0.0).sum()
    return LossSums(cross_entropy + z_loss_weight * z_loss, cross_entropy.detach())


def _sums_of_shards(
    logits: DTensor,
    labels: torch.Tensor,
    z_loss_weight: float | torch.Tensor,
    token_weights: torch.Tensor | None,
) -> LossSums:
    valid = labels != IGNORE_INDEX
    targets = labels.where(valid, 0)  # any id will do for an ignored label: it gets 0
    lse, of_labels = LogSums.apply(
        logits.to_local().flatten(0, 1), targets, VocabularyPart.of(logits, logits.ndim - 1)
    )
    losses = lse - of_labels
    if token_weights is not None:
        losses = losses * token_weights[targets]
    cross_entropy = torch.where(valid, losses, 0.0).sum()
    z_loss = torch.where(valid, lse.square(), 0.0).sum()
    return LossSums(cross_entropy + z_loss_weight * z_loss, cross_entropy.detach())


class _CrossEntropySum(torch.autograd.Function):
    """F.cross_entropy(weight=token_weights, reduction="sum") whose backward holds one tensor of the logits'
    size instead of two.

    Torch's own goes through the gradient of the log-probabilities, all zero but for one entry a token:
    filling that tensor and reading it again costs more than the softmax itself. Here
    d logits = (softmax - onehot) d sum directly, times the label's weight.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None
    ) -> torch.Tensor:
        log_probabilities = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probabilities, labels, token_weights)
        return F.nll_loss(
            log_probabilities, labels, weight=token_weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_probabilities, labels, token_weights = ctx.saved_tensors
        valid = (labels != IGNORE_INDEX).unsqueeze(1)
        targets = labels.unsqueeze(1).where(valid, 0)  # any column will do for an ignored label: it gets 0
        scale = torch.where(valid, dsum, 0)
        if token_weights is not None:
            scale = scale * token_weights[targets]

        dlogits = log_probabilities.exp().mul_(scale)
        return dlogits.scatter_add_(1, targets, -scale), None, None


def goldfish_labels(labels: torch.Tensor, config: ObjectiveKeys) -> torch.Tensor:
    """Goldfish loss (Hans et al., arXiv 2406.10209): labels that are left out,
    by position or by their context.

    `labels` (B, S) int64 on any device -> the same with the left-out ones set to -100; a copy if any can be.

    static: positions start, start + k, ... of every row.
    hash-table: each window of `context_width` labels leaves out its last with a chance of 1/k, drawn from a
    table of uniforms by the product of its labels (int64, wrapping) modulo the table's size. So positions 0
    .. width - 2 are always kept, and a label of -100 in the window counts as that number.
    Must come before valid labels are counted.
    """
    if config.goldfish_strategy == "none":
        return labels
    labels = labels.clone()
    if config.goldfish_strategy == "static":
        labels[:, config.goldfish_start_position :: config.goldfish_k] = IGNORE_INDEX
        return labels
    width = config.goldfish_context_width
    if labels.shape[1] >= width:
        places = labels.unfold(1, width, 1).prod(dim=-1) % _TABLE_SIZE
        left_out = _uniforms(labels.device)[places] < 1 / config.goldfish_k
        labels[:, width - 1 :].masked_fill_(left_out, IGNORE_INDEX)
    return labels


@cache
def _uniforms(device: torch.device) -> torch.Tensor:
    """The table: 4 MB, made at the first use; drawn on the CPU, so that every device has the same numbers."""
    return torch.rand(_TABLE_SIZE, generator=torch.Generator().manual_seed(_TABLE_SEED)).to(device)


def exceeds_guard(config: ObjectiveKeys, loss: torch.Tensor, tokens_seen: int) -> torch.Tensor:
    """Whether `loss` exceeds the guard after its number of tokens:
    0-dim bool on the device of `loss`, for no host.

    loss: the mean over the global batch, in nats, so that every rank decides alike.
    tokens_seen: those of this step included.
    """
    guard = config.loss_guard
    if guard is None or tokens_seen <= config.loss_guard_after_tokens:
        guard = math.inf
    return loss > guard


def guard_error(config: ObjectiveKeys, step: int, loss: float, tokens_seen: int) -> TrainingError:
    """What to raise once the host knows that the guard was exceeded."""
    return TrainingError(
        f"step {step}: loss {loss:.4f} exceeds training.loss_guard = {config.loss_guard} "
        f"after {tokens_seen} tokens: resume from an older checkpoint (checkpoint.load_step) "
        "with a lower rate, or raise or unset the guard"
    )
