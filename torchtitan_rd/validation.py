"""[validation]: the loss on a fixed held-out set, weighted by tokens; training is left exactly as it was."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchtitan_rd.batch import Batch, at_positions
from torchtitan_rd.chunked_loss import loss_read_out
from torchtitan_rd.config_loader import OptionalUserPath, Section
from torchtitan_rd.data import (
    DATASETS,
    BatchDims,
    DataRanks,
    DatasetKeys,
    Tokenizer,
    build_dataloader,
    check_other_rows,
)
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.loss import count_valid
from torchtitan_rd.model_spec import ReadOuts
from torchtitan_rd.signals import StopRequest

# Keys of [training] that its held-out set has too, if that is of the kind.
_KEYS_OF_KIND: dict[str | None, tuple[str, ...]] = {
    "packed": ("pad_id", "eos_id"),
    "chat": ("chat_loss", "pack_samples"),
    "spikes": ("n_neurons",),
}


class ValidationConfig(Section):
    enable: bool = False
    """Measure the loss on held-out data every `freq` steps and after the last one."""
    dataset: str | None = None
    """Name of the data set; unset: that of [training], of which `split` must then be other data. What is
    trained on is refused as held-out data."""
    dataset_path: OptionalUserPath = None
    """Where to read it; unset: [training] dataset_path if the data set is the same."""
    split: str = "validation"
    """The split to read of data that has several: of a hub data set, or of files named after their split. A
    single file has none."""
    pad_id: int | None = None
    """Packed rows only: the id of padding, as [training] pad_id; unset: that one."""
    eos_id: int | None = Field(None, ge=0)
    """Packed rows only: the id that ends a document, as [training] eos_id; unset: that one."""
    freq: int = Field(500, ge=1)
    """Steps from one validation to the next."""
    sequences: int = Field(64, ge=1)
    """Size of the held-out set: so many sequences of training.seq_len, the same ones at every validation and
    on any number of ranks. A multiple of training.local_batch_size times the data ranks.
    """
    partial_depth_eval: list[int] = Field(default_factory=lambda: [1, 4, 8, 16, 32, 64])
    """Recurrent models: the depths at which the loss is measured too (val_loss_1, ...),
    beside the model's own mean (val_loss).
    """

    @field_validator("partial_depth_eval")
    @classmethod
    def _at_least_one_iteration(cls, depths: list[int]) -> list[int]:
        if any(depth < 1 for depth in depths):
            raise ValueError(f"depths must be at least 1, not {min(depths)}")
        return depths

    def is_due(self, step: int, total_steps: int) -> bool:
        """A function of the step alone, so that a resumed run validates at the same steps."""
        return self.enable and (step % self.freq == 0 or step == total_steps)


def validation_keys(config: ValidationConfig, training: DatasetKeys, data_degree: int) -> DatasetKeys:
    """The keys of the held-out set: [training]'s with another source. Raises ConfigError."""
    at_once = training.local_batch_size * data_degree
    if config.sequences % at_once:
        raise ConfigError(
            f"validation.sequences = {config.sequences} is not a multiple of training.local_batch_size = "
            f"{training.local_batch_size} times the {data_degree} data ranks = {at_once}"
        )

    if training.mixture and config.dataset is None:
        raise ConfigError("validation.dataset must be given beside [[training.mixture]], which is several")
    name = config.dataset or training.dataset
    same = name == training.dataset
    kind = DATASETS[name].kind if name in DATASETS else None
    of_its_kind = {key: getattr(training, key) for key in _KEYS_OF_KIND.get(kind, ())}
    given = {"pad_id": config.pad_id, "eos_id": config.eos_id}
    of_its_kind |= {key: value for key, value in given.items() if value is not None}

    return DatasetKeys(
        dataset=name,
        dataset_path=config.dataset_path or (training.dataset_path if same else None),
        dataset_revision=training.dataset_revision if same and config.dataset_path is None else None,
        column=training.column if same else None,
        source_dataset=training.source_dataset if same else None,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        global_batch_size=config.sequences,
        document_mask=training.document_mask,
        question_column=training.question_column if same else None,
        answer_column=training.answer_column if same else None,
        **of_its_kind,
    )


def held_out_set(
    config: ValidationConfig, training: DatasetKeys, dims: BatchDims, **reading: Any
) -> list[Batch]:
    """What `config` names, nothing if it is not enabled. dims: of training.
    reading: as for `read_held_out`, with `trained`.
    """
    if not config.enable:
        return []
    keys = validation_keys(config, training, dims.data_degree)
    trained = {one.dataset for one in training.mixture} or {training.dataset}
    is_made = DATASETS[keys.dataset].samples is not None
    if is_made and dims.data_rank == 0 and keys.dataset in trained:
        logger.warning(
            "validation: %r is made here and has no splits: its loss is that of rows that are trained on "
            "(pydoc-train and pydoc-validation are apart)",
            keys.dataset,
        )
    skips = training.skip_ranges or any(one.skip_ranges for one in training.mixture)
    if is_made or skips:  # what is skipped may be what is held out
        reading["trained"] = None
    return read_held_out(
        keys, BatchDims.resolve(keys, dims.data_rank, dims.data_degree), config.split, **reading
    )


def read_held_out(
    keys: DatasetKeys,
    dims: BatchDims,
    split: str,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seed: int,
    ranks: DataRanks | None = None,
    trained: Mapping[str, Any] | None = None,
) -> list[Batch]:
    """This rank's share of the held-out set: the first global batch of `keys`, which is kept in memory.

    trained: the fingerprint of what a run trains on, which must be other rows. Raises ConfigError, DataError.
    """
    loader = build_dataloader(
        keys,
        dims,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seed=seed,
        pin_memory=False,
        split=split,
        ranks=ranks,
    )
    try:
        if trained is not None:
            check_other_rows(trained, loader.fingerprint)

        batches = loader.next_step()
        repeats = ranks.gather(loader.repeats()) if ranks else [loader.repeats()]
        if any(repeats) and dims.data_rank == 0:
            logger.warning(
                "held-out data: %s gives fewer than %d rows of %d tokens, so parts of it count more than "
                "once; fewer sequences measure each part once",
                *(keys.dataset, dims.global_batch_size, keys.seq_len),
            )
        return batches
    finally:
        loader.close()


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    read_outs: ReadOuts,
    stop: StopRequest | None = None,
    chunk_tokens: int | None = None,
    positions: range | None = None,
) -> dict[str, float]:
    """Mean loss in nats per valid token of the held-out set, the same on all ranks,
    by the names of `read_outs`.

    Each batch is one forward, however many losses there are: logits are turned into a loss as soon
    as they are there.

    stop: asked before each batch, by all ranks together; once a rank was told to stop there are no losses.
    64 sequences of 131072 tokens would otherwise take the time that a launcher leaves for the checkpoint.
    chunk_tokens: training.loss_chunk_tokens. positions: those of each row that `model` computes on this rank.
    """
    was_training = model.training
    model.eval()
    # Of the losses, and of the valid tokens.
    sums = torch.zeros(max(read_outs.position.values()) + 2, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        # It waits for the batch before: the host would otherwise have asked for all of them
        # before a GPU has begun.
        if stop is not None and stop.agree(device):
            break
        labels = at_positions(batch.labels, positions).to(device)
        documents = None if batch.document_ids is None else batch.document_ids.to(device)
        read_out = loss_read_out(labels, chunk_tokens=chunk_tokens)
        results = model(batch.inputs.to(device), documents, read_out=read_out, **read_outs.inputs(number))
        sums += torch.stack([*(result.cross_entropy for result in results), count_valid(labels)])
    dist.all_reduce(sums)
    model.train(was_training)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the next forward must gather anew; a kept copy would be of these parameters
    if stop is not None and stop.agreed:
        logger.warning("validation cut short by a signal: no losses of it")
        return {}
    *totals, valid = sums.tolist()
    return {name: totals[at] / valid if valid else math.nan for name, at in read_outs.position.items()}
