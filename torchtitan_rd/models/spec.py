"""What a model family must provide. The trainer, the parallelisms and the converters know models only through this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class WrapPlan:
    """What to wrap, as data: names of submodules (`layers.0`) in the order in which forward reaches them.

    blocks: each is one activation-checkpointed, compiled and sharded unit.
    shard_only: each tuple is one more FSDP unit (embedding; final norm with the head). The last one is needed first
        in backward, so it is not resharded after forward unless the user says `always`.
    Parameters in neither stay with the root unit: tied embedding and head must both be there.
    """

    blocks: tuple[str, ...]
    shard_only: tuple[tuple[str, ...], ...] = ()


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


InitFn = Callable[[torch.Tensor, torch.Generator], None]


@dataclass(frozen=True)
class ModelSpec:
    """One model family.

    flavors: name -> config (a frozen dataclass whose fields `[model.overrides]` may replace).
    build: config -> module with `forward(tokens (B, S) int64, document_ids (B, S) int32 | None) -> logits (B, S, V)`
        in float32; called under `torch.device("meta")`; single-device maths only. The module has
        `init_buffers(device)` to fill its non-persistent buffers (rotary tables) after `to_empty`.
    inits: module -> {parameter name: fill(full tensor in place, generator)}; one entry for every unique parameter.
    wrap_plan: module -> WrapPlan.
    flops: (config, seq_len) -> FlopCount.
    """

    name: str
    flavors: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    inits: Callable[[nn.Module], dict[str, InitFn]]
    wrap_plan: Callable[[nn.Module], WrapPlan]
    flops: Callable[[Any, int], FlopCount]
