"""`generate` with adaptive depth, shared caches, self-speculative decoding and continuous chains of thought.

    model.generate(ids, max_new_tokens=50, criterion="kl", cache_lookup_strategy="latest-m4")

These have arguments of their own, which `Thinking` describes. With none of them transformers generates, and
every token gets num_steps iterations. How tokens are drawn and when a row ends is transformers' business in
both cases.

Shapes: B batch, N new tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .errors import ConfigError, nearest
from .exits import CRITERIA, ExitPolicy
from .sharing import Sharing
from .speculative import Drafting, speculate
from .stepper import Stepper, one_by_one
from .steps_raven import FAMILY

# What these ways to generate make themselves.
REFUSED = ("inputs_embeds", "input_states", "position_ids", "past_key_values")


@dataclass(frozen=True)
class Thinking:
    """Arguments of generate, named as in the released class. Raises ValueError if they contradict each other.

    criterion: lets each row leave the recurrence on its own: a name of CRITERIA (exits.py), by default
        "entropy-diff" if a threshold is given.
    exit_threshold: "auto" takes the criterion's own.
    min_steps: iterations that every token gets. check_criterion_every_n_steps: when it is asked.
    do_not_exit_in_prefill: the prompt gets all iterations.
    cache_lookup_strategy: what earlier tokens show to iterations that they did not have, and how iterations
        share memory (sharing.py).
    draft_steps: iterations that draft tokens, lookahead_for_draft (8) of which are verified at once at full
        depth. verification_threshold: 1 accepts what plain greedy decoding gives alone; less, what has this
        share of the largest probability.
    continuous_compute: a token's recurrence starts from the last state of the one before it.
    """

    criterion: str | None = None
    exit_threshold: float | str | None = None
    min_steps: int | None = None
    check_criterion_every_n_steps: int | None = None
    do_not_exit_in_prefill: bool | None = None
    cache_lookup_strategy: str | None = None
    draft_steps: int | None = None
    lookahead_for_draft: int | None = None
    verification_threshold: float | None = None
    continuous_compute: bool | None = None

    @staticmethod
    def among(arguments: Mapping[str, Any]) -> "Thinking | None":
        """Of the arguments of generate, those that are meant here; None if there are none."""
        given = {name: arguments[name] for name in OWN if arguments.get(name) is not None}
        return Thinking(**given) if given else None

    def policy(self) -> ExitPolicy | None:
        """What says when a row has thought enough."""
        threshold = self.exit_threshold
        if self.criterion is None and threshold is None:
            for name in ("min_steps", "check_criterion_every_n_steps", "do_not_exit_in_prefill"):
                if getattr(self, name):
                    raise ValueError(f"{name}: there is no criterion to wait for{nearest('', CRITERIA)}")
            return None

        if threshold == "auto":
            threshold = None
        try:
            threshold = None if threshold is None else float(threshold)
        except (TypeError, ValueError):
            raise ValueError(f"exit_threshold = {threshold!r} is neither a number nor 'auto'") from None
        return ExitPolicy(
            "entropy-diff" if self.criterion is None else str(self.criterion),
            threshold,
            max(int(self.min_steps or 0), 1),  # the released class says 0, but gives one too
            1 if self.check_criterion_every_n_steps is None else int(self.check_criterion_every_n_steps),
            not self.do_not_exit_in_prefill,
        )

    def drafting(self) -> Drafting | None:
        """How tokens are drafted."""
        if self.draft_steps is None:
            for name in ("lookahead_for_draft", "verification_threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: name the iterations of a draft too, with draft_steps")
            return None
        if self.criterion is not None or self.exit_threshold is not None or self.continuous_compute:
            raise ValueError("draft_steps goes with no criterion, exit_threshold or continuous_compute")
        lookahead, threshold = self.lookahead_for_draft, self.verification_threshold
        return Drafting(
            int(self.draft_steps),
            8 if lookahead is None else int(lookahead),
            1.0 if threshold is None else min(float(threshold), 1.0),
        )

    def check(self, core: int, depth: int) -> None:
        """core: layers of the recurrence. depth: iterations."""
        if depth < 1:
            raise ValueError(f"num_steps = {depth} must be at least 1")
        self.policy()
        try:
            sharing = Sharing(self.strategy, core, depth)
        except ConfigError as error:
            raise ValueError(f"cache_lookup_strategy: {error}") from None
        if (drafting := self.drafting()) is not None:
            drafting.check(depth, sharing)

    @property
    def strategy(self) -> str:
        return "full" if self.cache_lookup_strategy is None else str(self.cache_lookup_strategy)


OWN = tuple(field.name for field in fields(Thinking))


@dataclass
class RavenGeneration(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` gives with an argument of `Thinking`.

    steps: (B, N), the iterations of the forward that gave each token; 0 where the row had ended.
    exit_values: of each token, what the criterion said at each check, (checks, B); NaN for who had left.
    kv_bytes: of the cache. drafted, accepted: tokens, of speculative decoding, which keeps no scores.
    """

    steps: torch.Tensor | None = None
    exit_values: tuple[torch.Tensor, ...] | None = None
    kv_bytes: int | None = None
    drafted: int | None = None
    accepted: int | None = None


class AdaptiveGenerationMixin(GenerationMixin):
    """Finds the arguments of `Thinking` among those of generate."""

    config: Any
    training: bool

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the arguments of `Thinking`. Also in training mode, in which a Trainer
        leaves a model, all tokens have one depth: num_steps, by default that of evaluation.
        """
        if self.training:
            kwargs.setdefault("num_steps", self.config.mean_recurrence)
        with _value_errors():
            return super().generate(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Called by transformers before it computes anything, with the arguments that are not its own."""
        thinking = Thinking.among(model_kwargs)
        if thinking is not None:
            if given := [name for name in REFUSED if model_kwargs.get(name) is not None]:
                raise ValueError(f"{given[0]} cannot be given together with {_named(model_kwargs)}")
            scale = model_kwargs.get("init_scale")
            if scale is not None and not 0 <= float(scale) < float("inf"):
                raise ValueError(f"init_scale = {scale} must be at least 0")
            depth = self._depth(model_kwargs.get("num_steps"))
            thinking.check(self.config.n_layers_in_recurrent_block, depth)
        super()._validate_model_kwargs(_others(model_kwargs))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        config, thinking = generation_config, Thinking.among(model_kwargs)
        if thinking is not None:
            drawn_drafts = thinking.drafting() is not None and config.do_sample
            for wrong, problem in (
                ((config.num_beams or 1) > 1, "beams have no common depth: num_beams must be 1"),
                (config.use_cache is False, "there is always a cache: leave out use_cache=False"),
                (config.cache_implementation is not None, "cache_implementation has no meaning"),
                (self.config._attn_implementation != "sdpa", "attn_implementation must be 'sdpa'"),
                (drawn_drafts, "speculative decoding is greedy: do_sample must be False"),
            ):
                if wrong:
                    raise ValueError(f"{_named(model_kwargs)}: {problem}")
            return None

        # Transformers would take the number of layers from the config.
        if model_kwargs.get("past_key_values") is not None or config.use_cache is False:
            return super()._prepare_cache_for_generation(config, model_kwargs, *args, **kwargs)
        if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"cache_implementation = {config.cache_implementation!r}: only 'dynamic' works")
        model_kwargs["past_key_values"] = DynamicCache()
        return None

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What transformers calls for greedy decoding and for sampling."""
        thinking = Thinking.among(kwargs)
        if thinking is None:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **_others(kwargs),
            )

        drafting = thinking.drafting()
        if synced_gpus:
            raise ValueError(f"{_named(kwargs)}: ranks that share a model would take different depths")
        if drafting is not None and len(logits_processor):
            raise ValueError("draft_steps: speculative decoding goes with no penalty, minimum or other rule")
        input_ids = input_ids.to(self.device)
        real = _real(input_ids, kwargs.get("attention_mask"))

        seed, scale = kwargs.get("state_seed"), kwargs.get("init_scale")
        scale = 1.0 if scale is None else float(scale)
        if seed is None:  # zeros draw nothing, so that sampling goes on as without these arguments
            seed = int(torch.randint(2**31, (1,), device="cpu")) if scale > 0 else 0
        stepper = Stepper(
            FAMILY,
            self,
            batch=len(input_ids),
            positions=generation_config.max_length,
            depth=self._depth(kwargs.get("num_steps")),
            strategy=thinking.strategy,
            seed=int(seed),
            scale=scale,
        )

        rows = _Rows(input_ids, stopping_criteria, generation_config, streamer)
        most = generation_config.max_length - input_ids.shape[1]
        chooser, counts = _Chooser(rows, logits_processor, generation_config), (None, None)
        if drafting is None:
            policy, continuous = thinking.policy(), bool(thinking.continuous_compute)
            one_by_one(stepper, input_ids, real, rows, chooser, most, policy=policy, continuous=continuous)
        else:
            counts = speculate(stepper, input_ids, real, drafting, most, rows, None)

        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return rows.ids
        return RavenGeneration(
            sequences=rows.ids,
            scores=tuple(chooser.scores) if generation_config.output_scores else None,
            logits=tuple(chooser.logits) if generation_config.output_logits else None,
            steps=torch.stack(rows.steps, dim=1),
            exit_values=tuple(rows.values) or None,
            kv_bytes=stepper.cache.nbytes,
            drafted=counts[0],
            accepted=counts[1],
        )

    def _depth(self, num_steps: Any) -> int:
        return self.config.mean_recurrence if num_steps is None else sum(self._num_steps(num_steps))


class _Rows:
    """What has been generated, and which rows go on. See `stepper.Rows`."""

    def __init__(self, ids: torch.Tensor, stopping_criteria: Any, generation_config: Any, streamer: Any):
        self.ids = ids
        self.stopping_criteria, self.streamer = stopping_criteria, streamer
        self.pad = getattr(generation_config, "_pad_token_tensor", None)
        self.ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.steps: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def push(self, ids: list[int], steps: list[int], values: Sequence[torch.Tensor] = ()) -> list[bool]:
        if bool(self.ended.all()):
            return [False] * len(ids)
        new = torch.tensor(ids, device=self.ids.device)
        if self.pad is not None:
            new = new.where(~self.ended, self.pad.to(new.device))
        self.ids = torch.cat((self.ids, new[:, None]), dim=1)
        self.steps.append(torch.tensor(steps, device=new.device).where(~self.ended, 0))
        if len(values):
            self.values.append(torch.stack(list(values)))
        if self.streamer is not None:
            self.streamer.put(new.cpu())
        self.ended = self.ended | self.stopping_criteria(self.ids, None)
        return (~self.ended).tolist()


class _Chooser:
    """Draws tokens as transformers does, and keeps from what, if that is asked for."""

    def __init__(self, rows: _Rows, logits_processor: Any, generation_config: Any):
        self.rows = rows
        self.processor, self.config = logits_processor, generation_config
        self.logits: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        scores = self.processor(self.rows.ids, logits.float().clone())
        if self.config.output_logits:
            self.logits.append(logits)
        if self.config.output_scores:
            self.scores.append(scores)
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        return scores.argmax(-1)


def _real(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """-> (B, S) bool, False where a row is padded."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().to(ids.device)
    if real.shape != ids.shape or not bool(real[:, -1].all()) or bool((real[:, 1:] < real[:, :-1]).any()):
        raise ValueError(
            "attention_mask: prompts must be padded on the left, and be (batch, length) together"
        )
    return real


def _others(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in OWN}


def _named(arguments: Mapping[str, Any]) -> str:
    return next(name for name in OWN if arguments.get(name) is not None)


@contextmanager
def _value_errors() -> Iterator[None]:
    """A wrong argument is a ValueError here, as everywhere in transformers."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(str(error)) from None
