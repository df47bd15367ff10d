"""What of a Llama to wrap, as data."""

from torchtitan_rd.model_spec import WrapPlan
from torchtitan_rd.models.llama.model import Llama


def wrap_plan(model: Llama) -> WrapPlan:
    """Each layer is a unit. Embedding and head are units of their own unless tied:
    then they stay in the root.
    """
    blocks = tuple(f"layers.{i}" for i in range(len(model.layers)))
    tied = model.shape.tie_word_embeddings
    return WrapPlan(
        blocks=blocks,
        shard_only=() if tied else (("tok_embeddings",), ("norm", "output")),
        feed_forwards=tuple(f"{block}.feed_forward" for block in blocks),
        attentions=tuple(f"{block}.attention" for block in blocks),
        embedding="tok_embeddings",
        rotary="rotary",
    )
