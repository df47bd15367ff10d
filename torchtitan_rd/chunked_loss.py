"""The head and the loss in one, chunk by chunk of tokens: the logits of one chunk are in memory at a time.

At 131072 tokens and a vocabulary of 128256 all logits in float32 are 63 GiB, and the plain loss holds three
of that size. Here the gradients of a chunk are made with its loss, while its logits are there, so nothing is
computed twice; they wait for the factor that backward multiplies them by.

Shapes: N tokens, E dim, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.loss import LossSums, cross_entropy_sums
from torchtitan_rd.model_spec import FusedReadOut, ReadOut
from torchtitan_rd.parallelism.local_part import local
from torchtitan_rd.parallelism.vocabulary import VocabularyPart


def loss_read_out(
    labels: torch.Tensor,
    z_loss_weight: float | torch.Tensor = 0.0,
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> ReadOut | FusedReadOut:
    """What makes LossSums of the head: of all logits at once, or of `chunk_tokens` at a time."""
    if chunk_tokens is None:
        return partial(
            cross_entropy_sums, labels=labels, z_loss_weight=z_loss_weight, token_weights=token_weights
        )
    return ChunkedLoss(labels, chunk_tokens, z_loss_weight, token_weights)


@dataclass(eq=False)
class ChunkedLoss(FusedReadOut):
    """What `loss.cross_entropy_sums` gives of the head's logits, to rounding.

    labels: (B, S) int64. z_loss_weight, token_weights: as there.
    chunk_tokens: the tokens whose logits exist at a time.
    """

    labels: torch.Tensor
    chunk_tokens: int
    z_loss_weight: float | torch.Tensor = 0.0
    token_weights: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> LossSums:
        objective, cross_entropy = _ChunkedLossSums.apply(
            hidden.flatten(0, -2),
            local(weight),
            VocabularyPart.of(weight, 0),
            self.labels.flatten(),
            self.chunk_tokens,
            self.z_loss_weight,
            self.token_weights,
            torch.is_grad_enabled(),
        )
        return LossSums(objective, cross_entropy)


class _ChunkedLossSums(torch.autograd.Function):
    """objective = sum over valid tokens of w (lse - logit of the label) + z lse^2, where lse is the logsumexp
    of the logits and w the weight of the label, 1 without weights.

    d logits = softmax (w + 2 z lse) - w onehot, for valid tokens.

    part: which ids weight_VE has, where ranks share them; None: all. The gradient of hidden is then this
    rank's summand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: torch.Tensor,
        weight_VE: torch.Tensor,
        part: VocabularyPart | None,
        labels_N: torch.Tensor,
        chunk_tokens: int,
        z_loss_weight: float | torch.Tensor,
        token_weights: torch.Tensor | None,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dhidden_NE = torch.empty_like(hidden_NE) if with_gradients and ctx.needs_input_grad[0] else None
        dweight_VE = None
        if with_gradients and ctx.needs_input_grad[1]:
            # The sum over many chunks: in float32 whatever the matmuls are in.
            dweight_VE = torch.zeros_like(weight_VE, dtype=torch.float32)

        has_z_loss = isinstance(z_loss_weight, torch.Tensor) or z_loss_weight != 0.0
        cross_entropy = hidden_NE.new_zeros((), dtype=torch.float32)
        squares = torch.zeros_like(cross_entropy)
        for start in range(0, len(labels_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            valid = labels_N[chunk] != IGNORE_INDEX
            # Any column will do for an ignored label: it gets 0.
            targets = labels_N[chunk].where(valid, 0)
            counts = valid.float() if token_weights is None else valid * token_weights[targets]

            logits = (hidden_NE[chunk] @ weight_VE.T).float()
            if part is None:
                lse, of_labels = logits.logsumexp(dim=-1), logits.gather(1, targets.unsqueeze(1)).squeeze(1)
            else:
                lse, of_labels = part.log_sums(logits, targets)
            cross_entropy += torch.where(valid, counts * (lse - of_labels), 0.0).sum()
            if has_z_loss:
                squares += torch.where(valid, lse.square(), 0.0).sum()
            if dhidden_NE is None and dweight_VE is None:
                continue

            softmax = logits.sub_(lse.unsqueeze(1)).exp_()  # in the place of the logits
            of_softmax = torch.where(valid, counts + 2.0 * z_loss_weight * lse, 0.0)
            dlogits = softmax.mul_(of_softmax.unsqueeze(1))
            if part is not None:
                targets, is_own = part.find(targets)
                counts = counts * is_own
            dlogits.scatter_add_(1, targets.unsqueeze(1), -counts.unsqueeze(1))
            dlogits = dlogits.to(hidden_NE.dtype)
            if dhidden_NE is not None:
                torch.mm(dlogits, weight_VE, out=dhidden_NE[chunk])
            if dweight_VE is not None:
                dweight_VE += dlogits.T @ hidden_NE[chunk]

        ctx.gradients = (dhidden_NE, dweight_VE)
        ctx.weight_dtype = weight_VE.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + z_loss_weight * squares, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss in chunks has one backward: its gradients are scaled in place")
        dhidden_NE, dweight_VE = ctx.gradients
        ctx.gradients = None
        if dhidden_NE is not None:
            dhidden_NE.mul_(dsum)
        if dweight_VE is not None:
            dweight_VE = dweight_VE.mul_(dsum).to(ctx.weight_dtype)
        return dhidden_NE, dweight_VE, None, None, None, None, None, None
