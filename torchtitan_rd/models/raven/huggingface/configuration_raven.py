"""The shape of a depth-recurrent transformer (Huginn, arXiv 2502.05171) as a Hugging Face config."""

import math
from typing import Any

from transformers import PretrainedConfig

BLOCKS = ("SandwichBlock", "TransformerPostNormBlock", "TransformerPreNormBlock")
INJECTIONS = ("linear", "add", "gate", "none")
STATE_INITS = ("like-init", "normal", "embed", "zero", "unit")
FINAL_NORMS = ("twice", "once")
ADAPTER_STARTS = ("random", "identity")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RavenConfig(PretrainedConfig):
    """The fields of the released `huginn_raven` config, and final_norm, adapter_start, head_dim, llama3_rope.
    Raises ValueError for what has no meaning here.

    n_embd, n_heads, num_key_value_heads (n_heads unless given), head_dim (n_embd / n_heads unless given),
        intermediate_size, vocab_size: sizes.
    n_layers_in_prelude, n_layers_in_recurrent_block, n_layers_in_coda: blocks before, in and after the
        recurrence.
    mean_recurrence: iterations in evaluation, and their mean in training. mean_backprop_depth: the mean of
        those that are differentiated. sampling_scheme: how depths are drawn in training.
    block_class_name: SandwichBlock has norms before and after each branch,
        TransformerPostNormBlock after the sums, TransformerPreNormBlock before each branch.
    final_norm: twice: ln_f is applied to the last state and again after the coda; once: after the coda alone.
    llama3_rope: Llama 3.1's stretching of the slow rotary frequencies: a table of LLAMA3_ROPE; None: none.
    clip_qkv: bound of queries, keys and values, right after their projection; None: none.
    qk_norm: queries and keys are divided by their root mean square, after the rotary embedding.
    injection_type: how an iteration takes in the embedded input e. linear: a learned map of [s, e];
        add: s + e; gate: s * e; none: not at all, the state starts at e.
    adapter_start: what a new adapter of a linear injection is: random, or the identity of e.
    state_init: the distribution of the first state. init_strategy: takase scales embeddings by sqrt(n_embd).
    block_size: the context of training; it sizes nothing.
    """

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ["past_key_values", "latent_states"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        n_embd: int = 5280,
        n_heads: int = 55,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 17920,
        vocab_size: int = 65536,
        n_layers_in_prelude: int = 2,
        n_layers_in_recurrent_block: int = 4,
        n_layers_in_coda: int = 2,
        mean_recurrence: int = 32,
        mean_backprop_depth: int = 8,
        sampling_scheme: str = "poisson-lognormal-filling",
        block_class_name: str = "SandwichBlock",
        final_norm: str = "twice",
        injection_type: str = "linear",
        adapter_start: str = "random",
        state_init: str = "like-init",
        init_strategy: str = "takase",
        init_orthogonal: bool = False,
        clip_qkv: float | None = None,
        qk_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rope_base: float = 50_000.0,
        llama3_rope: dict[str, Any] | None = None,
        tie_embeddings: bool = True,
        block_size: int = 4096,
        **kwargs: Any,
    ):
        for name, value, known in (
            ("block_class_name", block_class_name, BLOCKS),
            ("injection_type", injection_type, INJECTIONS),
            ("state_init", state_init, STATE_INITS),
            ("final_norm", final_norm, FINAL_NORMS),
            ("adapter_start", adapter_start, ADAPTER_STARTS),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r} is not one of {', '.join(known)}")
        if llama3_rope is not None and sorted(llama3_rope) != sorted(LLAMA3_ROPE):
            raise ValueError(f"llama3_rope = {llama3_rope!r} is not a table of {', '.join(LLAMA3_ROPE)}")
        for name in ("n_layers", "num_hidden_layers"):  # follows from the three parts
            kwargs.pop(name, None)

        self.n_embd = n_embd
        self.n_heads = kwargs.pop("num_attention_heads", n_heads)
        self.num_key_value_heads = num_key_value_heads or self.n_heads
        self.head_dim = head_dim or n_embd // self.n_heads
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size

        self.n_layers_in_prelude = n_layers_in_prelude
        self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
        self.n_layers_in_coda = n_layers_in_coda
        self.n_layers = n_layers_in_prelude + n_layers_in_recurrent_block + n_layers_in_coda

        self.mean_recurrence = mean_recurrence
        self.mean_backprop_depth = mean_backprop_depth
        self.sampling_scheme = sampling_scheme

        self.block_class_name = block_class_name
        self.final_norm = final_norm
        self.injection_type = injection_type
        self.adapter_start = adapter_start
        self.state_init = state_init
        self.init_strategy = init_strategy
        self.init_orthogonal = init_orthogonal

        self.clip_qkv = clip_qkv
        self.qk_bias = qk_bias
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.rope_base = rope_base
        self.llama3_rope = llama3_rope
        self.block_size = block_size

        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", tie_embeddings), **kwargs)

    # Not stored, so that they follow a mean_recurrence that is set after construction.
    @property
    def effective_depth(self) -> int:
        """Blocks that a token passes at the mean recurrence."""
        core = self.n_layers_in_recurrent_block * self.mean_recurrence
        return self.n_layers_in_prelude + core + self.n_layers_in_coda

    @property
    def weight_std(self) -> float:
        """Initial spread of weights and embeddings (arXiv 1910.05895)."""
        return math.sqrt(2 / (5 * self.n_embd))

    @property
    def embedding_scale(self) -> float:
        """What looked-up embeddings are multiplied by (takase: arXiv 2312.16903)."""
        return math.sqrt(self.n_embd) if self.init_strategy == "takase" else 1.0
