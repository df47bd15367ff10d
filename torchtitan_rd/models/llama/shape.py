"""The shape of a Llama, its flavors, and its cost."""

import math
from dataclasses import dataclass, replace
from typing import Any

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import FlopCount
from torchtitan_rd.models.attention import AttentionShape
from torchtitan_rd.models.layers import NormType, RopeScaling

# Fields that change what the same tensors compute.
ARITHMETIC = ("norm_type", "norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The shape of a Llama. Raises ConfigError for values at odds with each other.

    head_dim: dim / n_heads unless given.
    ffn_dim: hidden width of the feed-forward; unless given, 8/3 dim * ffn_dim_multiplier,
        rounded up to a multiple of multiple_of.
    tie_word_embeddings: the head's weight is the embedding's.
    depth_init: the initial std of wo, w2 and w3 shrinks with the layer's own depth, else with the model's.
    max_seq_len: the context that an export states (`max_position_embeddings`). It sizes nothing.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int = 256
    head_dim: int | None = None
    ffn_dim: int | None = None
    ffn_dim_multiplier: float = 1.3
    multiple_of: int = 1024
    norm_type: NormType = "rmsnorm"
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    init_std: float = 0.02
    depth_init: bool = True
    max_seq_len: int = 8192

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value} must be positive and finite")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ConfigError(f"dim = {self.dim} is not divisible by n_heads = {self.n_heads}; give head_dim")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads = {self.n_heads} is not divisible by n_kv_heads = {self.n_kv_heads}")
        if self.attention_shape.head_dim % 2:
            raise ConfigError(
                f"head_dim = {self.attention_shape.head_dim} must be even: rotary embedding turns pairs"
            )

    @property
    def attention_shape(self) -> AttentionShape:
        return AttentionShape(self.n_heads, self.n_kv_heads, self.head_dim or self.dim // self.n_heads)

    def resolved(self) -> "LlamaShape":
        """The same with every size stated that follows from others."""
        head_dim = self.attention_shape.head_dim
        return replace(
            self, head_dim=head_dim, ffn_dim=self.hidden_dim, ffn_dim_multiplier=1.0, multiple_of=1
        )

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward."""
        if self.ffn_dim:
            return self.ffn_dim
        wanted = int(self.ffn_dim_multiplier * (8 * self.dim // 3))
        return -(-wanted // self.multiple_of) * self.multiple_of


def count_flops(shape: LlamaShape, seq_len: int, num_steps: tuple[float, float] | None = None) -> FlopCount:
    """FLOPs of one training step per token: backward costs twice the forward, an embedding lookup nothing.

    num_steps: means nothing here, where no depth is drawn.
    """
    heads, kv_heads, head_dim = shape.attention_shape
    layer = shape.dim * head_dim * 2 * (heads + kv_heads) + 3 * shape.dim * shape.hidden_dim
    weights = shape.n_layers * layer + shape.dim * shape.vocab_size
    # q @ k and p @ v, 2 each, forward and twice backward.
    per_pair = 3 * 4 * shape.n_layers * heads * head_dim
    return FlopCount(6 * weights, per_pair * seq_len, per_pair * (seq_len + 1) / 2)


def _neural(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, theta: float, **fields: Any
) -> LlamaShape:
    return LlamaShape(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, rope_theta=theta, **fields
    )


def _clm(dim: int, n_layers: int, n_heads: int, n_kv_heads: int) -> LlamaShape:
    return _neural(
        dim, n_layers, n_heads, n_kv_heads, 10_000.0, vocab_size=49152, multiple_of=128, max_seq_len=2048
    )


LLAMA3_FLAVORS = {  # dim, layers, heads, kv heads, rope theta
    "debug": _neural(128, 4, 4, 2, 10_000.0, multiple_of=64),
    "250M": _neural(1024, 16, 16, 8, 100_000.0),
    "870M": _neural(2048, 16, 32, 8, 100_000.0),
    "1B": _neural(2048, 16, 32, 8, 500_000.0),
    "2B": _neural(3072, 16, 32, 8, 100_000.0),
    "7B": _neural(4096, 32, 32, 8, 100_000.0),
    "8B": _neural(4096, 32, 32, 8, 500_000.0),
    "8B_131k": _neural(4096, 32, 32, 8, 500_000.0, max_seq_len=131_072),
}

AIXSIM_FLAVORS = {  # dim, layers, heads, kv heads
    "debug": _clm(128, 2, 4, 2),
    "60M": _clm(384, 22, 6, 2),
    "200M": _clm(768, 24, 12, 4),
    "400M": _clm(960, 30, 15, 5),
    "600M": _clm(1152, 32, 18, 6),
    "1.1B": _clm(1536, 32, 24, 8),
}
