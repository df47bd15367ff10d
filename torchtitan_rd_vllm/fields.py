"""The fields of a raven's config.json that its forward reads, and those that serving adds. Needs neither vLLM
nor torch.
"""

from collections.abc import Mapping
from typing import Any

from torchtitan_rd_vllm.settings import OWN, ServingError

# Field -> default: of the released class, with ours behind them.
FIELDS: dict[str, Any] = {
    "n_embd": 5280,
    "n_heads": 55,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 17920,
    "vocab_size": 65536,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "block_class_name": "SandwichBlock",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",
    "clip_qkv": None,
    "qk_bias": True,
    "qk_norm": False,
    "norm_eps": 1e-6,
    "rope_base": 50_000.0,
    "block_size": 4096,
    "final_norm": "twice",
    "llama3_rope": None,
    # How it is served.
    "kv_cache": "full",
    "state_seed": 0,
    "exit_criterion": "none",
    "exit_threshold": 0.03,
    "exit_min_steps": 1,
}
WORDS = {
    "block_class_name": ("SandwichBlock", "TransformerPostNormBlock", "TransformerPreNormBlock"),
    "injection_type": ("linear", "add", "gate", "none"),
    "state_init": ("like-init", "normal", "embed", "zero", "unit"),
    "final_norm": ("twice", "once"),
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_fields(fields: Mapping[str, Any]) -> None:
    """Of the shape alone. Raises ServingError for what has no meaning here."""
    for name, default in FIELDS.items():
        value = fields[name]
        least = 0 if name.startswith("n_layers") else 1
        if type(default) is int and name not in OWN and (type(value) is not int or value < least):
            raise ServingError(f"{name} = {value!r} must be a whole number of at least {least}")
    for name, known in WORDS.items():
        if fields[name] not in known:
            raise ServingError(f"{name} = {fields[name]!r} is not one of {', '.join(known)}")
    scaling = fields["llama3_rope"]
    if scaling is not None and sorted(scaling) != sorted(LLAMA3_ROPE):
        raise ServingError(f"llama3_rope = {scaling!r} is not a table of {', '.join(LLAMA3_ROPE)}")
