"""[model]: which model is trained."""

from typing import Any, Literal

from pydantic import Field, field_validator

from torchtitan_rd.config_loader import MUST_MATCH, Section, UserPath


class ModelConfig(Section):
    """Family, size and tokenizer of the model."""

    name: str = Field("llama3", json_schema_extra=MUST_MATCH)
    """Model family, a row of `models.MODELS`."""

    flavor: str = Field("debug", json_schema_extra=MUST_MATCH)
    """Size of the model, a row of the family's flavors."""

    vocab_size: int | None = Field(None, ge=1, json_schema_extra=MUST_MATCH)
    """Number of token ids; by default as many as the data set (or its tokenizer) has."""

    vocab_padding_multiple: int = Field(1, ge=1)
    """Embedding and head have the next multiple of this many rows, for faster matrix products. The data may
    hold none of the padded ids; their logits count in the loss like all others, as in Huginn's training
    program (there: 4096).
    """

    tokenizer_path: UserPath = "bytes"
    """`bytes`, a folder with a tokenizer.json, a tiktoken file, or a hub name. Read by text data sets only.
    A resumed run may read it from another place; its content must be the same."""

    attention_backend: Literal["auto", "sdpa", "fa3", "fa4", "flex"] = "auto"
    """Kernel of the attention; `auto` takes the fastest that this machine has, and logs why.
    See docs/attention.md.
    """

    overrides: dict[str, Any] = Field(default_factory=dict, json_schema_extra=MUST_MATCH)
    """Fields of the flavor to replace, as `[model.overrides]`, for example `n_layers = 2`. Each
    replaces itself alone: `block = "sandwich"` in a raven from before Huginn does not bring Huginn's
    qk_bias or norm_eps along.
    """

    @field_validator("overrides")
    @classmethod
    def _one_place_for_the_vocabulary(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if "vocab_size" in overrides:
            raise ValueError("set model.vocab_size instead of an override of vocab_size")
        return overrides

    def padded(self, vocab_size: int) -> int:
        """Rows of embedding and head for a vocabulary of this size."""
        return -(-vocab_size // self.vocab_padding_multiple) * self.vocab_padding_multiple
