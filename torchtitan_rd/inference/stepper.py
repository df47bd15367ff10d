"""A model's forward in parts, on a KV cache: what generation, evaluation and other programs build on.

    stepper = Stepper(spec, model, batch=1, positions=64, depth=8)
    e = stepper.embed(prompt)                      # (1, S) ids: the next positions are open
    s = stepper.first_state()
    for t in range(8):
        s = stepper.iterate(s, e, t)
    logits = stepper.predict(s)                    # (1, 1, V): after the last position
    stepper.close()

`think` does all of this, and lets each sequence leave the recurrence on its own; `one_by_one` generates.
A raven's weights leave with this file and those that it imports (models/raven/huggingface): none knows
configurations, tokenizers or checkpoints.

Shapes: B batch, S new positions, E dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.cache import KVCache
from torchtitan_rd.inference.exits import NEVER, ExitPolicy, Seen
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.model_steps import Steppable, Steps


class Stepper:
    """depth: iterations at most; None: the model's mean. strategy: how positions share the cache
    (sharing.py). seed, scale: of the noise that is the first state; scale 0: no noise. Raises ConfigError."""

    def __init__(
        self,
        spec: Steppable,
        model: nn.Module,
        *,
        batch: int,
        positions: int,
        depth: int | None = None,
        strategy: str = "full",
        seed: int = 0,
        scale: float = 1.0,
    ):
        self.steps = steps_of(spec, model)
        self.depth = resolve_depth(spec, self.steps.mean_depth, depth)
        layout = self.steps.layout
        self.device = next(model.parameters()).device
        self.cache = KVCache(
            layout, Sharing(strategy, layout.core, self.depth), batch, positions, self.device
        )
        self.batch = batch
        self.seed, self.scale = seed, scale
        self._table = self.steps.rotary(positions)
        self._padding = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self._padded = False
        self._positions: slice | torch.Tensor = slice(0, 0)
        self.real: torch.Tensor | None = None

    def embed(self, tokens_BS: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """Opens the next S positions. real: (B, S) bool, False where a row is padded on the left; at the
        first call alone.

        -> (B, S, E)."""
        if real is not None and not bool(real.all()):
            self._padding, self._padded = (~real).sum(-1, keepdim=True), True
            self.real = real
        else:
            self.real = None
        self._open(tokens_BS.shape[1], real)
        return self.steps.embed(tokens_BS, self.rotary, self.cache.before)

    def reopen(self, count: int) -> None:
        """Opens the last `count` positions once more, which `embed` has seen one by one."""
        self.real = None
        self._open(count, None, self.cache.length - count)

    def _open(self, count: int, real: torch.Tensor | None, start: int | None = None) -> None:
        self.cache.open(count, real, start=start)
        start, end = self.cache.start, self.cache.length
        if not self._padded:
            self._positions = slice(start, end)
            self.rotary = self._table[start:end]
        else:
            places = torch.arange(start, end, device=self.device)
            self._positions = (places - self._padding).clamp(min=0)
            self.rotary = self._table[self._positions]

    def first_state(self) -> torch.Tensor | None:
        """-> (B, S, E) of the open positions: noise from (seed, position) alone.
        None: the state starts at e.
        """
        if self._noise is None:
            return None
        state = self._noise[self._positions]
        return state if state.ndim == 3 else state.expand(self.batch, -1, -1)

    @cached_property
    def _noise(self) -> torch.Tensor | None:
        """(positions, E), made when it is first asked for."""
        rows = (
            self.steps.first_state(self.seed, position, self.scale) for position in range(len(self._table))
        )
        known = [row for row in rows if row is not None]
        return torch.stack(known).to(self.device) if known else None

    def iterate(self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, step: int) -> torch.Tensor:
        """Iteration `step`, from 0. -> (B, S, E)."""
        return self.steps.iterate(s_BSE, e_BSE, self.rotary, self.cache.core[step])

    def predict(self, s_BSE: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """-> logits (B, keep, V) of the last `keep` open positions. May be called again with another
        state."""
        return self.steps.predict(s_BSE, self.rotary, self.cache.after, keep)

    def close(self, steps: torch.Tensor | None = None) -> None:
        """steps: (B,), the iterations that each row was given; None: all."""
        if steps is not None:
            self.cache.close(steps)


@dataclass(frozen=True)
class Thought:
    """logits: (B, V) after the last position. state: (B, S, E), each row's at its last iteration; without a
    recurrence what the layers gave. steps: (B,) iterations. values: of each check, the criterion's (B,); NaN
    for rows that had left."""

    logits: torch.Tensor
    state: torch.Tensor
    steps: torch.Tensor
    values: list[torch.Tensor]


def think(
    stepper: Stepper,
    tokens_BS: torch.Tensor,
    *,
    real: torch.Tensor | None = None,
    policy: ExitPolicy | None = None,
    state: torch.Tensor | None = None,
    alive: torch.Tensor | None = None,
) -> Thought:
    """One forward over the next S positions, closed at its end.

    policy: lets a row leave early; its state, keys and values are then those of its own last iteration,
    whatever the others go on to. state: to start from in place of noise. alive: (B,) bool, the rows that
    count; with a policy the others get no iteration, and their results mean nothing.
    """
    e = stepper.embed(tokens_BS, real)
    batch = len(tokens_BS)
    steps = torch.full((batch,), stepper.depth, device=stepper.device)
    if stepper.steps.mean_depth is None:
        return Thought(stepper.predict(e)[:, -1], e, steps, [])
    s = stepper.first_state() if state is None else state
    s = e if s is None else s

    if policy is None or policy.criterion == NEVER:
        for step in range(stepper.depth):
            s = stepper.iterate(s, e, step)
        return Thought(stepper.predict(s)[:, -1], s, steps, [])

    # `inside`: the rows that have not left yet.
    inside = torch.ones_like(steps, dtype=torch.bool) if alive is None else alive.clone()
    steps, values, measure, logits = torch.zeros_like(steps), [], None, None
    for step in range(stepper.depth):
        previous, logits = s, None
        s = _step_of(stepper, s, e, step, inside)
        steps = steps + inside
        if (step + 1) % policy.every:
            continue

        if policy.rule.on_logits:
            logits = stepper.predict(s)[:, -1]
        if measure is None:
            vocab_size = 0 if logits is None else logits.shape[-1]
            measure = policy.rule.start(batch, vocab_size, stepper.device)
        value = measure(Seen(s, previous, s.new_empty(0) if logits is None else logits, stepper.real))
        values.append(value.float().where(inside, torch.nan))
        if step + 1 >= policy.min_steps:
            inside = inside & ~policy.leaves(value)
            if not bool(inside.any()):
                break
    # Who has left keeps its state, so that this gives the logits of its own last iteration again.
    logits = stepper.predict(s)[:, -1] if logits is None else logits
    stepper.close(steps)
    return Thought(logits, s, steps, values)


class Rows(Protocol):
    """Takes the tokens that are sure."""

    def push(self, ids: list[int], steps: list[int], values: Sequence[torch.Tensor] = ()) -> list[bool]:
        """One more token for each row that has not ended, the iterations that it took and what the criterion
        said -> the rows that go on."""


def one_by_one(
    stepper: Stepper,
    tokens_BS: torch.Tensor,
    real: torch.Tensor,
    rows: Rows,
    choose: Callable[[int, torch.Tensor], torch.Tensor],
    max_new_tokens: int,
    *,
    policy: ExitPolicy | None = None,
    continuous: bool = False,
) -> None:
    """Generates until all rows have ended. tokens_BS: the prompts, `real` where they are no padding.

    choose: (number of the new token, logits (B, V)) -> ids (B,). continuous: a token's recurrence starts from
    the last state of the one before it.
    """
    in_prompt = policy if policy is not None and policy.in_prefill else None
    thought = think(stepper, tokens_BS, real=real, policy=in_prompt)
    for number in range(max_new_tokens):
        new = choose(number, thought.logits)
        alive = rows.push(new.tolist(), thought.steps.tolist(), thought.values)
        if not any(alive) or number + 1 == max_new_tokens:
            return
        state = thought.state[:, -1:] if continuous else None
        mask = None if policy is None else torch.tensor(alive, device=stepper.device)
        thought = think(stepper, new[:, None], policy=policy, state=state, alive=mask)


def _step_of(
    stepper: Stepper, s: torch.Tensor, e: torch.Tensor, step: int, inside: torch.Tensor
) -> torch.Tensor:
    """One iteration of the rows `inside`; the others keep their state, and write neither keys nor values."""
    if bool(inside.all()):
        return stepper.iterate(s, e, step)
    stepper.cache.writers = inside[:, None, None, None]
    new = stepper.iterate(s, e, step)
    stepper.cache.writers = None
    return new.where(inside[:, None, None], s)


def steps_of(spec: Steppable, model: nn.Module) -> Steps:
    """Raises ConfigError for a family that gives no forward in parts."""
    if spec.steps is None:
        raise ConfigError(f"a {spec.name} cannot generate: its ModelSpec has no `steps`")
    return spec.steps(model)


def resolve_depth(spec: Steppable, mean_depth: int | None, depth: int | None) -> int:
    """Iterations of a forward; 0 for a model without a recurrence. Raises ConfigError."""
    if mean_depth is None:
        if depth is not None:
            raise ConfigError(f"depth = {depth}: a {spec.name} has no recurrence; leave it out")
        return 0
    if depth is not None and depth < 1:
        raise ConfigError(f"depth = {depth} must be at least 1")
    return mean_depth if depth is None else depth
