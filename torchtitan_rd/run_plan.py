"""What will run, as a value: every decision that needs no peer, and all that is wrong, at once.

Made from the config and the number of ranks alone, so `torchtitan-rd config` shows on a laptop, and the
launch script before torchrun or Slurm, what a run would find. What is cheap to look at is looked at: whether
the path of the data exists, and the tokenizer of text, unless one is handed in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import (
    DATASETS,
    BatchDims,
    DataSet,
    Dataset,
    DatasetKeys,
    Tokenizer,
    build_encoder,
    check_file_lanes,
    check_held_out,
    dataset_vocab_size,
    get_dataset,
    is_hub_name,
    load_tokenizer,
    training_sets,
)
from torchtitan_rd.draws import Draws
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.job import Environment
from torchtitan_rd.loss import load_token_weights
from torchtitan_rd.model_spec import ModelShape, ModelSpec
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.models.attention import choose_backend
from torchtitan_rd.models.counting import count_parameters
from torchtitan_rd.parallelism import ParallelDims, ParallelismConfig, check_tensor_degree, row_orders
from torchtitan_rd.parallelism.row_order import RowOrder
from torchtitan_rd.profiling import check_profiling
from torchtitan_rd.validation import validation_keys

T = TypeVar("T")
# Where the true one is not known for a mistake elsewhere: to find those of the model too.
_SOME_VOCABULARY = 256


@dataclass(frozen=True)
class RunPlan:
    """dims: of the ranks. batch: of the rows. sets: what is trained on.

    tokenizer: None where no data set is text or chat. vocab_size: ids that the data may hold;
        the model may have more rows.
    positions: those of each row that this rank computes.
    shape: of the model, with its vocabulary and context. draws: what forward takes beside tokens.
    token_weights: of the loss, one for each logit; None: all alike.
    row_orders: of the matrices whose rows lie otherwise than in checkpoints.
    """

    dims: ParallelDims
    batch: BatchDims
    sets: list[DataSet]
    tokenizer: Tokenizer | None
    vocab_size: int
    spec: ModelSpec
    shape: ModelShape
    draws: Draws
    seq_len: int
    positions: range
    token_weights: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    row_orders: Mapping[str, RowOrder] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        """At full size of the batch."""
        return self.batch.global_batch_size * self.seq_len

    def report(self) -> list[str]:
        """The plan in lines for humans."""
        dims, batch = self.dims, self.batch
        per_rank = batch.accumulation * batch.stages
        lines = [
            f"ranks: {dims.world_size}, {dims.replicate} of the model's copies, "
            f"each sharded over {dims.shard * dims.context}",
            f"batch: {batch.global_batch_size} sequences, {self.tokens_per_step:,} tokens a step; "
            f"{per_rank} x {batch.local_batch_size} sequences of {self.seq_len} tokens on each rank",
        ]
        if dims.ranks_per_row > 1:
            lines.append(f"each row is shared by {dims.ranks_per_row} ranks: {_ways_of_sharing(dims)}")
        if names := [f"{one.name} ({one.keys.dataset})" for one in self.sets if one.name is not None]:
            lines.append(f"mixture of {', '.join(names)}")
        if batch.ramp_steps:
            lines.append(f"batch: grows in {batch.stages} stages over the first {batch.ramp_steps} steps")
        if self.shape.vocab_size > self.vocab_size:
            lines.append(f"vocabulary of {self.vocab_size} ids, padded to {self.shape.vocab_size}")
        if self.draws.family is not None:
            lines.append(self.draws.family.report())
        return lines

    def count_parameters(self) -> int:
        return count_parameters(self.spec, self.shape).total


class _Problems:
    """Gathers what is wrong, so that one mistake does not hide the next."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def found_by(self, check: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """What `check` returns, or None after noting why it refused."""
        try:
            return check(*arguments, **options)
        except (ConfigError, DataError) as error:
            if str(error) not in self.lines:
                self.lines.append(str(error))
            return None


def resolve(
    config: JobConfig,
    environment: Environment,
    *,
    device: torch.device | None = None,
    tokenizer: Tokenizer | None = None,
) -> RunPlan:
    """Decides what `config` runs on `environment.world_size` ranks.
    Raises one ConfigError with every contradiction.

    device: what each rank trains on; None where that machine is not this one,
        so that nothing is said about it.
    tokenizer: one that has been read already, so that `model.tokenizer_path` is not.
    """
    training, problems = config.training, _Problems()
    _check_schedule(config, problems)
    if device is not None:
        _check_device(config, device, problems)

    dims = problems.found_by(ParallelDims.resolve, config.parallelism, environment.world_size)
    data_degree = dims.data_degree if dims else environment.world_size
    data_rank = dims.data_rank(environment.rank) if dims else environment.rank
    batch = problems.found_by(BatchDims.resolve, training, data_rank, data_degree)

    seq_len = training.seq_len
    positions = dims.positions(environment.rank, seq_len) if dims else range(seq_len)

    sets = problems.found_by(training_sets, training, steps=training.steps)
    if sets and batch:
        problems.found_by(check_file_lanes, training, batch)
    read: list[tuple[DatasetKeys, Dataset]] = [(one.keys, one.row) for one in sets or []]
    if config.validation.enable:
        keys = problems.found_by(validation_keys, config.validation, training, data_degree)
        held_out = (
            problems.found_by(get_dataset, keys, "validation", config.validation.split) if keys else None
        )
        if keys and held_out:
            read.append((keys, held_out))
        if keys and held_out and environment.rank == 0:  # it looks at each file once more: not on all ranks
            held = DataSet(keys, held_out, section="validation")
            problems.found_by(check_held_out, sets or [], held, config.validation.split)

    if any(row.needs_tokenizer for _, row in read) and tokenizer is None:
        tokenizer = problems.found_by(load_tokenizer, config.model.tokenizer_path)
    vocab_size = _vocab_size(config, sets, tokenizer, problems)
    for keys, row in read if vocab_size else []:
        if not row.needs_tokenizer or tokenizer is not None:
            problems.found_by(build_encoder, keys, row.kind, tokenizer, vocab_size)

    spec = problems.found_by(get_spec, config.model.name)
    shape = problems.found_by(resolve_shape, config, spec, vocab_size or _SOME_VOCABULARY) if spec else None
    orders = None
    if dims and spec and shape:
        problems.found_by(dims.check, shape.attention_shape, seq_len)
        orders = problems.found_by(_share_matrices, spec, shape, dims, seq_len)
    if spec and spec.inputs is None:
        _refuse_recurrence(config, spec, problems)

    token_weights = _token_weights(config, vocab_size, shape, problems)
    draws = None
    if spec and shape:
        draws = problems.found_by(
            Draws,
            spec,
            shape,
            config.recurrence,
            batch or BatchDims(data_rank, data_degree, training.local_batch_size, accumulation=1),
            seed=training.seed,
            total_steps=training.steps,
            seq_len=seq_len,
            device=device or torch.device("cpu"),
            dtype=getattr(torch, training.mixed_precision_param),
            positions=dims.state_positions(environment.rank, seq_len) if dims else positions,
        )

    if problems.lines or not (dims and batch and sets and vocab_size and spec and shape and draws):
        raise ConfigError("\n".join(problems.lines))  # whatever is missing has said why
    data = (batch, sets, tokenizer, vocab_size)
    return RunPlan(dims, *data, spec, shape, draws, seq_len, positions, token_weights, orders or {})


def reads_hub_tokenizer(config: JobConfig) -> bool:
    """Whether a data set of the run is text or chat and its tokenizer a repository on the hub."""
    training = config.training
    names = [source.dataset for source in training.mixture] or [training.dataset]
    names += [config.validation.dataset] if config.validation.enable and config.validation.dataset else []
    tokenized = any(DATASETS[name].needs_tokenizer for name in names if name in DATASETS)
    return tokenized and is_hub_name(config.model.tokenizer_path)


def fewest_ranks(config: ParallelismConfig) -> int:
    """That these degrees allow: each -1 (what is left) as one."""
    data_degree = max(config.data_parallel_replicate_degree, 1) * max(config.data_parallel_shard_degree, 1)
    return data_degree * config.context_parallel_degree * config.tensor_parallel_degree


def _share_matrices(
    spec: ModelSpec, shape: ModelShape, dims: ParallelDims, seq_len: int
) -> dict[str, RowOrder]:
    """How rows lie under tensor parallelism. Raises ConfigError if the model cannot be shared evenly."""
    if dims.tensor == 1:
        return {}
    with torch.device("meta"):
        plan = spec.tensor_plan(spec.build(shape))
    check_tensor_degree(plan, dims.tensor, seq_len // dims.context)
    return row_orders(plan, dims.tensor)


def _ways_of_sharing(dims: ParallelDims) -> str:
    ways = {"its tokens (context)": dims.context, "the matrices (tensor)": dims.tensor}
    return ", ".join(f"{what} by {degree}" for what, degree in ways.items() if degree > 1)


def resolve_shape(config: JobConfig, spec: ModelSpec, vocab_size: int) -> Any:
    """The flavor with its overrides, for data of `vocab_size` ids.
    Raises ConfigError, also if it is to be exported and cannot be.
    """
    shape = get_flavor(spec, config.model.flavor, config.model.overrides)
    # What an export states as its context must cover what was trained.
    context = max(shape.max_seq_len, config.training.seq_len)
    shape = dataclasses.replace(shape, vocab_size=config.model.padded(vocab_size), max_seq_len=context)
    if config.checkpoint.last_save_in_hf:
        spec.hf.config_fields(shape)
    return shape


def _check_schedule(config: JobConfig, problems: _Problems) -> None:
    schedule, steps = config.lr_scheduler, config.training.steps
    if schedule.cooldown_steps and schedule.warmup_steps + schedule.cooldown_steps > steps:
        problems.lines.append(
            f"[lr_scheduler] warmup_steps ({schedule.warmup_steps}) + "
            f"cooldown_steps ({schedule.cooldown_steps}) is more than [training] steps ({steps}): "
            "shorten one or train longer"
        )
    if config.training.on_spike == "rollback" and not config.checkpoint.enable:
        problems.lines.append(
            'training.on_spike = "rollback" goes back to a checkpoint: set checkpoint.enable = true'
        )


def _check_device(config: JobConfig, device: torch.device, problems: _Problems) -> None:
    if config.training.enable_cpu_offload and device.type == "cpu":
        problems.lines.append("training.enable_cpu_offload needs a GPU to offload from; set it to false here")
    problems.found_by(check_profiling, config.profiling, device)
    dtype = getattr(torch, config.training.mixed_precision_param)
    problems.found_by(
        choose_backend, config.model.attention_backend, device, dtype, config.training.document_mask
    )


def _vocab_size(
    config: JobConfig, sets: list[DataSet] | None, tokenizer: Tokenizer | None, problems: _Problems
) -> int | None:
    """None where a mistake that is noted already hides it."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if sets is None or (tokenizer is None and any(one.row.needs_tokenizer for one in sets)):
        return None
    return problems.found_by(dataset_vocab_size, config.training, tokenizer)


def _token_weights(
    config: JobConfig, vocab_size: int | None, shape: ModelShape | None, problems: _Problems
) -> torch.Tensor | None:
    """None also where a mistake that is noted already hides how many there must be."""
    path = config.training.token_weights
    if path is None or vocab_size is None or shape is None:
        return None
    return problems.found_by(load_token_weights, path, vocab_size, shape.vocab_size)


def _refuse_recurrence(config: JobConfig, spec: ModelSpec, problems: _Problems) -> None:
    if config.recurrence != type(config.recurrence)():
        problems.lines.append(
            f"[recurrence] is for recurrent models, not for {spec.name}: leave its keys unset"
        )
    if config.training.throttle:
        problems.lines.append(
            f"training.throttle is for recurrent models, not for {spec.name}: leave it unset"
        )
