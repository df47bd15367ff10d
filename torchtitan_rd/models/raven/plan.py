"""What of a raven to wrap, as data."""

from torchtitan_rd.model_spec import Loop, WrapPlan
from torchtitan_rd.models.raven.model import Raven


def wrap_plan(model: Raven) -> WrapPlan:
    """Each block is compiled; prelude and coda blocks are units of their own, adapter and core one unit.

    ln_f stays in the root, as it is used twice; so do embedding and head if they are tied
    (docs/pytorch_traps.md, Tied parameters).

    All but the matrices, that is norms and qk_bias, keep full precision: one step of bfloat16 at 1.0 is
    0.8 %, so a rounded norm weight gives its feature a gain that is wrong by up to 0.4 % in every iteration.
    So does the embedding, which is e before the prelude and comes back in every iteration.
    """
    layers = model.transformer
    core = "transformer.recurrence.iteration"
    blocks = (
        *(f"transformer.prelude.{i}" for i in range(len(layers.prelude))),
        *(f"{core}.core_block.{i}" for i in range(len(layers.recurrence.iteration.core_block))),
        *(f"transformer.coda.{i}" for i in range(len(layers.coda))),
    )
    tied = model.shape.tie_word_embeddings
    shard_only = () if tied else (("transformer.wte",), ("lm_head",))
    full_precision = tuple(name for name, parameter in model.named_parameters() if parameter.ndim != 2)
    embedding = "" if tied else "transformer.wte"  # the root has it together with the tied head
    return WrapPlan(
        blocks=blocks,
        shard_only=shard_only,
        loops=(Loop("transformer.recurrence", core),),
        full_precision=full_precision,
        feed_forwards=tuple(f"{block}.mlp" for block in blocks),
        attentions=tuple(f"{block}.attn" for block in blocks),
        embedding="transformer.wte",
        rotary="rotary",
        float32_units=(embedding,),
    )
