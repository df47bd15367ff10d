"""Self-speculative decoding: fewer iterations draft a few tokens, all iterations verify them at once.

Drafting is the first part of the full computation: with the plain cache, the keys and values of an iteration
do not depend on how many follow. So verification goes on from the drafts' states, and only iterations of
tokens that turn out wrong are lost.

Shapes: B batch, S tokens of a draft, E dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.inference.stepper import Rows, Stepper, think


@dataclass(frozen=True)
class Drafting:
    """steps: iterations of a draft. lookahead: tokens that are drafted before they are verified. threshold: 1
    accepts a token only if it is the most likely one at full depth, so the output is that of plain greedy
    decoding; less accepts one with this share of the largest probability. Raises ConfigError."""

    steps: int
    lookahead: int = 8
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lookahead < 1:
            raise ConfigError(
                f"draft_steps = {self.steps} and lookahead = {self.lookahead} must be at least 1"
            )
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"verification_threshold = {self.threshold} must be above 0 and at most 1")

    def check(self, depth: int, sharing: Sharing) -> None:
        """Raises ConfigError if this cannot go with the full depth or with the way that positions share the
        cache."""
        if self.steps >= depth:
            raise ConfigError(f"draft_steps = {self.steps} must be below the depth of {depth}")
        if not sharing.is_exact:
            raise ConfigError(f"draft_steps: kv = {sharing.name!r} mixes iterations; use 'full'")


def speculate(
    stepper: Stepper,
    tokens_BS: torch.Tensor,
    real: torch.Tensor,
    drafting: Drafting,
    max_new_tokens: int,
    rows: Rows,
    constraint: Callable[[int, torch.Tensor], torch.Tensor] | None,
) -> tuple[int, int]:
    """-> tokens that were drafted, and of these accepted. Rows keep step: what one rejects is lost for
    all."""
    drafting.check(stepper.depth, stepper.cache.sharing)
    full = [stepper.depth] * len(tokens_BS)
    allowed = constraint or (lambda number, logits: logits)
    last = allowed(0, think(stepper, tokens_BS, real=real).logits).argmax(-1)
    alive = rows.push(last.tolist(), full)
    count, drafted, accepted = 1, 0, 0

    while any(alive) and count < max_new_tokens:
        # Fewer iterations draft; the verification goes on from the states that they have reached.
        ahead = min(drafting.lookahead, max_new_tokens - count)
        embedded, states, drafts = _draft(stepper, last, ahead, drafting.steps, count, allowed)
        stepper.reopen(ahead)
        for step in range(drafting.steps, stepper.depth):
            states = stepper.iterate(states, embedded, step)
        logits = stepper.predict(states, keep=ahead)
        logits = torch.stack([allowed(count + i, logits[:, i]) for i in range(ahead)], dim=1)

        best, guesses = logits.argmax(-1), torch.stack(drafts, dim=1)
        if drafting.threshold < 1:
            p = logits.softmax(-1)
            likely = p.gather(-1, guesses[..., None])[..., 0] >= drafting.threshold * p.amax(-1)
            best = guesses.where(likely, best)

        # Rows keep step, so the first position at which any row disagrees is the last that counts.
        going = torch.tensor(alive, device=stepper.device)
        agreed = ((best == guesses) | ~going[:, None]).all(0).tolist()
        right = agreed.index(False) if False in agreed else ahead
        taken = min(right + 1, ahead)  # at the first disagreement the verified token is the right one
        stepper.cache.rewind(ahead - taken)
        drafted, accepted, count = drafted + ahead, accepted + right, count + taken
        for i in range(taken):
            alive = rows.push(best[:, i].tolist(), full)
        last = best[:, taken - 1]
    return drafted, accepted


def _draft(
    stepper: Stepper,
    last: torch.Tensor,
    ahead: int,
    steps: int,
    count: int,
    allowed: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """-> e (B, S, E) and states (B, S, E) after `steps` iterations of `last` and the drafts but for the last;
    the drafts."""
    embedded, states, drafts = [], [], []
    for number in range(ahead):
        e = stepper.embed(last[:, None])
        s = stepper.first_state()
        s = e if s is None else s
        for step in range(steps):
            s = stepper.iterate(s, e, step)
        last = allowed(count + number, stepper.predict(s)[:, -1]).argmax(-1)
        embedded.append(e)
        states.append(s)
        drafts.append(last)
    return torch.cat(embedded, dim=1), torch.cat(states, dim=1), drafts
