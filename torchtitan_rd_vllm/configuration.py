"""The fields of a raven's config.json, and the settings of serving, as a config of transformers.

The class that lies beside exported weights has the same fields and defaults. This one is here so that a
server runs no Python of the folder, and refuses an override that nothing would read.
"""

import math
from typing import Any

from transformers import PretrainedConfig

from torchtitan_rd_vllm.fields import FIELDS, check_fields
from torchtitan_rd_vllm.settings import MODEL_TYPE, Serving, ServingError, nearest


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
        check_fields(vars(self))

        self.num_key_value_heads = self.num_key_value_heads or self.n_heads
        self.head_dim = self.head_dim or self.n_embd // self.n_heads
        parts = (self.n_layers_in_prelude, self.n_layers_in_recurrent_block, self.n_layers_in_coda)
        self.n_layers = sum(parts)

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
        check_fields(vars(self))
        self.serving()

    def serving(self) -> Serving:
        """Raises ServingError."""
        return Serving.of(self, self.n_layers_in_recurrent_block)

    @property
    def embedding_scale(self) -> float:
        """What looked-up embeddings are multiplied by (takase: arXiv 2312.16903)."""
        return math.sqrt(self.n_embd) if self.init_strategy == "takase" else 1.0
