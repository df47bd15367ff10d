"""The loss of a trained model on held-out data, per token, per byte of text and per time bin of spikes.

The loss itself is `validation.validate`'s, on the set that training validates on,
so figures compare with val_loss.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtitan_rd.data import (
    Batch,
    BatchDims,
    DatasetKeys,
    Tokenizer,
    dataset_vocab_size,
    get_dataset,
    load_tokenizer,
)
from torchtitan_rd.draws import Draws
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.loading import Loaded
from torchtitan_rd.inference.ranks import data_ranks
from torchtitan_rd.job import Environment, gather
from torchtitan_rd.loss import count_valid
from torchtitan_rd.model_spec import SINGLE_READ_OUT, Microbatch, ModelSpec, ReadOut, ReadOuts
from torchtitan_rd.models.attention import Requested, setup_attention
from torchtitan_rd.validation import ValidationConfig, read_held_out, validate, validation_keys


@dataclass(frozen=True)
class HeldOut:
    """keys, split: where it was read. vocab_size: ids that the data may hold. batches: this rank's share.

    tokenizer: of text, else None. separator: the id that begins a time bin of spikes, else None.
    """

    keys: DatasetKeys
    split: str
    vocab_size: int
    batches: list[Batch]
    tokenizer: Tokenizer | None
    separator: int | None


@dataclass(frozen=True)
class Units:
    """What a loss is spread over, of all ranks: labels, bytes of their text (None: no text),
    time bins (None: no spikes).
    """

    tokens: int
    bytes: int | None = None
    bins: int | None = None


def open_held_out(
    keys: DatasetKeys,
    split: str,
    environment: Environment,
    *,
    tokenizer_path: str,
    vocab_size: int | None = None,
    seed: int = 0,
    states: Iterable[Path] = (),
) -> HeldOut:
    """The first `keys.global_batch_size` sequences of a split, shared out to the ranks.

    vocab_size: None takes the data's own. states: the `state.json` of the model, which notes the commits on
    the hub that it was trained with: they are read again. Raises ConfigError, DataError.
    """
    row = get_dataset(keys, split=split)
    ranks = data_ranks(environment, states)
    tokenizer = load_tokenizer(ranks.tokenizer(tokenizer_path)) if row.needs_tokenizer else None
    vocab_size = vocab_size or dataset_vocab_size(keys, tokenizer)

    batches = read_held_out(
        keys,
        dims_of(keys, environment),
        split,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seed=seed,
        ranks=ranks,
    )
    separator = vocab_size - 1 if row.kind == "spikes" else None
    if tokenizer is not None and row.kind == "text":  # a chat template may write any special token
        vocab_size = min(vocab_size, tokenizer.needed_vocab_size)
    return HeldOut(keys, split, vocab_size, batches, tokenizer, separator)


def dims_of(keys: DatasetKeys, environment: Environment) -> BatchDims:
    """Every rank is a data rank. Raises ConfigError."""
    return BatchDims.resolve(keys, environment.rank, environment.world_size)


def open_validation(
    validation: ValidationConfig,
    config: Any,
    environment: Environment,
    *,
    source: str | None = None,
    states: Iterable[Path] = (),
) -> HeldOut:
    """What a run's [validation] names, whether or not it is enabled there.

    validation: in place of that of `config`, the run's JobConfig. source: only rows of this `source_dataset`.
    states: see `open_held_out`. Raises ConfigError, DataError.
    """
    keys = validation_keys(validation, config.training, environment.world_size)
    if source is not None:
        keys = DatasetKeys.model_validate({**keys.model_dump(), "source_dataset": source})
    return open_held_out(
        keys,
        validation.split,
        environment,
        tokenizer_path=config.model.tokenizer_path,
        vocab_size=config.model.vocab_size,
        seed=config.training.seed,
        states=states,
    )


def check_context(shape: Any, seq_len: int) -> None:
    """Raises ConfigError if the model's context is shorter."""
    if seq_len > shape.max_seq_len:
        raise ConfigError(
            f"seq_len = {seq_len} is more than the model's context of {shape.max_seq_len}: shorten it"
        )


def check_depths(spec: ModelSpec, depths: Iterable[int]) -> None:
    """Raises ConfigError for a depth below 1, and for any depth of a model without a recurrence."""
    for depth in depths:
        if spec.inputs is None:
            raise ConfigError(f"depth = {depth}: a {spec.name} has no recurrence; leave it out")
        if depth < 1:
            raise ConfigError(f"depth = {depth} must be at least 1")


def check_vocabulary(shape: Any, held_out: HeldOut) -> None:
    """Raises ConfigError if the data has ids that the model does not."""
    if held_out.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the data has ids up to {held_out.vocab_size - 1}, but the model's vocabulary is "
            f"0..{shape.vocab_size - 1}: use the data (tokenizer) that it was trained on"
        )


def read_outs_of(
    loaded: Loaded,
    held_out: HeldOut,
    depths: Sequence[int],
    environment: Environment,
    *,
    recurrence: Any,
    training: Any,
) -> ReadOuts:
    """The losses that one forward is asked for, with the first states of the run's own validation.

    depths: of a recurrent model, beside its mean. recurrence, training: the sections. Raises ConfigError.
    """
    check_depths(loaded.spec, depths)
    device = next(loaded.model.parameters()).device
    draws = Draws(
        loaded.spec,
        loaded.shape,
        recurrence,
        dims_of(held_out.keys, environment),
        seed=training.seed,
        total_steps=training.steps,
        seq_len=held_out.keys.seq_len,
        device=device,
        dtype=getattr(torch, training.mixed_precision_param),
    )
    return draws.validation(depths, held_out.batches)


def plain_read_outs(
    loaded: Loaded,
    held_out: HeldOut,
    environment: Environment,
    *,
    depth: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> ReadOuts:
    """One loss, val_loss, of a model of which no run is known. depth: None takes the model's mean.

    Raises ConfigError."""
    check_depths(loaded.spec, [] if depth is None else [depth])
    inputs = loaded.spec.inputs
    if inputs is None:
        return SINGLE_READ_OUT
    drawn = inputs(loaded.shape, None, seed=0, total_steps=1)

    def forward_inputs(number: int) -> Mapping[str, Any]:
        place = Microbatch(
            step=1,
            count=number + 1,
            rank=environment.rank,
            samples=held_out.batches[number].rows,
            seq_len=held_out.keys.seq_len,
            device=device,
            dtype=dtype,
        )
        return drawn.at_depths([drawn.mean_depth if depth is None else depth], place).kwargs

    return ReadOuts({"val_loss": 0}, forward_inputs)


def use_attention(
    loaded: Loaded, device: torch.device, dtype: torch.dtype, document_mask: bool, backend: Requested
) -> None:
    """Chooses the kernel as training does."""
    setup_attention(backend, loaded.shape.attention_shape, device, dtype, document_mask)


def count_units(held_out: HeldOut) -> Units:
    """Of all ranks; collective. The text of a window is that of its labels, without that of
    its first input.
    """
    tokens = sum(int(count_valid(batch.labels)) for batch in held_out.batches)
    text_bytes = bins = None
    if held_out.tokenizer is not None:
        text_bytes = sum(
            _bytes_of(held_out.tokenizer, first, labels)
            for batch in held_out.batches
            for first, labels in zip(batch.inputs[:, 0].tolist(), batch.labels.numpy(), strict=True)
        )
    if held_out.separator is not None:
        bins = sum(int((batch.labels == held_out.separator).sum()) for batch in held_out.batches)
    ranks = gather(Units(tokens, text_bytes, bins))
    return Units(
        sum(units.tokens for units in ranks),
        None if text_bytes is None else sum(units.bytes for units in ranks),
        None if bins is None else sum(units.bins for units in ranks),
    )


def _bytes_of(tokenizer: Tokenizer, first: int, labels: np.ndarray) -> int:
    """Decoded together with the token before, since some tokenizers drop a blank at the start."""
    ids = labels[labels >= 0].tolist()
    return len(tokenizer.decode([first, *ids]).encode()) - len(tokenizer.decode([first]).encode())


def figures(nats_per_token: float, units: Units) -> dict[str, float]:
    """A mean loss in every unit that it has. Perplexity is per token."""
    nats, result = nats_per_token * units.tokens, {}
    for name, count in (("token", units.tokens), ("byte", units.bytes), ("bin", units.bins)):
        if count:
            result[f"nats_per_{name}"] = nats / count
            result[f"bits_per_{name}"] = nats / count / math.log(2)
    result["perplexity"] = math.exp(nats_per_token) if nats_per_token < 700 else math.inf
    return result


def evaluate(
    model: nn.Module, held_out: HeldOut, device: torch.device, read_outs: ReadOuts
) -> dict[str, Any]:
    """-> what was read, and `losses`: name -> figures. The same on all ranks; collective."""
    units = count_units(held_out)
    losses = validate(model, held_out.batches, device, read_outs)
    keys = held_out.keys
    return {
        "dataset": keys.dataset,
        "dataset_path": keys.dataset_path,
        "split": held_out.split,
        "source_dataset": keys.source_dataset,
        "sequences": keys.global_batch_size,
        "seq_len": keys.seq_len,
        "tokens": units.tokens,
        **({} if units.bytes is None else {"bytes": units.bytes}),
        **({} if units.bins is None else {"bins": units.bins}),
        "losses": {name: figures(loss, units) for name, loss in losses.items()},
    }


class FromTransformers(nn.Module):
    """A causal language model of the transformers library, called as `validate` calls ours.

    forward_arguments: of its family's `HuggingFaceLayout`.
    """

    def __init__(self, model: nn.Module, forward_arguments: Callable[[Mapping[str, Any]], dict[str, Any]]):
        super().__init__()
        self.model = model
        self.forward_arguments = forward_arguments

    def forward(
        self, tokens_BS: torch.Tensor, document_ids: None, *, read_out: ReadOut, **inputs: Any
    ) -> list[torch.Tensor]:
        """-> one result, of logits (B, S, V) in float32. inputs: those of our forward, at one depth."""
        theirs = self.forward_arguments(inputs)
        return [read_out(self.model(input_ids=tokens_BS, use_cache=False, **theirs).logits.float())]
