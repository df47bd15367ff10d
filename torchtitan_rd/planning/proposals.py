"""What smallest change makes a run fit its card: each is tried by tracing it, and ranked by what it costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan_rd.config import JobConfig
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.planning.cards import Card
from torchtitan_rd.planning.compute import executed
from torchtitan_rd.planning.memory import Need, Traced, estimate
from torchtitan_rd.run_plan import RunPlan, resolve

CHUNK_TOKENS, TILE_TOKENS = 1024, 2048
_ENOUGH = 2  # changes that fit; the rest would cost more


@dataclass(frozen=True)
class Change:
    """keys: `section.key` -> value. says: what it does. price: what it costs beside FLOPs, from 0 (nothing)
    to 3 (the optimizer in host memory).
    """

    keys: dict[str, Any]
    price: int
    says: str

    @property
    def arguments(self) -> str:
        """As on the command line."""
        return " ".join(
            f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in self.keys.items()
        )


@dataclass(frozen=True)
class Proposal:
    """A change that was tried. work: FLOPs that a step then executes, over those without the change."""

    change: Change
    need: Need
    fits: bool
    work: float


def changes(config: JobConfig, plan: RunPlan) -> list[Change]:
    """That this run could make, each alone, those that cost least first."""
    training, recompute = config.training, config.activation_checkpoint
    full: dict[str, Any] = {} if recompute.mode == "full" else {"activation_checkpoint.mode": "full"}
    found, keys = [], dict[str, Any]()
    if training.loss_chunk_tokens is None:
        found.append(
            Change({"training.loss_chunk_tokens": CHUNK_TOKENS}, 0, "head and loss some tokens at a time")
        )
    if full:
        found.append(Change(full, 1, "every block recomputed"))
    if training.mlp_tile_tokens is None:
        tiles = {"training.mlp_tile_tokens": TILE_TOKENS}
        found.append(Change(tiles, 1, "feed-forward some tokens at a time"))

    if plan.draws.family is not None and (full or recompute.recurrent_region == "iteration"):
        region = {**full, "activation_checkpoint.recurrent_region": "block"}
        found.append(Change(region, 1, "iterations recomputed block by block"))
    if training.local_batch_size % 2 == 0:
        keys = {
            "training.local_batch_size": training.local_batch_size // 2,
            "training.global_batch_size": plan.batch.global_batch_size,
        }
        found.append(Change(keys, 1, "smaller microbatches, as many tokens a step"))

    found += _other_layouts(plan)
    if not recompute.offload:
        keys = {**full, "activation_checkpoint.offload": True}
        found.append(Change(keys, 2, "inputs of recomputed blocks in host memory"))
    if not training.enable_cpu_offload:
        keys = {"training.enable_cpu_offload": True}
        found.append(Change(keys, 3, "parameters and optimizer in host memory"))
    return sorted(found, key=lambda change: change.price)


def _other_layouts(plan: RunPlan) -> Iterator[Change]:
    dims = plan.dims
    keys: dict[str, Any]
    if dims.replicate % 2 == 0:
        keys = {
            "parallelism.data_parallel_replicate_degree": dims.replicate // 2,
            "parallelism.data_parallel_shard_degree": dims.shard * 2,
        }
        yield Change(keys, 1, "each copy of the model over twice the ranks")
    if dims.shard % 2 == 0:
        keys = {
            "parallelism.context_parallel_degree": dims.context * 2,
            "parallelism.data_parallel_shard_degree": dims.shard // 2,
            "training.global_batch_size": plan.batch.global_batch_size,
        }
        yield Change(keys, 2, f"each sequence shared by {dims.context * 2} ranks, as many tokens a step")
    if dims.shard > 1:
        keys = {"parallelism.fsdp_reshard_after_forward": "always"}
        yield Change(keys, 1, "gathered units freed at once")


def apply(config: JobConfig, change: Change) -> JobConfig:
    """Raises ConfigError where keys of a section do not go together."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in change.keys.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    updated = {}
    for section, keys in sections.items():
        own = getattr(config, section)
        try:
            updated[section] = type(own).model_validate({**own.model_dump(), **keys})
        except ValueError as error:
            raise ConfigError(f"[{section}] {error}") from None
    return config.model_copy(update=updated)


@dataclass(frozen=True)
class Trials:
    """A run that is to fit a card. before: as it is, at the depth that takes most."""

    config: JobConfig
    plan: RunPlan
    environment: Environment
    before: Traced
    card: Card

    def propose(self) -> list[Proposal]:
        """Tries changes alone until a few fit; if none does, adds up those that save anything until they fit
        together. -> those that fit, cheapest first, then the others, by what they need.
        """
        tried: list[Proposal] = []
        for change in changes(self.config, self.plan):
            tried += self._try(change)
            if sum(one.fits for one in tried) == _ENOUGH:
                break
        if not any(one.fits for one in tried):
            tried += self._together(tried)
        return sorted(tried, key=_rank)

    def _try(self, change: Change) -> list[Proposal]:
        """None of it for a change that contradicts something else in the config."""
        try:
            changed = apply(self.config, change)
            plan = resolve(changed, self.environment, tokenizer=self.plan.tokenizer)
        except ConfigError:
            return []
        found = estimate(changed, plan, self.before.depth)
        seq_len = self.plan.seq_len
        before = sum(executed(self.before.flops, seq_len).values())
        work = sum(executed(found.flops, seq_len).values()) / before
        return [Proposal(change, found.need, found.need.headroom(self.card) >= 0, work)]

    def _together(self, tried: list[Proposal]) -> Iterator[Proposal]:
        useful = [one for one in tried if one.need.peak < 0.99 * self.before.need.peak]
        useful.sort(key=lambda one: (one.change.price, one.need.peak))
        both = None
        for one in useful:
            if both is None:
                both = one.change
                continue
            keys = {**both.keys, **one.change.keys}
            both = Change(keys, one.change.price, f"{both.says}; {one.change.says}")
            for found in self._try(both):
                yield found
                if found.fits:
                    return


def _rank(one: Proposal) -> tuple:
    if not one.fits:
        return (1, one.need.peak)
    return (0, one.change.price, len(one.change.keys), one.work, one.need.peak)
