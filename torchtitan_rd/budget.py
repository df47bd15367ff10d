"""How long to train a model of some size: the tokens, steps and warm-up that a config is completed with."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import build_encoder, dataset_vocab_size, get_dataset, load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.counting import ParameterCount, count_parameters
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.run_plan import fewest_ranks, reads_hub_tokenizer, resolve_shape

CLM_TOKENIZER, CLM_VOCAB_SIZE = "HuggingFaceTB/cosmo2-tokenizer", 49152
WARMUP_SHARE = 0.2

Size: TypeAlias = Literal["stored", "effective"]


@dataclass(frozen=True)
class Budget:
    """parameters: what the tokens are a multiple of. steps: that train on so many, the last one not cut.
    warmup_steps: of these.
    """

    parameters: int
    tokens: int
    steps: int
    warmup_steps: int


def chinchilla_budget(parameters: int, tokens_per_step: int, tokens_per_parameter: float = 22.0) -> Budget:
    """tokens = tokens_per_parameter * parameters, steps = ceil(tokens / tokens_per_step), and a fifth of the
    steps, rounded down, to warm up.

    parameters: without the input embedding. Source: about 20 tokens a parameter are best for a given number
    of FLOPs (Hoffmann et al., arXiv 2203.15556, table 3); 22 and the fifth are those of the CLM models
    (NewComputeBench). Raises ConfigError.
    """
    if not 0 < tokens_per_parameter < math.inf:
        raise ConfigError(f"{tokens_per_parameter} tokens a parameter: must be positive and finite")
    tokens = math.ceil(tokens_per_parameter * parameters)
    steps = math.ceil(tokens_per_parameter * parameters / tokens_per_step)
    return Budget(parameters, tokens, steps, int(WARMUP_SHARE * steps))


@dataclass(frozen=True)
class BudgetedRun:
    """config: complete. count: of its model, with the vocabulary of its data.
    budgets: by the stored parameters, and of a recurrent model by the effective ones too.
    """

    config: JobConfig
    count: ParameterCount
    vocab_size: int
    ranks: int
    budgets: dict[Size, Budget]


def budgeted_run(
    config: JobConfig,
    *,
    num_gpus: int | None = None,
    tokens_per_parameter: float = 22.0,
    size: Size = "stored",
) -> BudgetedRun:
    """Completes a config: steps and warm-up, and what they hold for only together with them, the degrees of
    [parallelism] without -1 and the global batch: one microbatch of every rank.

    num_gpus: None: as few as the degrees allow. size: of a recurrent model, the parameters that the tokens
    are counted from: stored, or effective, that is unfolded to the mean depth. Reads no data, and a tokenizer
    only where its size is not known. Raises ConfigError, DataError.
    """
    spec = get_spec(config.model.name)
    dims = _dims(config, num_gpus)
    vocab_size = _vocab_size(config)
    count = count_parameters(spec, resolve_shape(config, spec, vocab_size))

    batch = config.training.local_batch_size * dims.data_degree
    sizes: dict[Size, int] = {"stored": count.without_input_embedding}
    if count.mean_depth is not None:
        sizes["effective"] = count.effective
    if size not in sizes:
        raise ConfigError(f"--budget {size}: {spec.name} has no recurrence; leave it out")
    tokens_per_step = batch * config.training.seq_len
    budgets = {
        name: chinchilla_budget(parameters, tokens_per_step, tokens_per_parameter)
        for name, parameters in sizes.items()
    }

    complete = {
        "training": {"steps": budgets[size].steps, "global_batch_size": batch},
        "lr_scheduler": {"warmup_steps": budgets[size].warmup_steps},
        "parallelism": {
            "data_parallel_replicate_degree": dims.replicate,
            "data_parallel_shard_degree": dims.shard,
        },
    }
    sections = {name: getattr(config, name).model_copy(update=keys) for name, keys in complete.items()}
    return BudgetedRun(config.model_copy(update=sections), count, vocab_size, dims.world_size, budgets)


def _dims(config: JobConfig, num_gpus: int | None) -> ParallelDims:
    if num_gpus is None:
        return ParallelDims.resolve(config.parallelism, fewest_ranks(config.parallelism))
    if num_gpus < 1:
        raise ConfigError(f"--num_gpus {num_gpus}: must be at least 1")
    replicate, shard = (
        config.parallelism.data_parallel_replicate_degree,
        config.parallelism.data_parallel_shard_degree,
    )
    fixed = fewest_ranks(config.parallelism)
    if num_gpus % fixed or (num_gpus != fixed and -1 not in (replicate, shard)):
        raise ConfigError(
            f"--num_gpus {num_gpus} does not fit --data_parallel_replicate_degree {replicate} and "
            f"--data_parallel_shard_degree {shard}: their product must be the number of GPUs "
            "(-1: what is left)"
        )
    return ParallelDims.resolve(config.parallelism, num_gpus)


def _vocab_size(config: JobConfig) -> int:
    """Of the data, or as it is given. Raises ConfigError if it does not fit a tokenizer that lies here."""
    dataset, path, given = get_dataset(config.training), config.model.tokenizer_path, config.model.vocab_size
    if dataset.needs_tokenizer and path == CLM_TOKENIZER:
        return given or CLM_VOCAB_SIZE
    if given is not None and reads_hub_tokenizer(config):
        return given
    tokenizer = load_tokenizer(path) if dataset.needs_tokenizer else None
    vocab_size = dataset_vocab_size(config.training, tokenizer) if given is None else given
    build_encoder(config.training, dataset.kind, tokenizer, vocab_size)
    return vocab_size
