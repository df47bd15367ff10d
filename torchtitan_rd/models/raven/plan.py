"""What of a raven to wrap, as data."""

from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.spec import Loop, WrapPlan


def wrap_plan(model: Raven) -> WrapPlan:
    """Each block is compiled; prelude and coda blocks are units of their own, adapter and core one unit.

    ln_f stays in the root, as it is used twice; so do embedding and head if they are tied (T7).
    """
    layers = model.transformer
    core = "transformer.recurrence.iteration"
    blocks = (
        *(f"transformer.prelude.{i}" for i in range(len(layers.prelude))),
        *(f"{core}.core_block.{i}" for i in range(len(layers.recurrence.iteration.core_block))),
        *(f"transformer.coda.{i}" for i in range(len(layers.coda))),
    )
    tied = model.config.tie_word_embeddings
    shard_only = () if tied else (("transformer.wte",), ("lm_head",))
    return WrapPlan(blocks, shard_only, (Loop("transformer.recurrence", core),))
