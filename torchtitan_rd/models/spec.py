"""What a model family must provide. The trainer, the parallelisms and the converters know models only through this."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Loop(NamedTuple):
    """A part of the model that one forward runs several times.

    unit: the submodule whose forward holds the whole loop. It is one FSDP unit, and what lies in it is none: so it is
        gathered once, and the number of collectives does not depend on the number of iterations.
    iteration: the submodule of it that one iteration calls: a region of activation checkpointing.
    """

    unit: str
    iteration: str


@dataclass(frozen=True)
class WrapPlan:
    """What to wrap, as data: names of submodules (`layers.0`) in the order in which forward reaches them.

    blocks: each is one activation-checkpointed, compiled and, outside of loops, sharded unit.
    shard_only: each tuple is one more FSDP unit (embedding; final norm with the head). The last one is needed first
        in backward, so it is not resharded after forward unless the user says `always`.
    loops: what is run several times, if anything.
    full_precision: names of small parameters that compute in float32 where the others do in a smaller type: every rank
        then holds them whole (parallelism/fsdp.py). With float32 everywhere they are sharded as the others.
    float32_units: the first name of each unit that is gathered in float32 too; "" is the root. What multiplies with a
        matrix of such a unit casts it itself.
    Parameters in none of the units stay with the root unit: tied embedding and head must both be there.
    """

    blocks: tuple[str, ...]
    shard_only: tuple[tuple[str, ...], ...] = ()
    loops: tuple[Loop, ...] = ()
    full_precision: tuple[str, ...] = ()
    float32_units: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlopCount:
    """Exact floating-point operations of one training step, per token (forward and backward, no recompute).

    matmul: weight matmuls, 6 per weight that multiplies (embedding lookups are 0).
    attention_full: attention scores and values over all S x S pairs (the Megatron convention).
    attention_causal: the same over the S (S + 1) / 2 pairs that a causal mask leaves.
    """

    matmul: float
    attention_full: float
    attention_causal: float


@dataclass(frozen=True)
class Microbatch:
    """Where a microbatch stands in the run: all that what a model draws may depend on.

    step: the optimizer update, from 1. count: microbatches of one rank since the start of the run, this one included.
    samples: the row of each of its sequences in the global batch of the step, which knows no ranks.
    rank: data rank. seq_len, device, dtype: layout of the activations.
    """

    step: int
    count: int
    rank: int
    samples: Sequence[int]
    seq_len: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class ForwardInputs:
    """kwargs: what forward takes beside tokens and document ids. num_steps: the iterations that were drawn, without
    and with gradient, for the FLOP count and the log."""

    kwargs: Mapping[str, Any]
    num_steps: tuple[int, int]


NO_INPUTS = ForwardInputs({}, (0, 0))

ReadOut = Callable[[torch.Tensor], torch.Tensor]


class ReadOuts(NamedTuple):
    """What one forward of a held-out batch is asked for.

    position: name of a loss -> which of the results that forward returns it is; several names may share one.
    inputs: number of the batch -> what forward takes beside tokens and document ids.
    """

    position: Mapping[str, int]
    inputs: Callable[[int], Mapping[str, Any]]


SINGLE_READ_OUT = ReadOuts({"val_loss": 0}, lambda number: {})


@dataclass(frozen=True)
class HuggingFaceLayout:
    """How the weights and the shape of a family stand in a Hugging Face folder.

    model_type: what its config.json says.
    key_map: config -> {our name: theirs} of every weight that such a folder holds (a tied head is not stored).
    to_hf, from_hf: (our name, whole tensor, config) -> the tensor on the other side; bitwise inverses.
    config_fields: config -> fields of config.json. Raises ConfigError for a shape that the class there does not have.
    shape: fields of config.json -> config. Raises ConfigError for what our model does not compute.
    buffers: config -> {their name: tensor} that a folder holds beside the weights.
    derived: regular expression of their names that may be in a folder and follow from its config.json (rotary tables).
    code: files to put beside the weights, for a class that the transformers library does not have.
    """

    model_type: str
    key_map: Callable[[Any], dict[str, str]]
    to_hf: Callable[[str, torch.Tensor, Any], torch.Tensor]
    from_hf: Callable[[str, torch.Tensor, Any], torch.Tensor]
    config_fields: Callable[[Any], dict[str, Any]]
    shape: Callable[[Mapping[str, Any]], Any]
    buffers: Callable[[Any], dict[str, torch.Tensor]]
    derived: str
    code: tuple[Path, ...] = ()


InitFn = Callable[[torch.Tensor, torch.Generator], None]


@dataclass(frozen=True)
class CacheLayout:
    """What a token leaves for later tokens to attend to: keys and values (H_kv, D) of type dtype, of
    each layer application.

    before, core, after: layers ahead of the recurrence, in it, and behind it. Without a recurrence all are `before`.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    before: int
    core: int = 0
    after: int = 0


class Steps(Protocol):
    """One forward in parts, for inference. `caches` are what blocks get in place of a mask (`attention.KeyValues`), one
    a layer; `rotary` is that of the positions at hand: (S, 1, D/2), or (B, S, 1, D/2).

    layout: of the cache. mean_depth: iterations unless told otherwise; None for a model without a recurrence, which has
        neither `first_state` nor `iterate`, and of which `predict` reads what `embed` gives.
    """

    layout: CacheLayout
    mean_depth: int | None

    def rotary(self, length: int) -> torch.Tensor:
        """The table of positions 0 .. length - 1: (length, 1, D/2) complex64."""

    def embed(self, tokens_BS: torch.Tensor, rotary: torch.Tensor, caches: Sequence[Any]) -> torch.Tensor:
        """-> (B, S, E): what the layers `before` make of the tokens."""

    def first_state(self, seed: int, position: int, scale: float) -> torch.Tensor | None:
        """-> (E,) float32 on the CPU, a function of its arguments alone; None where the state starts at `embed`'s."""

    def iterate(
        self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[Any]
    ) -> torch.Tensor:
        """One iteration from the state s with the embedded input e -> (B, S, E)."""

    def predict(self, s_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[Any], keep: int) -> torch.Tensor:
        """-> logits (B, keep, V) in float32 of the last `keep` positions."""


@dataclass(frozen=True)
class ModelSpec:
    """One model family.

    flavors: name -> config (a frozen dataclass whose fields `[model.overrides]` may replace).
    build: config -> module with `forward(tokens (B, S) int64, document_ids (B, S) int32 | None, **kwargs of inputs)
        -> logits (B, S, V)` in float32; called under `torch.device("meta")`; single-device maths only. Called with
        `read_out=`, a function of logits, forward returns the list of what that gives: one result, or as many as the
        inputs ask for, with one set of logits in memory at a time. The module has `init_buffers(device)` to fill its
        non-persistent buffers (rotary tables) after `to_empty`.
    inits: module -> {parameter name: fill(full tensor in place, generator)}; one entry for every unique parameter.
    wrap_plan: module -> WrapPlan.
    flops: (config, seq_len) -> FlopCount; where depths are drawn also `num_steps=(n, k)`, in which it is linear.
    inputs: None if forward needs nothing beside a batch. Else (config, [recurrence], seed=, total_steps=) ->
        Microbatch -> ForwardInputs, with `at_depths(depths, Microbatch) -> ForwardInputs` (one forward, and a
        read-out at each of the ascending depths) and `mean_depth` for validation, and `report() -> str` for the log.
        Raises ConfigError if the settings cannot go together.
    hf: how it stands in a Hugging Face folder.
    telemetry: None, or module -> a context around forward passes whose `read() -> {name: number}` describes the last.
    foreign: field that the configs of other programs have and this family's lacks -> what to tell who overrides it.
    steps: module -> its forward in parts, for inference (torchtitan_rd/inference).
    """

    name: str
    flavors: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    inits: Callable[[nn.Module], dict[str, InitFn]]
    wrap_plan: Callable[[nn.Module], WrapPlan]
    flops: Callable[..., FlopCount]
    hf: HuggingFaceLayout
    inputs: Callable[..., Callable[[Microbatch], ForwardInputs]] | None = None
    telemetry: Callable[[nn.Module], Any] | None = None
    foreign: Mapping[str, str] = field(default_factory=dict)
    steps: Callable[[Any], Steps] | None = None
