"""What Huginn's configurations call the fields of a raven's shape: the one table for its released class
(config.json), which our exports follow, and for its training program (model_config).
"""

from typing import Any, NamedTuple

from torchtitan_rd.models.raven.shape import (
    ADAPTER_STARTS,
    FINAL_NORMS,
    INJECTIONS,
    STATE_INITS,
    BlockName,
)

REQUIRED = object()

BLOCKS: dict[BlockName, str] = {
    "sandwich": "SandwichBlock",
    "post": "TransformerPostNormBlock",
    "pre": "TransformerPreNormBlock",
}
BLOCK_OF: dict[str, BlockName] = {theirs: ours for ours, theirs in BLOCKS.items()}

SIZES = {  # ours -> theirs; whole numbers that both always state
    "dim": "n_embd",
    "ffn_dim": "intermediate_size",
    "n_layers_prelude": "n_layers_in_prelude",
    "n_layers_core": "n_layers_in_recurrent_block",
    "n_layers_coda": "n_layers_in_coda",
    "mean_recurrence": "mean_recurrence",
    "mean_backprop_depth": "mean_backprop_depth",
}


class Option(NamedTuple):
    """name: theirs. released: what the released class takes where it is left out; its type is the field's.
    trained: the same of the training program, or REQUIRED.
    """

    name: str
    released: Any
    trained: Any


OPTIONS = {  # ours -> theirs
    "injection": Option("injection_type", "linear", REQUIRED),
    "state_init": Option("state_init", "like-init", "like-init"),
    "sampling_scheme": Option("sampling_scheme", "poisson-lognormal-filling", REQUIRED),
    "init_strategy": Option("init_strategy", "takase", REQUIRED),
    "init_orthogonal": Option("init_orthogonal", False, False),
    "clip_qkv": Option("clip_qkv", None, None),
    "qk_bias": Option("qk_bias", True, False),
    "qk_norm": Option("qk_norm", False, False),
    "norm_eps": Option("norm_eps", 1e-6, REQUIRED),
    "rope_theta": Option("rope_base", 50_000.0, 50_000.0),
    "tie_word_embeddings": Option("tie_embeddings", True, False),
    "max_seq_len": Option("block_size", 4096, REQUIRED),
}

ADDED: dict[str, tuple[Any, ...]] = {
    "final_norm": FINAL_NORMS,
    "adapter_start": ADAPTER_STARTS,
}
"""Fields of the shape that Huginn's lacks, by our names -> what they may be, the default first. A config.json
states them where they are not the default, and so `head_dim` and, for `rope_scaling`, `llama3_rope`: a name
that no version of the transformers library reads, or rewrites, by itself."""

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "nonlin_name": ("SiLU",),
    "mlp_class_name": ("GatedMLP",),
    "bias": (False,),
    "lm_head_bias": (False,),
    "center_attention": (False,),
    "debias_attention": (False,),
    "use_abacus": (False,),
    "randomize_positions_from": (None,),
    "mup_model_scaling_factor": (1,),
    "embed_step": (False,),
    "normalize_rec": ("",),
    "intermediate_noise_injection": (0,),
    "test_time_noise": (0,),
}
"""Fields that our shape lacks: the values that mean what this model computes anyway, the default first."""

COMPUTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("huginn_raven",),
    "architecture_class_name": ("RecurrentGPT",),
    "block_class_name": tuple(BLOCKS.values()),
    "norm_class_name": ("RMSNorm_llama", "RMSNorm"),
    "injection_type": INJECTIONS,
    "state_init": STATE_INITS,
    "init_strategy": ("takase", "scaled"),
    "qk_norm": (False, True),
    **NOT_BUILT,
}
"""What our model computes of what the released family has, the default first."""

ROTARY: dict[str, tuple[Any, ...]] = {"use_rope": (True,), "rope_condense_ratio": (1,)}
"""The same of the nested table `rope_settings`."""

FOREIGN = {
    **{
        name: f"what {name} = {known[0]!r} means in Huginn's configurations is the only thing built: "
        "leave it out"
        for name, known in {**NOT_BUILT, "norm_class_name": COMPUTED["norm_class_name"]}.items()
    },
    **{theirs: f"{ours} is its name here" for ours, theirs in SIZES.items() if ours != theirs},
    **{option.name: f"{ours} is its name here" for ours, option in OPTIONS.items() if ours != option.name},
    "block_class_name": "block is its name here",
    "num_attention_heads": "n_heads is its name here",
    "num_key_value_heads": "n_kv_heads is its name here",
    "padding_multiple": "set model.vocab_padding_multiple",
}
"""Names that `[model.overrides]` does not take -> what to do instead."""
