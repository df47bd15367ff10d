"""The fields of a config.json, read with care: each mistake is one line that names the field."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger
from torchtitan_rd.models.layers import RopeScaling

_NEEDED = object()
# Fields that change what some class of the transformers library computes, or that describe another form of
# weights, with the values that change nothing. An absent field and null change nothing either.
_CHANGING: dict[str, tuple[Any, ...]] = {
    # weights
    "quantization_config": (),
    "compression_config": (),
    "pruned_heads": ({},),
    # positions
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_dim": (),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "alibi": (False,),
    # attention
    "sliding_window": (),
    "attention_chunk_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (),
    "attention_out_bias": (False,),
    "qkv_bias": (False,),
    # scales
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "final_logit_softcapping": (),
    "mup_model_scaling_factor": (1,),
    # layers
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
}
# What says nothing about the computation of one forward: names and types, training, generation.
_HARMLESS = """
    architectures model_type _name_or_path name transformers_version torch_dtype dtype use_bfloat16
    torchscript bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    tokenizer_class prefix
    initializer_range attention_dropout pretraining_tp gradient_checkpointing chunk_size_feed_forward
    use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    _attn_implementation_autoset _attn_implementation attn_implementation use_sliding_window max_window_layers
    is_decoder tie_encoder_decoder cross_attention_hidden_size id2label label2id num_labels problem_type
    finetuning_task task_specific_params tf_legacy_loss unsloth_version unsloth_fixed
    do_sample temperature top_k top_p typical_p min_length max_length early_stopping num_beams num_beam_groups
    diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""


class Fields:
    """The fields of a config.json, or of a table in it. `where` names it in messages.
    Null counts as absent.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json: "):
        self.given = {key: value for key, value in fields.items() if value is not None}
        self.where, self._read = where, {*_CHANGING, *_HARMLESS.split()}

    def whole(self, key: str, default: Any = _NEEDED, most: int = 2**24) -> Any:
        """A whole number (64, not 64.0 or "64"). most: beyond it is a mistake, found without building a
        model; by default that of a width, beyond which torch cannot count the bytes of a matrix.
        """
        found = self._of_type(key, default, "a whole number", lambda value: type(value) is int)
        if found is not default and found > most:
            raise ConfigError(f"{self.where}{key} = {found} must be at most {most}")
        return found

    def alike(self, first: str, second: str) -> None:
        """Raises ConfigError if two names of one thing say different things."""
        one, other = self.given.get(first), self.given.get(second)
        if None not in (one, other) and (type(one) is not type(other) or one != other):
            raise ConfigError(
                f"{self.where}{first} = {one!r} and {second} = {other!r} are two names of one thing, "
                f"and programs differ in which one they read: leave only the right one"
            )

    def number(self, key: str, default: Any = _NEEDED) -> Any:
        """A finite number -> float."""
        found = self._of_type(
            key,
            default,
            "a finite number",
            lambda value: type(value) in (int, float) and math.isfinite(value),
        )
        return found if found is default else float(found)

    def boolean(self, key: str, default: Any = _NEEDED) -> Any:
        return self._of_type(key, default, "true or false", lambda value: type(value) is bool)

    def text(self, key: str, default: Any = _NEEDED) -> Any:
        return self._of_type(key, default, "a text", lambda value: type(value) is str)

    def table(self, key: str) -> "Fields":
        """A table in it; an empty one if it is absent."""
        return Fields(
            self._of_type(key, {}, "a table", lambda value: isinstance(value, dict)), f"{self.where}{key}."
        )

    def listed(self, key: str) -> list[Any]:
        """A list; an empty one if it is absent."""
        return self._of_type(key, [], "a list", lambda value: isinstance(value, list))

    def only(self, key: str, *known: Any) -> Any:
        """The value, which must be one of `known`; the first of them if it is absent."""
        self._read.add(key)
        value = self.given.get(key, known[0])
        if not _is_one_of(value, known):
            listed = ", ".join(map(repr, known))
            raise ConfigError(f"{self.where}{key} = {value!r} is not supported, only {listed}")
        return value

    def refuse_what_changes_the_computation(self, *but: str) -> None:
        """Raises ConfigError for a field that would, and logs those of which it is not known;
        to be called last.

        but: fields that the caller has looked at, or that mean nothing for its family.
        """
        for key, neutral in _CHANGING.items():
            value = self.given.get(key)
            if key in but or value is None or _is_one_of(value, neutral):
                continue
            listed = "".join(f"{one!r} or " for one in neutral)
            raise ConfigError(
                f"{self.where}{key} = {value!r} is not supported, only {listed}null: "
                f"it may change what the model computes. Take it out if the model was trained without it"
            )
        if unknown := sorted(self.given.keys() - self._read - set(but)):
            logger.warning("%s%s: not known here, and ignored", self.where, ", ".join(unknown))

    def _of_type(self, key: str, default: Any, kind: str, fits: Any) -> Any:
        self._read.add(key)
        if key not in self.given:
            if default is _NEEDED:
                raise ConfigError(f"{self.where}{key} is missing")
            return default
        if not fits(self.given[key]):
            raise ConfigError(f"{self.where}{key} = {self.given[key]!r} must be {kind}")
        return self.given[key]


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """True equals 1 in Python, but not in a config."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def rope_scaling(table: Fields) -> RopeScaling:
    """Llama 3.1's, of which every field must be there."""
    return RopeScaling(
        factor=table.number("factor"),
        low_freq_factor=table.number("low_freq_factor"),
        high_freq_factor=table.number("high_freq_factor"),
        original_max_position_embeddings=table.whole("original_max_position_embeddings"),
    )
