"""The fields of a raven's config.json, and the settings of serving, as a config of transformers.

The class that lies beside exported weights has the same fields and defaults. This one is here so that a
server runs no Python of the folder, and refuses an override that nothing would read.
"""

import math
from typing import Any

from transformers import PretrainedConfig

from torchtitan_rd_vllm.settings import MODEL_TYPE, Serving, ServingError, nearest

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


class RavenConfig(PretrainedConfig):
    """See FIELDS. Raises ServingError for a word that has no meaning here."""

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **kwargs: Any):
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        kwargs.pop("n_layers", None)  # follows from the three parts
        for name, default in FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))

        self.num_key_value_heads = self.num_key_value_heads or self.n_heads
        self.head_dim = self.head_dim or self.n_embd // self.n_heads
        parts = (self.n_layers_in_prelude, self.n_layers_in_recurrent_block, self.n_layers_in_coda)
        self.n_layers = sum(parts)
        for name, known in WORDS.items():
            if getattr(self, name) not in known:
                raise ServingError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.llama3_rope is not None and sorted(self.llama3_rope) != sorted(LLAMA3_ROPE):
            raise ServingError(
                f"llama3_rope = {self.llama3_rope!r} is not a table of {', '.join(LLAMA3_ROPE)}"
            )

        super().__init__(tie_word_embeddings=kwargs.pop("tie_embeddings", True), **kwargs)

    def update(self, config_dict: dict[str, Any]) -> None:
        """What vLLM calls with hf_overrides: a field that does not exist would have no effect.
        Raises ServingError.
        """
        known = (*FIELDS, *self.attribute_map, "tie_embeddings", "architectures")
        for name in config_dict:
            if name not in known and not hasattr(self, name):
                raise ServingError(f"hf_overrides: a raven has no field {name!r}{nearest(name, FIELDS)}")
        super().update(config_dict)
        self.serving()

    def serving(self) -> Serving:
        """Raises ServingError."""
        return Serving.of(self, self.n_layers_in_recurrent_block)

    @property
    def cached_kv_heads(self) -> int:
        """With biases, each query head has keys of its own."""
        return self.n_heads if self.qk_bias else self.num_key_value_heads

    @property
    def embedding_scale(self) -> float:
        """What looked-up embeddings are multiplied by (takase: arXiv 2312.16903)."""
        return math.sqrt(self.n_embd) if self.init_strategy == "takase" else 1.0
