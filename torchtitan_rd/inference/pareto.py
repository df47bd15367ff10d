"""What each exit criterion would cost and lose, from one pass over the data at maximum depth.

`record` runs every window through all iterations once and keeps, for each position and iteration, the
loss and what each criterion says. From that follows what any threshold would have done, and so the
threshold for a mean depth.

Each position is judged as a token that is generated after a prompt: the positions before it have been
given all iterations (`--full-depth-prompt`), it leaves on its own. Under a strategy of the cache that is
exact (`Sharing.is_exact`) that is all in one forward. A strategy that mixes iterations needs the positions
one after the other (`record_singly`). Generation in which the earlier tokens left early too is not
foreseen: `replay` runs it.

Shapes: B sequences, S positions, T iterations, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F

from torchtitan_rd.batch import IGNORE_INDEX
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.exits import CRITERIA, NEVER, ExitPolicy, Measure, Seen
from torchtitan_rd.inference.loading import Loaded
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.inference.stepper import Stepper, steps_of, think
from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.model_steps import KeyValues, grouped_attention
from torchtitan_rd.whole_file import whole_file

Windows = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Inputs and labels (B, S) int64; labels of -100 do not count."""

JUDGED = tuple(CRITERIA)


@dataclass(frozen=True)
class Record:
    """losses: (T, N) nats of each valid label after each iteration. values: criterion -> (T, N).

    core: layers of the recurrence. position_bytes: of one slot's keys and values of a position.
    fixed_slots: slots outside the recurrence.
    """

    losses: np.ndarray
    values: Mapping[str, np.ndarray]
    core: int
    position_bytes: int
    fixed_slots: int

    @property
    def depth(self) -> int:
        return len(self.losses)


class Outcome(NamedTuple):
    """What a policy does: mean loss in nats per token, mean iterations of a token,
    and bytes of the cache that a token has written when it leaves.
    """

    loss: float
    steps: float
    kv_bytes: float


@torch.inference_mode()
def record(loaded: Loaded, windows: Windows, depth: int | None = None, *, seed: int = 0) -> Record:
    """One forward of `depth` iterations (None: the model's mean) a window, for all criteria and thresholds.

    seed: of the first states, as in generation. Keeps 4 (1 + criteria) T bytes a label,
    and all states of a window. Raises ConfigError.
    """
    require_recurrence(loaded.spec)
    stepper = None
    parts: list[dict[str, torch.Tensor]] = []
    for inputs, labels in windows:
        # Positions of one forward meet at the same iteration, so a cache of one iteration is exact here.
        core = steps_of(loaded.spec, loaded.model).layout.core
        stepper = _stepper(loaded, inputs.shape, depth, seed, f"compress-s{core}" if core else "full")
        valid = labels.to(stepper.device) != IGNORE_INDEX
        labels = labels.to(stepper.device)
        e = stepper.embed(inputs.to(stepper.device))
        s = stepper.first_state()
        s = e if s is None else s.expand_as(e)
        states = [s]
        for step in range(stepper.depth):
            states.append(stepper.iterate(states[-1], e, step))
        length, part = inputs.shape[1], _Part(labels[valid], valid)
        # Leaves in the layers behind the recurrence what later positions see there.
        stepper.predict(states[-1])
        caches = [_OwnBeside(slot.keys, slot.values, length) for slot in stepper.cache.after]
        for previous, s in pairwise(states):
            part.add(s, previous, stepper.steps.predict(s, stepper.rotary, caches, length))
        parts.append(part.on_cpu())
    return _record_of(stepper, parts)


class _OwnBeside(KeyValues):
    """A layer behind the recurrence, after an iteration that is not the last:
    each position sees itself as it is now, and those before it as they were left after all iterations.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        self.keys, self.values = keys[:, :, :length].clone(), values[:, :, :length].clone()
        full = torch.ones(length, length, dtype=torch.bool, device=keys.device)
        self.mask = torch.cat(
            (full.tril(-1), torch.eye(length, dtype=torch.bool, device=keys.device)), dim=-1
        )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        return grouped_attention(q, keys, values, self.mask, causal=False)


@torch.inference_mode()
def record_singly(
    loaded: Loaded, windows: Windows, kv: str, depth: int | None = None, *, seed: int = 0
) -> Record:
    """The same under a strategy of the cache that mixes iterations: the positions one after the other."""
    require_recurrence(loaded.spec)
    stepper = None
    parts: list[dict[str, torch.Tensor]] = []
    for inputs, labels in windows:
        stepper = _stepper(loaded, inputs.shape, depth, seed, kv)
        labels = labels.to(stepper.device)
        for place in range(inputs.shape[1]):
            valid = labels[:, place : place + 1] != IGNORE_INDEX
            e = stepper.embed(inputs[:, place : place + 1].to(stepper.device))
            s = stepper.first_state()
            s = e if s is None else s.expand_as(e)
            part = _Part(labels[:, place : place + 1][valid], valid)
            for step in range(stepper.depth):
                previous, s = s, stepper.iterate(s, e, step)
                part.add(s, previous, stepper.predict(s))
            parts.append(part.on_cpu())
    return _record_of(stepper, parts)


@torch.inference_mode()
def replay(
    loaded: Loaded,
    windows: Windows,
    policy: ExitPolicy,
    kv: str = "full",
    depth: int | None = None,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """What generation does in which every token leaves on its own, with the data's tokens in place of its own
    choice -> mean loss, mean iterations.
    """
    require_recurrence(loaded.spec)
    nats, steps, count = 0.0, 0, 0
    for inputs, labels in windows:
        stepper = _stepper(loaded, inputs.shape, depth, seed, kv)
        inputs, labels = inputs.to(stepper.device), labels.to(stepper.device)
        for place in range(inputs.shape[1]):
            thought = think(stepper, inputs[:, place : place + 1], policy=policy)
            valid = labels[:, place] != IGNORE_INDEX
            nats += F.cross_entropy(thought.logits, labels[:, place], reduction="sum").item()
            steps += int(thought.steps[valid].sum())
            count += int(valid.sum())
    if not count:
        raise ConfigError("there is no data to judge by")
    return nats / count, steps / count


def outcome(record: Record, policy: ExitPolicy, kv: str = "full") -> Outcome:
    """What `policy` would have done. kv: a strategy for the memory. Raises ConfigError if it is none."""
    steps = exit_steps(record, policy)
    sharing = Sharing(kv, record.core, record.depth)
    slots = np.array([sharing.written(count) for count in range(record.depth + 1)])
    loss = record.losses[steps - 1, np.arange(len(steps))].mean(dtype=np.float64)
    held = (slots[steps].mean() + record.fixed_slots) * record.position_bytes
    return Outcome(float(loss), float(steps.mean()), float(held))


def exit_steps(record: Record, policy: ExitPolicy) -> np.ndarray:
    """(N,) iterations that each token would have been given, as `think` gives them."""
    if policy.every > 1:
        raise ConfigError(
            "every: the record compares neighbouring iterations, so a criterion is asked after each"
        )
    if policy.criterion == NEVER:
        return np.full(record.losses.shape[1], record.depth)
    values = torch.from_numpy(record.values[policy.criterion])
    leaves = policy.leaves(values).numpy()
    leaves[: policy.min_steps - 1] = False
    return np.where(leaves.any(0), leaves.argmax(0) + 1, record.depth)


def thresholds_of(record: Record, criterion: str, count: int = 24) -> list[float]:
    """From the one at which nearly all tokens take one iteration to that at which nearly none leaves."""
    if CRITERIA[criterion].counts:
        return [float(number) for number in range(record.depth)]
    values = record.values[criterion]
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return [0.0]
    low, high = np.quantile(values, [0.001, 0.999])
    return np.geomspace(low, high, count).tolist() if low < high else [float(low)]


def threshold_for(record: Record, criterion: str, target: float, min_steps: int = 1) -> float:
    """The threshold whose mean depth comes nearest to `target` from below.
    Raises ConfigError for a target that no threshold of it meets.
    """

    def steps(threshold: float) -> float:
        return outcome(record, ExitPolicy(criterion, threshold, min_steps)).steps

    if CRITERIA[criterion].counts:
        fitting = [t for t in thresholds_of(record, criterion) if steps(t) <= target]
        if not fitting:
            raise ConfigError(
                f"{criterion} cannot reach a mean depth of {target}: its least is {steps(0):.2f}"
            )
        return max(fitting)
    values = np.unique(record.values[criterion]).astype(np.float64)
    values = values[np.isfinite(values)]
    # A value leaves if it is below the threshold, so nothing changes between two of them.
    # The middle of such a gap is as far as can be from where rounding would decide.
    candidates = np.append((values[:-1] + values[1:]) / 2, 2 * values[-1:])
    if not len(candidates) or steps(float(candidates[-1])) > target:
        raise ConfigError(f"{criterion} cannot reach a mean depth of {target}, with min_steps = {min_steps}")
    low, high = 0, len(candidates) - 1
    while low < high:  # the smallest threshold is the deepest
        middle = (low + high) // 2
        if steps(float(candidates[middle])) <= target:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])


class Choice(NamedTuple):
    """The policy with the lowest loss at a mean depth of at most what was asked for."""

    policy: ExitPolicy
    outcome: Outcome


def choose_policy(
    record: Record, target: float, criteria: Sequence[str] = JUDGED, *, kv: str = "full", min_steps: int = 1
) -> Choice:
    """Raises ConfigError if no criterion can."""
    found, problems = [], []
    for criterion in criteria:
        try:
            threshold = threshold_for(record, criterion, target, min_steps)
        except ConfigError as error:
            problems.append(str(error))
            continue
        policy = ExitPolicy(criterion, threshold, min_steps, in_prefill=False)
        found.append(Choice(policy, outcome(record, policy, kv)))
    if not found:
        raise ConfigError("; ".join(problems))
    return min(found, key=lambda choice: choice.outcome.loss)


def write_policy(path: Path, policy: ExitPolicy, kv: str) -> None:
    """A file for `generate --exit-policy`. Raises ConfigError if it cannot be written."""
    table = {
        "criterion": policy.criterion,
        **({} if policy.threshold is None else {"threshold": float(policy.threshold)}),
        "min_steps": policy.min_steps,
        "every": policy.every,
        "in_prefill": policy.in_prefill,
        "kv": kv,
    }
    with whole_file(path, "--policy") as part:
        part.write_text(tomli_w.dumps(table), encoding="utf-8")


class _Part:
    """The valid positions of one forward, iteration by iteration."""

    def __init__(self, labels_N: torch.Tensor, valid_BS: torch.Tensor):
        self.labels, self.valid = labels_N, valid_BS
        self.losses: list[torch.Tensor] = []
        self.values: dict[str, list[torch.Tensor]] = {name: [] for name in JUDGED}
        self.measures: dict[str, Measure] = {}

    def add(self, s_BSE: torch.Tensor, previous_BSE: torch.Tensor, logits_BSV: torch.Tensor) -> None:
        """Each position as a forward of its own: criteria then look at it alone."""
        logits = logits_BSV[self.valid]
        if not self.measures:
            count, vocab_size = logits.shape
            self.measures = {name: CRITERIA[name].start(count, vocab_size, logits.device) for name in JUDGED}
        seen = Seen(s_BSE[self.valid][:, None], previous_BSE[self.valid][:, None], logits, None)
        self.losses.append(F.cross_entropy(logits, self.labels, reduction="none"))
        for name, measure in self.measures.items():
            self.values[name].append(measure(seen).float())

    def on_cpu(self) -> dict[str, torch.Tensor]:
        """The losses and, by the names of the criteria, their values: (T, positions) each."""
        found = {"losses": self.losses, **self.values}
        return {name: torch.stack(kept).cpu() for name, kept in found.items()}


def _record_of(stepper: Stepper | None, parts: list[dict[str, torch.Tensor]]) -> Record:
    if stepper is None or not sum(part["losses"].shape[1] for part in parts):
        raise ConfigError("there is no data to judge by")
    layout = stepper.steps.layout
    whole = {name: torch.cat([part[name] for part in parts], dim=1).numpy() for name in parts[0]}
    losses = whole.pop("losses")
    return Record(
        losses,
        whole,
        layout.core,
        2 * layout.kv_heads * layout.head_dim * layout.dtype.itemsize,
        layout.before + layout.after,
    )


def _stepper(loaded: Loaded, shape: torch.Size, depth: int | None, seed: int, kv: str) -> Stepper:
    batch, positions = shape
    return Stepper(
        loaded.spec, loaded.model, batch=batch, positions=positions, depth=depth, strategy=kv, seed=seed
    )


def require_recurrence(spec: ModelSpec) -> None:
    """Raises ConfigError for a model that has none."""
    if spec.inputs is None:
        raise ConfigError(f"a {spec.name} has no recurrence to leave: pareto is for recurrent models")
