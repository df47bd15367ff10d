"""Which modules of a raven are units of FSDP, and which parts of them ranks may share, as data."""

from torchtitan_rd.model_spec import Loop, SharedModule, TensorPlan, WrapPlan
from torchtitan_rd.models.layers import tensor_counts
from torchtitan_rd.models.raven.model import Raven

_ITERATION = "transformer.recurrence.iteration"


def wrap_plan(model: Raven) -> WrapPlan:
    """Each block is compiled; prelude and coda blocks are units of their own, adapter and core one unit.

    ln_f stays in the root, as it is used twice; so do embedding and head if they are tied
    (docs/pytorch_traps.md, Tied parameters).

    All but the matrices, that is norms and qk_bias, keep full precision: one step of bfloat16 at 1.0 is
    0.8 %, so a rounded norm weight gives its feature a gain that is wrong by up to 0.4 % in every iteration.
    So does the embedding, which is e before the prelude and comes back in every iteration.
    """
    blocks = _blocks(model)
    tied = model.shape.tie_word_embeddings
    shard_only = () if tied else (("transformer.wte",), ("lm_head",))

    full_precision = tuple(name for name, parameter in model.named_parameters() if parameter.ndim != 2)
    embedding = "" if tied else "transformer.wte"  # the root has it together with the tied head
    return WrapPlan(
        blocks=blocks,
        shard_only=shard_only,
        loops=(Loop("transformer.recurrence", _ITERATION),),
        full_precision=full_precision,
        feed_forwards=tuple(f"{block}.mlp" for block in blocks),
        attentions=tuple(f"{block}.attn" for block in blocks),
        embedding="transformer.wte",
        rotary="rotary",
        float32_units=(embedding,),
    )


def tensor_plan(model: Raven) -> TensorPlan:
    """Attention by heads, feed-forward by hidden units. Norms and adapter see each token alone, so between
    the modules that are shared out the state is cut along the sequence, and so is e.
    """
    shape = model.shape
    heads, kv_heads, head_dim = shape.attention_shape
    fused = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    biases = {"qk_bias": 2} if shape.qk_bias else {}
    shared = []
    for block in _blocks(model):
        gate_and_up = {"fc": (shape.ffn_dim, shape.ffn_dim)}
        shared += [
            SharedModule(name=f"{block}.attn", columns={"Wqkv": fused}, rows="proj", by_head=biases),
            SharedModule(name=f"{block}.mlp", columns=gate_and_up, rows="proj"),
        ]
    return TensorPlan(
        shared=tuple(shared),
        embedding="transformer.wte",
        head="lm_head",
        counts=tensor_counts(shape.attention_shape, shape.ffn_dim, shape.vocab_size),
    )


def _blocks(model: Raven) -> tuple[str, ...]:
    """Their names, in the order of forward."""
    layers = model.transformer
    return (
        *(f"transformer.prelude.{i}" for i in range(len(layers.prelude))),
        *(f"{_ITERATION}.core_block.{i}" for i in range(len(layers.recurrence.iteration.core_block))),
        *(f"transformer.coda.{i}" for i in range(len(layers.coda))),
    )
