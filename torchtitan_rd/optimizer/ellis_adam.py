"""ELLISAdam, the AdamW variant that trained Huginn-0125 (arXiv 2502.05171), over plain or sharded parameters.

Means, norms and checks are over a whole tensor, wherever its parts lie. Each kind that an option asks for
costs one all-reduce of one number a tensor in a step (update_clipping, as in the Huginn runs: one), and
nothing without options.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from torchtitan_rd.config_loader import MUST_MATCH, Section
from torchtitan_rd.optimizer.shards import replace_unless, sum_over_shards
from torchtitan_rd.parallelism.local_part import local


class EllisKeys(Section):
    """The [optimizer] keys of name = "ELLISAdam"."""

    update_clipping: bool = False
    """ELLISAdam: divide a tensor's rate by the root mean square of g / sqrt(v) where that exceeds 1
    (AdaFactor, arXiv 1804.04235); v is clamped at eps^2 in place.
    """
    atan_adam: bool = False
    """ELLISAdam: update by atan2(m, sqrt(v)), which needs no eps (arXiv 2407.05872),
    instead of m / (sqrt(v) + eps).
    """
    running_init: bool = False
    """ELLISAdam: begin the moments as the first gradient and its square instead of zero.
    Bias corrections stay on, so the first update is 1 / (1 - beta1) times as large.
    """
    decouple_wd: bool = True
    """ELLISAdam: decay by weight_decay times the schedule's factor; if false, times the rate,
    as AdamW does.
    """
    kahan_sum_compensation: bool = Field(False, json_schema_extra=MUST_MATCH)
    """ELLISAdam: keep what each update of a parameter loses to rounding, and add it to the next."""
    buffer_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", json_schema_extra=MUST_MATCH)
    """ELLISAdam: type in which the moments are kept; arithmetic is in that of the parameters.
    float16 loses squared gradients below 6e-8.
    """
    nesterov: bool = False
    """ELLISAdam: look one gradient ahead in the first moment (Nesterov)."""
    poly_ema_p: float | None = Field(None, gt=0.0)
    """ELLISAdam: beta2 = t / (t + p) after t updates, in place of the constant."""
    tensor_wise_gradient_normalization: bool = False
    """ELLISAdam: scale the gradient of each tensor to L2 norm 1."""
    eps_adjustment: bool = False
    """ELLISAdam: m / sqrt(v + eps^2) instead of m / (sqrt(v) + eps)."""
    tensor_wise_finite_check: bool = False
    """ELLISAdam: leave out the tensors whose gradient is not finite; one host synchronisation a step. It
    matters only where a step with such a gradient is not stopped or skipped as a whole
    (training.on_nonfinite).
    """
    adafactor_like_beta_corrections: bool = False
    """ELLISAdam: betas (b^t - b) / (b^t - 1) that grow towards b, in place of bias corrections."""
    brute_force_clip: float | None = Field(None, gt=0.0)
    """ELLISAdam: divide the update u of a tensor by max(||u||, this)."""


@dataclass
class _Batch:
    """This rank's parts of parameters that are updated alike: same rate and decay,
    same number of updates before.
    """

    step: int  # of the update under way; the first is 1
    lr: float
    weight_decay: float
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)


class ELLISAdam(Optimizer):
    """Adam with the options of EllisKeys.
    lr here is lr_0, the rate that decoupled weight decay is relative to.

    For gradient g, update t = 1, 2, ..., rate lr:  m <- lerp(m, g, 1 - b1);  v <- b2 v + (1 - b2) g^2;
    p <- p (1 - lr/lr_0 wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps).

    The state exists from the beginning, so that a checkpoint can be loaded into it;
    whether an update is a parameter's first is told by its `step`.

    found_inf: a flag on the device that keeps the next update from happening
    (optimizer/skipping.py). The update is then made on copies of the moments and the parameters,
    which replace them unless the flag is set.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        keys: EllisKeys | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.initial_lr = lr
        self.betas = betas
        self.eps = eps
        self.keys = keys or EllisKeys()
        self.buffer_dtype = getattr(torch, self.keys.buffer_dtype)
        self._counted: list[Tensor] = []  # the `step` of the last update's parameters
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._new_state(parameter)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {
            "step": torch.zeros(()),  # on the host, where it is read
            "exp_avg": torch.zeros_like(parameter, dtype=self.buffer_dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=self.buffer_dtype),
        }
        if self.keys.kahan_sum_compensation:
            state["kahan_compensation"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the train step has made the gradients
        """One update of every parameter that has a gradient. Collective if parameters are sharded."""
        batches = self._batches()
        if not batches:
            return
        for batch in batches:
            self._update_moments(batch)
        owners = [owner for batch in batches for owner in batch.owners]
        directions = [direction for batch in batches for direction in self._directions(batch)]
        if self.keys.brute_force_clip is not None:
            norms = _norms(directions, owners).clamp(min=self.keys.brute_force_clip)
            torch._foreach_div_(directions, norms.unbind())
        if self.keys.update_clipping:
            parts = [part for batch in batches for part in _mean_square_ratios(batch)]
            clips = sum_over_shards(parts, owners).sqrt().clamp(min=1.0)
            torch._foreach_div_(directions, clips.unbind())
        for batch in batches:
            self._apply(batch, directions[: len(batch.params)])
            del directions[: len(batch.params)]

    def take_back_counts(self) -> None:
        """Once the host knows that `found_inf` kept the last update from happening: it does not count."""
        for count in self._counted:
            count -= 1
        self._counted = []

    def _batches(self) -> list[_Batch]:
        """The parameters with a gradient; their gradients checked and normalized, their steps counted."""
        rated = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [local(parameter.grad) for _, parameter in rated]
        if grads and self.keys.tensor_wise_finite_check:
            bad = sum_over_shards([(~grad.isfinite()).sum() for grad in grads], [p for _, p in rated])
            good = [count == 0 for count in bad.tolist()]
            rated, grads = list(compress(rated, good)), list(compress(grads, good))
        if grads and self.keys.tensor_wise_gradient_normalization:
            norms = _norms(grads, [p for _, p in rated])
            grads = list(torch._foreach_div(grads, norms.clamp(min=torch.finfo(norms.dtype).tiny).unbind()))
        self._counted = [self.state[parameter]["step"] for _, parameter in rated]
        batches: dict[tuple, _Batch] = {}
        for number, ((group, parameter), grad) in enumerate(zip(rated, grads, strict=True)):
            state = self.state[parameter]
            state["step"] += 1
            alike = int(state["step"].item()), group["lr"], group["weight_decay"]
            # An update that may be taken back works on copies: one tensor at a time,
            # so that few are alive at once.
            key = alike if self.found_inf is None else (*alike, number)
            batch = batches.setdefault(key, _Batch(*alike))
            batch.owners.append(parameter)
            batch.params.append(local(parameter))
            batch.grads.append(grad)
            # a copy only if the types differ.
            batch.exp_avgs.append(local(state["exp_avg"]).to(parameter.dtype))
            batch.exp_avg_sqs.append(local(state["exp_avg_sq"]).to(parameter.dtype))
        return list(batches.values())

    def _betas(self, step: int) -> tuple[float, float]:
        beta1, beta2 = self.betas
        if self.keys.adafactor_like_beta_corrections:
            beta1, beta2 = ((beta**step - beta) / (beta**step - 1) for beta in self.betas)
        if self.keys.poly_ema_p is not None:
            beta2 = (step - 1) / (step - 1 + self.keys.poly_ema_p)
        return beta1, beta2

    def _bias_corrections(self, step: int) -> tuple[float, float]:
        if self.keys.adafactor_like_beta_corrections:
            return 1.0, 1.0
        beta1, beta2 = self._betas(step)
        return 1 - beta1**step, 1 - beta2**step

    def _update_moments(self, batch: _Batch) -> None:
        beta1, beta2 = self._betas(batch.step)
        grads = batch.grads
        exp_avgs, exp_avg_sqs = self._writable(batch.exp_avgs), self._writable(batch.exp_avg_sqs)
        if self.keys.running_init and batch.step == 1:
            torch._foreach_copy_(exp_avgs, grads)
            torch._foreach_copy_(exp_avg_sqs, torch._foreach_mul(grads, grads))
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        _scale(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        if self.keys.update_clipping:
            torch._foreach_clamp_min_(exp_avg_sqs, self.eps**2)
        self._replace(batch.exp_avgs, exp_avgs)
        self._replace(batch.exp_avg_sqs, exp_avg_sqs)
        for owner, exp_avg, exp_avg_sq in zip(batch.owners, batch.exp_avgs, batch.exp_avg_sqs, strict=True):
            if owner.dtype != self.buffer_dtype:
                local(self.state[owner]["exp_avg"]).copy_(exp_avg)
                local(self.state[owner]["exp_avg_sq"]).copy_(exp_avg_sq)

    def _directions(self, batch: _Batch) -> list[Tensor]:
        """What is subtracted, per unit of the rate."""
        beta1, _ = self._betas(batch.step)
        _, correction = self._bias_corrections(batch.step)
        momenta = batch.exp_avgs
        if self.keys.nesterov:
            momenta = list(torch._foreach_lerp(momenta, batch.grads, 1 - beta1))
        if self.keys.eps_adjustment:
            roots = torch._foreach_div(batch.exp_avg_sqs, correction)
            torch._foreach_add_(roots, self.eps**2)
            torch._foreach_sqrt_(roots)
        else:
            roots = torch._foreach_sqrt(batch.exp_avg_sqs)
            torch._foreach_div_(roots, math.sqrt(correction))
            if not self.keys.atan_adam:
                torch._foreach_add_(roots, self.eps)
        quotient = torch.atan2 if self.keys.atan_adam else torch.div
        for momentum, root in zip(momenta, roots, strict=True):
            quotient(momentum, root, out=root)
        return list(roots)

    def _apply(self, batch: _Batch, directions: list[Tensor]) -> None:
        """Weight decay with the unclipped rate, then the update."""
        correction, _ = self._bias_corrections(batch.step)
        rate = batch.lr / correction
        decay = batch.weight_decay * (batch.lr / self.initial_lr if self.keys.decouple_wd else batch.lr)
        params = self._writable(batch.params)
        if not self.keys.kahan_sum_compensation:
            _scale(params, 1 - decay)
            _add(params, directions, -rate)
            self._replace(batch.params, params)
            return
        kept = [local(self.state[owner]["kahan_compensation"]) for owner in batch.owners]
        compensations = self._writable(kept)
        _add(compensations, params, -decay)
        _add(compensations, directions, -rate)
        before = [param.clone() for param in params]
        torch._foreach_add_(params, compensations)
        torch._foreach_sub_(before, params)
        torch._foreach_add_(compensations, before)  # what was to be added less what was
        self._replace(batch.params, params)
        self._replace(kept, compensations)

    def _writable(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors themselves, or copies if it is not known yet whether this update may happen."""
        return tensors if self.found_inf is None else [tensor.clone() for tensor in tensors]

    def _replace(self, old: list[Tensor], new: list[Tensor]) -> None:
        if self.found_inf is not None:
            for before, after in zip(old, new, strict=True):
                replace_unless(self.found_inf, before, after)


def _rounds_factors(tensors: Sequence[Tensor]) -> bool:
    """Whether torch would round a factor to the tensors' type first, as it does on CPU:
    0.999 to 1 in bfloat16.
    """
    return tensors[0].is_cpu and tensors[0].dtype.itemsize < 4


def _scale(tensors: list[Tensor], factor: float) -> None:
    """tensors *= factor."""
    if not _rounds_factors(tensors):
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def _add(tensors: list[Tensor], others: list[Tensor], factor: float) -> None:
    """tensors += factor * others."""
    if not _rounds_factors(tensors):
        torch._foreach_add_(tensors, others, alpha=factor)
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(tensor.float().add_(other, alpha=factor))


def _mean_square_ratios(batch: _Batch) -> Sequence[Tensor]:
    """Of each tensor, this rank's share of the mean of g^2 / v."""
    ratios = torch._foreach_mul(batch.grads, batch.grads)
    torch._foreach_div_(ratios, batch.exp_avg_sqs)
    sums = torch._foreach_norm(ratios, 1, dtype=torch.float32)  # none is negative
    return torch._foreach_div(sums, [float(owner.numel()) for owner in batch.owners])


def _norms(parts: list[Tensor], owners: Sequence[Tensor]) -> Tensor:
    """The L2 norms of whole tensors, of which `parts` are this rank's: (len(parts),), float32."""
    squares = [norm.square() for norm in torch._foreach_norm(parts, dtype=torch.float32)]
    return sum_over_shards(squares, owners).sqrt()
