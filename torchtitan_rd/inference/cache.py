"""Keys and values of all earlier positions, in memory that is allocated once.

Shapes: B batch, S new positions, T positions in all, H heads, D head dim.

One step writes S positions of all rows and attends to the T' before them: nothing else in it grows with T'.
All rows have the same positions in the cache (prompts of different lengths are padded on the left).
"""

import math

import torch
import torch.nn.functional as F

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.model_steps import CacheLayout, KeyValues, grouped_attention


class KVCache:
    """Slots of keys and values (B, H_kv, T, D): `before`, then those of the core as `sharing` says, then
    `after`.

    start, length: first and end of the open positions. nbytes: 2 * slots * B * T * H_kv * D * bytes of a
    number.
    """

    def __init__(
        self, layout: CacheLayout, sharing: Sharing, batch: int, positions: int, device: torch.device
    ):
        self.layout, self.sharing = layout, sharing
        slots = layout.before + sharing.slots + layout.after
        shape = (slots, batch, layout.kv_heads, positions, layout.head_dim)
        try:
            self.keys = torch.zeros(shape, dtype=layout.dtype, device=device)
            self.values = torch.zeros(shape, dtype=layout.dtype, device=device)
        except RuntimeError as error:  # an OutOfMemoryError on GPUs, and nothing more exact on a CPU
            needed = 2 * math.prod(shape) * layout.dtype.itemsize / 2**30
            smaller = (
                ", a smaller depth, or a strategy with fewer slots such as compress-s4" if layout.core else ""
            )
            raise ConfigError(
                f"the cache needs {needed:.1f} GiB ({slots} slots, {batch} rows, {positions} positions), "
                f"more than {device} has: fewer prompts at once, fewer new tokens{smaller}"
            ) from error
        self.start = self.length = 0
        # Added to scores: 0 where a position may be looked at.
        # Kernels would make it of booleans in each layer.
        self._bias = torch.zeros(batch, positions, dtype=layout.dtype, device=device)
        # Of the core's slots, how many are held at each position.
        self._held = torch.full((batch, positions), sharing.slots, device=device)
        possible = range(sharing.depth + 1)
        self._written = torch.tensor([sharing.written(steps) for steps in possible], device=device)
        shown = [sharing.shown(steps) for steps in possible] if sharing.fills else []
        self._shown = torch.tensor(shown, device=device)
        self._padded = self._ragged = False
        self._mask: torch.Tensor | None = None
        self._causal = False
        self.writers: torch.Tensor | None = None
        """(B, 1, 1, 1) bool: the rows whose keys and values are kept. None: all."""
        places = [_Slot(self, slot) for slot in range(slots)]
        end = layout.before + sharing.slots
        self.before, self.after = places[: layout.before], places[end:]
        self.core = [
            [places[layout.before + sharing.slot(step, layer)] for layer in range(layout.core)]
            for step in range(sharing.depth)
        ]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def open(self, count: int, real: torch.Tensor | None = None, *, start: int | None = None) -> None:
        """Makes the next `count` positions those that are written and from which is attended.

        real: (B, count) bool, False where a prompt is padded; None: no padding. start: of positions that are
        written once more; by default what comes after the last ones.
        """
        self.start = self.length if start is None else start
        self.length = self.start + count
        self.writers = None
        if real is not None and not bool(real.all()):
            self._bias[:, self.start : self.length].masked_fill_(~real, -torch.inf)
            self._padded = True
        if self._ragged:
            self._held[:, self.start : self.length] = self.sharing.slots
        self._mask, self._causal = self._mask_of(count)

    def close(self, steps: torch.Tensor) -> None:
        """Says how many iterations the open positions were given: (B,)."""
        if self.sharing.slots == 0 or bool((steps >= self.sharing.depth).all()):
            return
        if not self.sharing.fills:
            self._held[:, self.start : self.length] = self._written[steps][:, None]
            self._ragged = True
            return
        index = self._shown[steps].T[:, :, None, None, None]  # (slots, B, 1, 1, 1)
        first, last = self.layout.before, self.layout.before + self.sharing.slots
        for kept in (self.keys, self.values):
            part = kept[first:last, :, :, self.start : self.length]
            part.copy_(part.gather(0, index.expand_as(part)))

    def rewind(self, count: int) -> None:
        """Forgets the last `count` positions."""
        self.length -= count

    def visible(self, core: int | None) -> tuple[torch.Tensor | None, bool]:
        """-> what is added to the scores (B or 1, 1, S or 1, T') of the open positions in a slot of the core
        (None: another one), -inf where a query may not look, or None; and whether it is plain causal.
        """
        if core is None or not self._ragged:
            return self._mask, self._causal
        absent = (self._held[:, : self.length] <= core)[:, None, None]
        mask = torch.zeros_like(absent, dtype=self._bias.dtype) if self._mask is None else self._mask
        return mask.masked_fill(absent, -torch.inf), False

    def _mask_of(self, count: int) -> tuple[torch.Tensor | None, bool]:
        """The same where no position was left early."""
        bias = self._bias[:, None, None, : self.length]
        if count == 1:
            return (bias if self._padded else None), False
        if self.start == 0 and not self._padded:
            return None, True
        keys = torch.arange(self.length, device=bias.device)
        queries = keys[self.start :, None]
        mask = (bias if self._padded else bias[:1]).masked_fill(keys > queries, -torch.inf)
        # Padding sees itself: what a query gives that sees nothing depends on the kernel
        # (zeros in torch's for CPUs).
        return mask.masked_fill(keys == queries, 0.0), False


class _Slot(KeyValues):
    """One slot of a cache, in the form that a block takes."""

    def __init__(self, cache: KVCache, slot: int):
        self.cache = cache
        self.keys, self.values = cache.keys[slot], cache.values[slot]
        core = slot - cache.layout.before
        self.core = core if 0 <= core < cache.sharing.slots else None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        start, end, writers = cache.start, cache.length, cache.writers
        for kept, new in ((self.keys, k), (self.values, v)):
            place = kept.narrow(2, start, end - start)
            place.copy_(new if writers is None else torch.where(writers, new, place))
        mask, causal = cache.visible(self.core)
        keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        if q.shape[1] != keys.shape[1] and q.shape[2] == 1:
            # The query heads of a group are as many queries to one head: no copies of keys for them.
            grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(q.shape)
        return grouped_attention(q, keys, values, mask, causal)
