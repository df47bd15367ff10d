"""The declared rule by which a run becomes small: one row a key, with what becomes of it and why.

What decides whether a run works stays as it is: the family and its settings, the vocabulary and the
tokenizer, the kind of data, the optimizer, precision, activation checkpointing, the ratio of the heads to
each other and of the feed-forward to the width. What decides how much it computes shrinks.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchtitan_rd.config import JobConfig
from torchtitan_rd.config_loader import section_type
from torchtitan_rd.model_spec import ModelShape
from torchtitan_rd.run_plan import RunPlan

SEQ_LEN = 128
CHAT_SEQ_LEN = 512
"""Of conversations: in a shorter window the answer, which alone is learned, may be cut off."""

MOST_HEADS, MOST_HEAD_DIM, MOST_WIDTH, MOST_LAYERS = 8, 32, 64, 2
MEAN_DEPTH, BACKPROP_DEPTH, EVALUATED_DEPTH = 4, 2, 8
STEPS, INTERVAL = 4, 2
MOST_RANKS = 4


class Change(NamedTuple):
    """A key that is not what the file says. before, after: plain values, as a config is written."""

    key: str
    before: Any
    after: Any
    why: str


@dataclass(frozen=True)
class Ranks:
    """The ranks of a rehearsal. degrees: key of [parallelism] -> what it is when the run is trained.

    total: their product. resumed: degrees on the other number of ranks, `resumed_total`.
    data: ranks that read different rows, the more of the two.
    """

    degrees: Mapping[str, int]
    total: int
    resumed: Mapping[str, int]
    resumed_total: int
    data: int


REPLICATE, SHARD = "data_parallel_replicate_degree", "data_parallel_shard_degree"


def small_ranks(plan: RunPlan, parallelism: Mapping[str, Any]) -> Ranks:
    """Each degree over 1 becomes 2, so that the ranks are 2 where the run has one of them, 4 where it has
    two, 8 where sequences and matrices are shared beside shards. Copies become 1 where 4 ranks are taken.

    The run resumes on other ranks: on 4 in place of 2, on 2 in place of 4, or, where sequences and matrices
    are shared, on 4 in place of 8 and on 8 in place of 4.
    """
    others = {
        key: min(value, 2)
        for key, value in parallelism.items()
        if key.endswith("_degree") and key not in (REPLICATE, SHARD)
    }
    other = math.prod(max(degree, 1) for degree in others.values())

    is_sharded = plan.dims.shard > 1 or plan.dims.replicate == other == 1
    shard = 2 if is_sharded else 1
    replicate = 2 if plan.dims.replicate > 1 and 2 * shard * other <= MOST_RANKS else 1
    own, total = replicate * shard, replicate * shard * other
    data = max((2 if total == MOST_RANKS else MOST_RANKS) // other, 1)
    if data == own:  # the ranks that share rows are four already, and there must be more or fewer of the rest
        data = 2
    return Ranks(
        degrees={REPLICATE: replicate, SHARD: shard, **others},
        total=total,
        resumed={REPLICATE: 1, SHARD: data} if is_sharded else {REPLICATE: data, SHARD: 1},
        resumed_total=data * other,
        data=max(own, data),
    )


@dataclass(frozen=True)
class Small:
    """What the rules know. asked: as the file and the command line say; config: the same, complete; plan: of
    it. folder: of the rehearsal.
    paths: name of a data set (`training`, `validation`, or that of a source) -> where its rows lie here.
    """

    asked: JobConfig
    config: JobConfig
    plan: RunPlan
    ranks: Ranks
    folder: Path
    paths: Mapping[str, Path]

    @property
    def seq_len(self) -> int:
        kinds = {one.row.kind for one in self.plan.sets}
        return min(self.config.training.seq_len, CHAT_SEQ_LEN if "chat" in kinds else SEQ_LEN)

    @property
    def batch(self) -> int:
        """Sequences of a step: one a rank and microbatch, two microbatches where the run has several."""
        stages = 2 if self.plan.batch.stages > 1 else 1
        return self.ranks.data * stages * (2 if self.plan.batch.accumulation > 1 else 1)


LEFT_OPEN = ("training.lane_per_file", "model.tokenizer_path")

Becomes = Callable[[Any, Small], Any]


class Rule(NamedTuple):
    key: str
    becomes: Becomes
    why: str


def rehearsed(small: Small) -> tuple[JobConfig, list[Change]]:
    """The config that is rehearsed, and all in which it is not the run's."""
    before = small.config.model_dump(mode="json")
    after = {name: dict(keys) for name, keys in before.items()}
    reasons = dict.fromkeys(LEFT_OPEN, "made up: the file leaves it to the command line")
    for key, becomes, why in (*RULES, *_degree_rules(small.ranks)):
        section, name = key.split(".")
        after[section][name] = becomes(after[section][name], small)
        reasons[key] = why

    fields = JobConfig.model_fields
    sections: dict[str, Any] = {
        name: section_type(fields[name]).model_validate(keys) for name, keys in after.items()
    }
    config = JobConfig(**sections)
    changes = changes_between(small.asked, config, reasons)
    return config, [_with_the_flavor_s(change, small.plan.shape) for change in changes]


def _with_the_flavor_s(change: Change, shape: ModelShape) -> Change:
    """A field of the shape that the file leaves to the flavor has a value nevertheless."""
    prefix, _, name = change.key.rpartition(".")
    if prefix == "model.overrides" and change.before is None:
        return change._replace(before=getattr(shape.resolved(), name))
    return change


def changes_between(before: JobConfig, after: JobConfig, reasons: Mapping[str, str]) -> list[Change]:
    """Every key in which the two differ; of `[model.overrides]` every field."""
    found = []
    old, new = before.as_dict(), after.as_dict()
    for section, keys in new.items():
        for name, value in keys.items():
            key, was = f"{section}.{name}", old[section][name]
            if value == was:
                continue
            if isinstance(value, dict):
                found += [
                    Change(f"{key}.{field}", was.get(field), entry, reasons[key])
                    for field, entry in value.items()
                    if was.get(field) != entry
                ]
            else:
                found.append(Change(key, was, value, reasons[key]))
    return found


def small_shape(shape: ModelShape) -> dict[str, Any]:
    """Fields of a shape -> small values, for `[model.overrides]`. No value grows.

    Query heads for each key head stay as many, unless that makes more than MOST_HEADS of them; the width
    stays the heads' if it is, and the feed-forward keeps its share of the width, in multiples of 8.
    """
    full: Any = shape.resolved()
    heads, kv_heads, head_dim = full.attention_shape
    small_kv = 2 if kv_heads > 1 and 2 * heads // kv_heads <= MOST_HEADS else 1
    small_heads = small_kv * (heads // kv_heads)
    small_head_dim = min(head_dim, MOST_HEAD_DIM, max(MOST_WIDTH // small_heads // 2 * 2, 4))
    width = full.dim * small_heads * small_head_dim // (heads * head_dim)
    found: dict[str, Any] = {"n_heads": small_heads, "n_kv_heads": small_kv, "dim": max(width // 2 * 2, 8)}

    given = {field.name for field in dataclasses.fields(full)}
    if getattr(shape, "head_dim", None) is not None:
        found["head_dim"] = small_head_dim
    if "ffn_dim" in given:
        found["ffn_dim"] = min(full.ffn_dim, -(-full.ffn_dim * found["dim"] // full.dim // 8) * 8)
    for name in sorted(given):
        if name.startswith("n_layers"):
            found[name] = min(getattr(full, name), MOST_LAYERS)
    for name, most in (("mean_recurrence", MEAN_DEPTH), ("mean_backprop_depth", BACKPROP_DEPTH)):
        if name in given:
            found[name] = min(getattr(full, name), most)
    return {name: value for name, value in found.items() if value != getattr(shape, name)}


def _most(limit: int) -> Becomes:
    return lambda value, small: None if value is None else min(value, limit)


def _always(new: Any) -> Becomes:
    return lambda value, small: new


def _path_of(name: str) -> Becomes:
    return lambda value, small: str(small.paths[name]) if name in small.paths else value


def _held_out(value: str | None, small: Small) -> str | None:
    """Without [validation] the held-out rows are some of training's."""
    return _path_of("validation")(value, small) if small.config.validation.enable else None


def _sources(value: list[dict[str, Any]], small: Small) -> list[dict[str, Any]]:
    rows: dict[str, Any] = {"dataset_revision": None, "source_dataset": None, "skip_ranges": []}
    return [
        source
        if source["name"] not in small.paths
        else {**source, **rows, "dataset_path": str(small.paths[source["name"]])}
        for source in value
    ]


def _of_rows_here(new: Any) -> Becomes:
    """For keys that choose among the rows of the real data, which a sample has chosen already."""
    return lambda value, small: new if small.paths else value


def _stages(value: int, small: Small) -> int:
    return min(value, 2) if small.config.training.batch_ramp_steps else value


def _depths(value: list[int], small: Small) -> list[int]:
    if small.plan.spec.inputs is None:
        return value
    return sorted({min(depth, EVALUATED_DEPTH) for depth in value})


_SIZE = "the size of the model; ratios hold"
_CPU = "the ranks are CPU processes"
_SHORT = "a few steps"
_ROWS = "a few rows of the data, or made-up ones"
_OWN = "stages of their own save, resume and export"

RULES = (
    Rule("job.dump_folder", lambda value, small: str(small.folder / "run"), "nothing of the run is touched"),
    Rule("model.overrides", lambda value, small: {**value, **small_shape(small.plan.shape)}, _SIZE),
    Rule("model.attention_backend", _always("auto"), _CPU),
    Rule("recurrence.max_steps_no_grad", _most(MEAN_DEPTH), _SIZE),
    Rule("recurrence.mean_recurrence_start", _most(MEAN_DEPTH), _SIZE),
    Rule("recurrence.mean_backprop_depth_start", _most(BACKPROP_DEPTH), _SIZE),
    Rule("lr_scheduler.warmup_steps", _most(1), _SHORT),
    Rule("lr_scheduler.cooldown_steps", _most(1), _SHORT),
    Rule("training.dataset_path", _path_of("training"), _ROWS),
    Rule("training.mixture", _sources, _ROWS),
    Rule("training.dataset_revision", _of_rows_here(None), _ROWS),
    Rule("training.source_dataset", _of_rows_here(None), _ROWS),
    Rule("training.skip_ranges", _of_rows_here([]), _ROWS),
    Rule("training.cache_folder", lambda value, small: value and str(small.folder / "cache"), _ROWS),
    Rule("training.seq_len", lambda value, small: small.seq_len, "short windows"),
    Rule("training.mlp_tile_tokens", _most(SEQ_LEN // 2), "several tiles in a short window"),
    Rule("training.local_batch_size", _always(1), "few rows"),
    Rule("training.global_batch_size", lambda value, small: small.batch, "few rows, on any of its ranks"),
    Rule("training.batch_ramp_steps", _most(2), _SHORT),
    Rule("training.batch_ramp_stages", _stages, _SHORT),
    Rule("training.steps", _always(STEPS), _SHORT),
    Rule("training.num_workers", _most(1), "one reader"),
    Rule("training.enable_cpu_offload", _always(False), _CPU),
    Rule("compile.backend", lambda value, small: _eager(value, small.config), "graphs, but no kernels"),
    Rule("checkpoint.enable", _always(True), _OWN),
    Rule("checkpoint.interval", _always(INTERVAL), _SHORT),
    Rule("checkpoint.interval_type", _always("steps"), _SHORT),
    Rule("checkpoint.async_mode", lambda value, small: _unpinned(value), _CPU),
    Rule("checkpoint.load_step", _always(-1), _OWN),
    Rule("checkpoint.initial_load_path", _always(None), "weights of the run's size"),
    Rule("checkpoint.exclude_from_loading", _always([]), _OWN),
    Rule("checkpoint.last_save_model_only", _always(False), _OWN),
    Rule("checkpoint.last_save_in_hf", _always(False), _OWN),
    Rule("checkpoint.create_seed_checkpoint", _always(False), _OWN),
    Rule("validation.dataset_path", _held_out, _ROWS),
    Rule("validation.freq", _most(INTERVAL), _SHORT),
    Rule("validation.sequences", lambda value, small: small.ranks.data, "few rows"),
    Rule("validation.partial_depth_eval", _depths, _SIZE),
    Rule("metrics.log_freq", _always(1), "each step is looked at"),
    Rule("metrics.enable_wandb", _always(False), "nothing leaves this machine"),
    Rule("profiling.enable_memory_snapshot", _always(False), _CPU),
)


def _degree_rules(ranks: Ranks) -> list[Rule]:
    return [
        Rule(f"parallelism.{key}", _always(degree), f"{ranks.total} ranks here")
        for key, degree in ranks.degrees.items()
    ]


def _eager(backend: str, config: JobConfig) -> str:
    """The compiler's front end, which finds what cannot be traced, without the minutes of its back end."""
    return "eager" if config.compile.enable else backend


def _unpinned(mode: str) -> str:
    return "async" if mode == "async_with_pinned_mem" else mode
