"""A model's forward in parts: what inference needs of a family, as types; and the attention of grouped heads,
which training calls too. Imports torch alone: a raven's weights leave with this file too
(models/raven/huggingface).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Attention of q (B, H, S, D) to k and v (B, H_kv, T, D), each of whose heads serves H / H_kv query heads
    -> (B, H, S, D).

    mask: as `attn_mask` of torch's scaled_dot_product_attention; causal: its `is_causal`.
    """
    k, v = heads_for_kernel(q, k, v, mask)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def heads_for_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v as the kernel takes them: (B, H_kv, T, D), or copied for each query head, (B, H, T, D).

    Of a GPU's kernels those that know groups take no float32, and FlashAttention takes no mask. torch would
    fall back to plain math, which holds all B x H x S x T scores, while copies let the memory-efficient
    kernel run. The CPU's kernels know groups in every case.
    """
    if q.is_cpu or q.shape[1] == k.shape[1] or (mask is None and q.dtype != torch.float32):
        return k, v
    copies = q.shape[1] // k.shape[1]
    return k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)


class KeyValues(ABC):
    """What a block may be given in place of a mask: it keeps the keys and values of this layer application,
    and lets the new queries attend to the kept ones too (inference/cache.py).
    """

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (B, H, S, D), k and v (B, H_kv, S, D) of the new positions -> (B, H, S, D)."""


@dataclass(frozen=True)
class CacheLayout:
    """What a token leaves for later tokens to attend to: keys and values (H_kv, D) of type dtype, of
    each layer application.

    before, core, after: layers ahead of the recurrence, in it, and behind it.
    Without a recurrence all are `before`.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    before: int
    core: int = 0
    after: int = 0


class Steps(ABC):
    """One forward in parts, for inference. `caches` are what blocks get in place of a mask
    (`KeyValues`), one a layer; `rotary` is that of the positions at hand: (S, 1, D/2), or (B, S, 1,
    D/2).

    layout: of the cache. mean_depth: iterations unless told otherwise; None for a model without a recurrence,
        of which `predict` reads what `embed` gives.
    """

    layout: CacheLayout
    mean_depth: int | None = None

    @abstractmethod
    def rotary(self, length: int) -> torch.Tensor:
        """The table of positions 0 .. length - 1: (length, 1, D/2) complex64."""

    @abstractmethod
    def embed(
        self, tokens_BS: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        """-> (B, S, E): what the layers `before` make of the tokens."""

    def first_state(self, seed: int, position: int, scale: float) -> torch.Tensor | None:
        """-> (E,) float32 on the CPU, a function of its arguments alone;
        None where the state starts at `embed`'s.
        """
        return None

    def iterate(
        self, s_BSE: torch.Tensor, e_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues]
    ) -> torch.Tensor:
        """One iteration from the state s with the embedded input e -> (B, S, E).
        Without a recurrence: s itself.
        """
        return s_BSE

    @abstractmethod
    def predict(
        self, s_BSE: torch.Tensor, rotary: torch.Tensor, caches: Sequence[KeyValues], keep: int
    ) -> torch.Tensor:
        """-> logits (B, keep, V) in float32 of the last `keep` positions."""


class Steppable(Protocol):
    """A family as inference sees it (`ModelSpec` is one). steps: module -> its forward in parts; None for a
    family that has none.
    """

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> Callable[[Any], Steps] | None: ...
