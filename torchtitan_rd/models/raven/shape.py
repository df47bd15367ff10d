"""The shape of a depth-recurrent transformer, its flavors, and its cost (arXiv 2502.05171)."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import FlopCount
from torchtitan_rd.models.attention import AttentionShape
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.raven.recurrence import parse_scheme

INJECTIONS = ("linear", "add", "gate", "none")
STATE_INITS = ("like-init", "normal", "embed", "zero", "unit")
FINAL_NORMS = ("twice", "once")
ADAPTER_STARTS = ("random", "identity")
BlockName: TypeAlias = Literal["sandwich", "post", "pre"]
ARITHMETIC = (
    *("norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("block", "final_norm", "injection", "init_strategy", "clip_qkv", "qk_norm"),
)
"""Fields that change what the same tensors compute."""


@dataclass(frozen=True, kw_only=True)
class RavenShape:
    """The shape of a raven. Raises ConfigError for values at odds with each other.

    ffn_dim: hidden width of the gated feed-forward.
    n_layers_prelude, n_layers_core, n_layers_coda: blocks before, in and after the recurrence;
        0 prelude or coda blocks are legal.
    n_kv_heads: n_heads unless given. head_dim: dim / n_heads unless given.
    block: where a block's norms stand. sandwich: before and after each branch (Huginn). post:
        after the residual sum. pre: before each branch (Llama), so that the residual stream is never
        normalised between iterations.
    final_norm: twice: ln_f is applied to the last state and again after the coda (Huginn).
        once: after the coda alone, as in a dense model (arXiv 2511.07384).
    clip_qkv: queries, keys and values are clamped to +- this, right after their projection.
    qk_bias: one bias for queries and one for keys, added before the rotary embedding. Each query head has its
        own bias on the keys too, so with fewer kv heads the keys and values are copied for each query head,
        as in Huginn's training program: the kernel then sees n_heads of them.
    qk_norm: queries and keys are divided by their root mean square over the head,
        after the rotary embedding, without a weight.
    injection: how an iteration takes in the embedded input e. linear: a learned map of [s, e]; add: s + e;
        gate: s * e; none: not at all, the state starts at e.
    adapter_start: how the map of a linear injection starts. random: as the other matrices. identity: [0 | I],
        which passes e and ignores the state, so that every depth computes what one iteration does.
    state_init: the distribution of the first state (inputs.py).
    mean_recurrence, mean_backprop_depth: means of the iterations in all and of those that are differentiated.
    sampling_scheme: how depths are drawn in training, unless [recurrence] says otherwise (recurrence.py).
    init_strategy: takase: embeddings are scaled by sqrt(dim) after the lookup;
        scaled: they are not. See init.py.
    init_orthogonal: initial matrices are orthogonal instead of truncated normals, of the same spread.
    max_seq_len: the context that an export states (`block_size`). It sizes nothing.
    """

    dim: int
    n_heads: int
    ffn_dim: int
    n_layers_prelude: int
    n_layers_core: int
    n_layers_coda: int
    mean_recurrence: int
    mean_backprop_depth: int
    vocab_size: int = 65536
    n_kv_heads: int | None = None
    head_dim: int | None = None
    block: BlockName = "sandwich"
    final_norm: str = "twice"
    clip_qkv: float | None = None
    qk_bias: bool = True
    qk_norm: bool = False
    injection: str = "linear"
    adapter_start: str = "random"
    state_init: str = "like-init"
    sampling_scheme: str = "poisson-lognormal-filling"
    init_strategy: Literal["takase", "scaled"] = "takase"
    init_orthogonal: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 50_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("n_layers_prelude", "n_layers_coda") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"{name} = {value} must be at least {least}")
            if isinstance(value, float) and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value} must be positive and finite")
        for name, known in (
            ("injection", INJECTIONS),
            ("state_init", STATE_INITS),
            ("final_norm", FINAL_NORMS),
            ("adapter_start", ADAPTER_STARTS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is unknown{nearest(getattr(self, name), known)}"
                )

        if self.adapter_start == "identity" and self.injection != "linear":
            raise ConfigError(
                f'adapter_start = "identity" needs injection = "linear": there is no adapter '
                f"with {self.injection!r}"
            )
        parse_scheme(self.sampling_scheme)

        heads, kv_heads, head_dim = self.attention_shape
        if self.head_dim is None and (self.dim % heads or head_dim % 2):
            raise ConfigError(
                f"dim = {self.dim} must be an even multiple of n_heads = {heads}: rotary turns pairs; "
                f"or give head_dim"
            )
        if head_dim % 2:
            raise ConfigError(f"head_dim = {head_dim} must be even: rotary turns pairs")
        if heads % kv_heads:
            raise ConfigError(f"n_heads = {heads} is not divisible by n_kv_heads = {kv_heads}")

    @property
    def attention_shape(self) -> AttentionShape:
        head_dim = self.head_dim or self.dim // self.n_heads
        return AttentionShape(self.n_heads, self.n_kv_heads or self.n_heads, head_dim)

    def resolved(self) -> "RavenShape":
        """The same with every size stated that follows from others."""
        sizes = self.attention_shape
        return replace(self, n_kv_heads=sizes.n_kv_heads, head_dim=sizes.head_dim)

    @property
    def effective_depth(self) -> int:
        """Blocks that a token passes at the mean recurrence."""
        return self.n_layers_prelude + self.n_layers_core * self.mean_recurrence + self.n_layers_coda

    @property
    def weight_std(self) -> float:
        """Initial spread of weights and embeddings: sqrt(2 / (5 dim)) (Nguyen and
        Salazar, arXiv 1910.05895).
        """
        return math.sqrt(2 / (5 * self.dim))

    @property
    def embedding_scale(self) -> float:
        """What looked-up embeddings are multiplied by (takase: arXiv 2312.16903)."""
        return math.sqrt(self.dim) if self.init_strategy == "takase" else 1.0


def count_flops(shape: RavenShape, seq_len: int, num_steps: tuple[float, float] | None = None) -> FlopCount:
    """FLOPs of one training step per token at a draw of (n without gradient, k with gradient)
    iterations, k >= 1.

    An iteration without gradient costs its forward alone, a third of one with gradient. The count is linear
    in n and k, so means over steps give the mean count. num_steps: by default the mean depth.
    """
    if num_steps is None:
        k = min(shape.mean_backprop_depth, shape.mean_recurrence)
        num_steps = (shape.mean_recurrence - k, k)
    heads, kv_heads, head_dim = shape.attention_shape
    block = 2 * shape.dim * (heads + kv_heads) * head_dim + 3 * shape.dim * shape.ffn_dim
    adapter = 2 * shape.dim**2 if shape.injection == "linear" else 0
    passes = num_steps[0] / 3 + num_steps[1]  # of the core, in forwards and backwards
    blocks = shape.n_layers_prelude + shape.n_layers_coda + shape.n_layers_core * passes
    weights = blocks * block + adapter * passes + shape.dim * shape.vocab_size
    per_pair = 3 * 4 * blocks * heads * head_dim  # q @ k and p @ v, 2 each, forward and twice backward
    return FlopCount(6 * weights, per_pair * seq_len, per_pair * (seq_len + 1) / 2)


Layers: TypeAlias = tuple[int, int, int]


def _huginn(
    dim: int, heads: int, ffn_dim: int, layers: Layers, mean: int, backprop: int, **fields: Any
) -> RavenShape:
    prelude, core, coda = layers
    return RavenShape(
        dim=dim,
        n_heads=heads,
        ffn_dim=ffn_dim,
        n_layers_prelude=prelude,
        n_layers_core=core,
        n_layers_coda=coda,
        mean_recurrence=mean,
        mean_backprop_depth=backprop,
        **fields,
    )


def _post_norm(
    dim: int, heads: int, ffn_dim: int, layers: Layers, mean: int, backprop: int, **fields: Any
) -> RavenShape:
    """The shapes that came before Huginn. They differ from it in more than the block: `[model.overrides]`
    replaces single fields, so Huginn's block in one of these shapes is a `_huginn` row of its own.
    """
    before = {
        "block": "post",
        "qk_bias": False,
        "injection": "add",
        "sampling_scheme": "poisson-fill",
        "init_strategy": "scaled",
        "init_orthogonal": True,
        "norm_eps": 1e-5,
    }
    return _huginn(dim, heads, ffn_dim, layers, mean, backprop, **{**before, **fields})


def _retrofitted(dim: int, heads: int, ffn_dim: int, layers: Layers, **fields: Any) -> RavenShape:
    """What conversion/retrofit.py makes of a dense Llama (arXiv 2511.07384)."""
    llama = {
        "block": "pre",
        "final_norm": "once",
        "qk_bias": False,
        "adapter_start": "identity",
        "init_strategy": "scaled",
        "norm_eps": 1e-5,
    }
    return _huginn(dim, heads, ffn_dim, layers, 32, 8, **{**llama, **fields})


_TINYLLAMA = {
    "vocab_size": 32000,
    "n_kv_heads": 4,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_seq_len": 2048,
}
_LLAMA_3_2_1B = {
    "vocab_size": 128256,
    "n_kv_heads": 8,
    "rope_theta": 500_000.0,
    "rope_scaling": RopeScaling(factor=32.0),
    "max_seq_len": 131_072,
}
_UNTIED = {
    "vocab_size": 32000,
    "n_kv_heads": 8,
    "sampling_scheme": "poisson-unbounded",
    "tie_word_embeddings": False,
}

RAVEN_FLAVORS = {  # dim, heads, ffn dim, (prelude, core, coda), mean recurrence, mean backprop depth
    "debug": _post_norm(256, 16, 256, (1, 2, 1), 2, 1, **_UNTIED, init_orthogonal=False, max_seq_len=384),
    "debug-demo": _huginn(128, 4, 448, (0, 1, 0), 8, 4, vocab_size=256, max_seq_len=128),
    "baby-recurrent-200m": _post_norm(1024, 32, 2816, (1, 4, 1), 20, 4, **_UNTIED),
    "magpie-150m": _post_norm(1024, 32, 3520, (1, 4, 1), 20, 4),
    "magpie-huginn-150m": _huginn(1024, 8, 3520, (1, 4, 1), 20, 4),
    "corax-raven-800m": _post_norm(4096, 32, 8192, (1, 2, 1), 20, 4),
    "kolk-raven-1.1b": _post_norm(4096, 64, 8192, (1, 4, 1), 24, 8),
    "tower-raven-3b": _post_norm(4096, 64, 8192, (2, 8, 2), 32, 8),
    "nebel-raven-3.5b": _huginn(5280, 55, 17920, (2, 4, 2), 32, 8),
    "corone-raven-3.5b": _huginn(5280, 55, 17920, (2, 4, 2), 32, 8, block="pre"),
    "nebel-baseline-3.5b": _huginn(5280, 55, 17920, (2, 4, 2), 1, 1, sampling_scheme="non-recurrent"),
    "deluge-raven-4b": _post_norm(7040, 64, 14080, (2, 4, 2), 32, 8),
    "retrofit-tinyllama-1.1b": _retrofitted(2048, 32, 5632, (4, 8, 4), **_TINYLLAMA),
    "retrofit-llama-3.2-1b": _retrofitted(2048, 32, 8192, (2, 4, 2), **_LLAMA_3_2_1B),
}
