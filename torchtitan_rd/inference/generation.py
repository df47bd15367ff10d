"""Generation: a batch of prompts, one token at a time.

    loaded = load_model("outputs/debug")
    prompt = encode_prompt(loaded.tokenizer, "The")
    for answer in generate(loaded, [prompt], Settings(max_new_tokens=50)).rows:
        print(answer.text)

Shapes: B batch (prompts), V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.inference.exits import ExitPolicy
from torchtitan_rd.inference.loading import Loaded
from torchtitan_rd.inference.sampling import Sampling, choose, penalise, uniforms
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.inference.speculative import Drafting, speculate
from torchtitan_rd.inference.stepper import Stepper, one_by_one, resolve_depth, steps_of
from torchtitan_rd.inference.text import TextRow

Constraint = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of the new token, from 0; logits (B, V)) -> logits, with -inf where no token may be."""


@dataclass(frozen=True)
class Settings:
    """Raises ConfigError for settings that contradict each other.

    seed: of the draws, and of a recurrent model's first states. stop: strings that end a row, which are cut
    off.
    use_eos: whether the model's end-of-text ends a row. Of recurrent models: depth: iterations (None: the
    mean in training).
    kv: how positions share the cache (sharing.py). exits: when a token has been thought about enough.
    continuous: a token's recurrence starts from the last state of the one before it. init_scale: of the noise
    that is the first state otherwise.
    drafting: self-speculative decoding.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    use_eos: bool = True
    depth: int | None = None
    kv: str = "full"
    exits: ExitPolicy | None = None
    continuous: bool = False
    init_scale: float = 1.0
    drafting: Drafting | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if not 0 <= self.init_scale < float("inf"):
            raise ConfigError(f"init_scale = {self.init_scale} must be at least 0")
        if "" in self.stop:
            raise ConfigError("stop: an empty string would stop every row")
        if self.drafting is not None:
            plain = self.sampling.is_greedy and self.sampling.repetition_penalty == 1.0
            for wrong, remedy in (
                (not plain, "temperature 0 without a repetition penalty"),
                (self.continuous, "no continuous states"),
                (self.exits is not None, "no exit criterion"),
            ):
                if wrong:
                    raise ConfigError(f"draft_steps: speculative decoding goes with {remedy} only")

    def check(self, loaded: Loaded, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ConfigError if the model cannot do what is asked."""
        steps = steps_of(loaded.spec, loaded.model)
        depth = resolve_depth(loaded.spec, steps.mean_depth, self.depth)
        sharing = Sharing(self.kv, steps.layout.core, depth)
        if self.drafting is not None and depth:
            self.drafting.check(depth, sharing)
        if steps.mean_depth is None:
            given = {
                "kv": self.kv != "full",
                "exit criterion": self.exits,
                "continuous": self.continuous,
                "init_scale": self.init_scale != 1.0,
                "draft_steps": self.drafting,
            }
            for name, value in given.items():
                if value:
                    raise ConfigError(f"{name}: a {loaded.spec.name} has no recurrence; leave it out")
        if self.stop and loaded.tokenizer is None:
            raise ConfigError("stop: stop strings need a tokenizer, and this model has none")

        vocab_size, context = loaded.shape.vocab_size, loaded.shape.max_seq_len
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ConfigError(f"prompt {number} is empty: give at least one token")
            if beyond := [id_ for id_ in prompt if not 0 <= id_ < vocab_size]:
                raise ConfigError(
                    f"prompt {number} has the id {beyond[0]}, but the model's vocabulary is "
                    f"0..{vocab_size - 1}"
                )
        longest = max(map(len, prompts), default=0)
        if longest + self.max_new_tokens > context:
            raise ConfigError(
                f"{longest} tokens of the prompt and max_new_tokens = {self.max_new_tokens} are more than "
                f"the model's context of {context}: shorten one of them"
            )


@dataclass(frozen=True)
class Answer:
    """ids: of the new tokens, the one that ended the row included. text: without it; None without a
    tokenizer. ended: `eos`, `stop` or `length`. steps: iterations of the forward that gave each token; empty
    without a recurrence. exit_values: of each token, what the criterion said after each check."""

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    ended: str
    steps: list[int]
    exit_values: list[list[float]]


@dataclass(frozen=True)
class Report:
    """rows: in the order of the prompts. kv_bytes: of the cache. seconds: of the whole. drafted, accepted:
    tokens, of speculative decoding."""

    rows: list[Answer]
    kv_bytes: int
    seconds: float
    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    numbers: Sequence[int] | None = None,
    constraint: Constraint | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Report:
    """prompts: ids, at least one each. numbers: of the prompts, where these are a part of several: it decides
    their draws.
    on_text: called with (row, new text) as the text comes. Raises ConfigError before anything is computed."""
    begun = time.perf_counter()
    settings.check(loaded, prompts)
    rows = _Rows(loaded, prompts, settings, on_text)
    constraint = _of_numbers(rows, constraint)
    if not prompts:
        return Report([], 0, 0.0)

    longest = max(map(len, prompts))
    stepper = Stepper(
        loaded.spec,
        loaded.model,
        batch=len(prompts),
        positions=longest + settings.max_new_tokens,
        depth=settings.depth,
        strategy=settings.kv,
        seed=settings.seed,
        scale=settings.init_scale,
    )
    tokens, real = padded_left(prompts, stepper.device)

    if settings.drafting is not None:
        drafted, accepted = speculate(
            stepper, tokens, real, settings.drafting, settings.max_new_tokens, rows, constraint
        )
        return Report(rows.answers(), stepper.cache.nbytes, time.perf_counter() - begun, drafted, accepted)
    one_by_one(
        stepper,
        tokens,
        real,
        rows,
        _chooser(tokens, real, settings, numbers or range(len(prompts)), constraint),
        settings.max_new_tokens,
        policy=settings.exits,
        continuous=settings.continuous,
    )
    return Report(rows.answers(), stepper.cache.nbytes, time.perf_counter() - begun)


def _of_numbers(rows: "_Rows", constraint: Constraint | None) -> Constraint:
    """`constraint` of logits that are numbers. NaN would have a token all the same: the first one or the
    last, depending on how it is chosen. Raises CheckpointError if a row that goes on has any.
    """

    def checked(number: int, logits: torch.Tensor) -> torch.Tensor:
        broken = logits.isnan().any(-1).tolist()
        if any(nan and not ended for nan, ended in zip(broken, rows.ended, strict=True)):
            raise CheckpointError(
                f"the model's logits of new token {number} are NaN: its weights are none of a run that went "
                f"well, or a number overflowed; take an earlier checkpoint, or --dtype float32"
            )
        return logits if constraint is None else constraint(number, logits)

    return checked


def _chooser(
    tokens: torch.Tensor,
    real: torch.Tensor,
    settings: Settings,
    numbers: Sequence[int],
    constraint: Constraint,
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """-> (number of the new token, logits (B, V)) -> ids (B,), to be asked once for each token."""
    sampling, drawn = settings.sampling, None
    if not sampling.is_greedy:
        drawn = uniforms(settings.seed, numbers, settings.max_new_tokens).to(tokens.device)
    seen: torch.Tensor | None = None  # the ids that each row holds already, where a repetition costs

    def chosen(number: int, logits: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        if sampling.repetition_penalty != 1.0:
            if seen is None:
                counts = torch.zeros_like(logits).scatter_add_(1, tokens, real.float())
                seen = counts > 0
            logits = penalise(logits, seen, sampling.repetition_penalty)
        logits = constraint(number, logits)
        new = choose(logits, sampling, None if drawn is None else drawn[:, number])
        if seen is not None:
            seen.scatter_(1, new[:, None], True)
        return new

    return chosen


class _Rows:
    """What has been generated, and which rows go on."""

    def __init__(
        self,
        loaded: Loaded,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        on_text: Callable[[int, str], None] | None,
    ):
        self.prompts = [list(prompt) for prompt in prompts]
        self.recurrent = steps_of(loaded.spec, loaded.model).mean_depth is not None
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.steps: list[list[int]] = [[] for _ in prompts]
        self.values: list[list[list[float]]] = [[] for _ in prompts]
        self.ended = [""] * len(prompts)
        tokenizer = loaded.tokenizer
        self.texts = (
            None if tokenizer is None else [TextRow(tokenizer.decode, settings.stop) for _ in prompts]
        )
        eos = set(loaded.source.eos_ids)
        if tokenizer is not None and tokenizer.eos_id is not None:
            eos.add(tokenizer.eos_id)
        self.eos = eos if settings.use_eos else set()
        self.on_text = on_text or (lambda row, text: None)

    def push(self, ids: list[int], steps: list[int], values: Sequence[torch.Tensor] = ()) -> list[bool]:
        """One more token for each row that has not ended, and how it came about -> the rows that go on."""
        by_row = torch.stack(list(values)).T.tolist() if values else None
        for row, id_ in enumerate(ids):
            if self.ended[row]:
                continue
            self.ids[row].append(id_)
            if self.recurrent:
                self.steps[row].append(steps[row])
                self.values[row].append([v for v in by_row[row] if v == v] if by_row else [])
            if id_ in self.eos:
                self.ended[row] = "eos"
            elif self.texts is not None:
                self._show(row, self.texts[row].push(id_))
                if self.texts[row].stopped:
                    self.ended[row] = "stop"
        return [not ended for ended in self.ended]

    def _show(self, row: int, text: str) -> None:
        if text:
            self.on_text(row, text)

    def answers(self) -> list[Answer]:
        for row, text in enumerate(self.texts or []):
            self._show(row, text.flush())
        return [
            Answer(
                self.prompts[row],
                self.ids[row],
                None if self.texts is None else self.texts[row].text,
                self.ended[row] or "length",
                self.steps[row],
                self.values[row],
            )
            for row in range(len(self.prompts))
        ]


def padded_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids (B, longest), padded with 0; and where they are real."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        real[row, longest - len(prompt) :] = True
    return tokens.to(device), real.to(device)
