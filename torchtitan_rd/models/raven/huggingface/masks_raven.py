"""Which token stands where and sees what, from padding and the cache. B batch, S new tokens, K cached and new ones."""

import torch


def positions_and_mask(
    embeds: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, past: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> positions (B or 1, S); a mask (B, 1, S, K) or (S, K), True where a query may look, or None: causal.

    embeds: (B, S, E). attention_mask: (B, K), 0 at padding. past: tokens in the cache.
    """
    batch, length, _ = embeds.shape
    keys = torch.arange(past + length, device=embeds.device)
    if attention_mask is not None and attention_mask.shape != (batch, past + length):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, but must be {(batch, past + length)}")
    if position_ids is None:
        counted = keys[None] if attention_mask is None else attention_mask.long().cumsum(-1) - 1
        position_ids = counted[:, past:].clamp(min=0)
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (past == 0 or length == 1):
        return position_ids, None
    queries = keys[past:, None]
    if not padded:
        return position_ids, keys <= queries
    # Padding sees itself: a query that sees nothing would be undefined.
    return position_ids, ((keys <= queries) & attention_mask[:, None, None].bool()) | (keys == queries)
