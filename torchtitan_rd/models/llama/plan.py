"""Which modules of a Llama are units of FSDP, and which parts of them ranks may share, as data."""

from torchtitan_rd.model_spec import SharedModule, TensorPlan, WrapPlan
from torchtitan_rd.models.layers import tensor_counts
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


def tensor_plan(model: Llama) -> TensorPlan:
    """Attention by heads, feed-forward by hidden units; norms see each token alone."""
    shape = model.shape
    heads, kv_heads, head_dim = shape.attention_shape
    queries, keys = (heads * head_dim,), (kv_heads * head_dim,)
    shared = []
    for i in range(len(model.layers)):
        attention = {"wq": queries, "wk": keys, "wv": keys}
        hidden = {"w1": (shape.hidden_dim,), "w3": (shape.hidden_dim,)}
        shared += [
            SharedModule(name=f"layers.{i}.attention", columns=attention, rows="wo"),
            SharedModule(name=f"layers.{i}.feed_forward", columns=hidden, rows="w2"),
        ]
    return TensorPlan(
        shared=tuple(shared),
        embedding="tok_embeddings",
        head="output",
        counts=tensor_counts(shape.attention_shape, shape.hidden_dim, shape.vocab_size),
    )
