"""Raven to and from the layout of the released Hugging Face model, one tensor at a time.

Both sides hold the same numbers under the same names, but for the two modules that hold the loop here. The
fields of config.json are those of the released RavenConfig, so that its modelling file reads an export too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.model_spec import HuggingFaceLayout
from torchtitan_rd.models.hf_fields import Fields, rope_scaling
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.released import ADDED, BLOCK_OF, BLOCKS, COMPUTED, OPTIONS, ROTARY, SIZES
from torchtitan_rd.models.raven.shape import RavenShape

# What else the released class and transformers write: it says nothing about one forward,
# or follows from the others.
_UNUSED = (
    *("auto_map", "rope_settings", "n_layers", "num_hidden_layers", "hidden_size", "max_position_embeddings"),
    *("num_attention_heads", "tie_word_embeddings", "padding_multiple", "padded_vocab_size"),
    *("activation_checkpoint_impl", "init_values", "effective_expected_depth", "test_time_noise_type"),
)
# Beyond these a number is a mistake; a model of so many blocks would first be built, and run, for ever.
_MOST = dict.fromkeys(
    ("n_layers_prelude", "n_layers_core", "n_layers_coda", "mean_recurrence", "mean_backprop_depth"), 10_000
)
# The released class reads the first of them, transformers' (and so our class) the second.
_TWO_NAMES = (
    ("n_embd", "hidden_size"),
    ("n_heads", "num_attention_heads"),
    ("block_size", "max_position_embeddings"),
    ("tie_embeddings", "tie_word_embeddings"),
)


def key_map(shape: RavenShape) -> dict[str, str]:
    """Our name -> Hugging Face's, for every tensor that a Hugging Face folder holds
    (a tied head is not stored).
    """
    with torch.device("meta"):
        model = Raven(shape)
    return {name: name.replace("recurrence.iteration.", "") for name, _ in model.named_parameters()}


def config_fields(shape: RavenShape) -> dict[str, Any]:
    """The fields of config.json."""
    fields = {
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_raven.RavenConfig",
            "AutoModelForCausalLM": "modeling_raven.RavenForCausalLM",
        },
        **{key: COMPUTED[key][0] for key in ("model_type", "architecture_class_name", "norm_class_name")},
        **{key: COMPUTED[key][0] for key in ("mlp_class_name", "nonlin_name", "bias")},
        "block_class_name": BLOCKS[shape.block],
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers_prelude + shape.n_layers_core + shape.n_layers_coda,
        "padding_multiple": 1,  # vocab_size is the number of rows
        "vocab_size": shape.vocab_size,
        **{theirs: getattr(shape, ours) for ours, theirs in SIZES.items()},
        **{option.name: getattr(shape, ours) for ours, option in OPTIONS.items()},
    }

    if shape.attention_shape.n_kv_heads != shape.n_heads:
        fields["num_key_value_heads"] = shape.n_kv_heads
    if shape.attention_shape.head_dim * shape.n_heads != shape.dim:
        fields["head_dim"] = shape.head_dim
    fields |= {
        name: getattr(shape, name) for name, known in ADDED.items() if getattr(shape, name) != known[0]
    }
    if shape.rope_scaling is not None:
        fields["llama3_rope"] = dataclasses.asdict(shape.rope_scaling)
    return fields


def shape_of(fields: Mapping[str, Any]) -> RavenShape:
    """The shape that a config.json describes: an export of ours, a released one,
    or either as transformers saves it.

    Raises ConfigError for a missing field and for what our model does not compute.
    """
    for names in _TWO_NAMES:
        Fields(fields).alike(*names)
    rotary = Fields(fields).table("rope_settings")
    read = Fields(
        {  # three that have other names in configs of the training program and of other transformers classes
            "n_heads": fields.get("num_attention_heads"),
            "rope_base": rotary.number("rope_base", None),
            "tie_embeddings": fields.get("tie_word_embeddings"),
            **{key: value for key, value in fields.items() if value is not None},
        }
    )

    for table, given in ((COMPUTED, read), (ADDED, read), (ROTARY, rotary)):
        for key, known in table.items():
            given.only(key, *known)
    for key in ("rope_scaling", "rope_parameters"):  # of other classes of transformers; ours is llama3_rope
        read.only(key, None)
    kinds = {bool: read.boolean, float: read.number, int: read.whole, str: read.text, type(None): read.number}

    heads = read.whole("n_heads")
    kv_heads = read.whole("num_key_value_heads", heads)
    head_dim, llama3_rope = read.whole("head_dim", None, most=2**16), read.table("llama3_rope")

    shape = RavenShape(
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim is None or head_dim * heads == read.whole("n_embd") else head_dim,
        rope_scaling=rope_scaling(llama3_rope) if llama3_rope.given else None,
        vocab_size=read.whole("vocab_size"),
        block=BLOCK_OF[read.text("block_class_name", "SandwichBlock")],
        **{ours: read.whole(theirs, most=_MOST.get(ours, 2**24)) for ours, theirs in SIZES.items()},
        **{ours: kinds[type(one.released)](one.name, one.released) for ours, one in OPTIONS.items()},
        **{name: read.text(name, known[0]) for name, known in ADDED.items()},
    )

    read.refuse_what_changes_the_computation(*COMPUTED, *_UNUSED, "clip_qkv")
    return shape


def buffers(shape: RavenShape) -> dict[str, torch.Tensor]:
    """freqs_cis: (1, block_size, 1, D/2, 2) float32, cosines and sines:
    the released class loads it as a buffer.
    """
    head_dim = shape.attention_shape.head_dim
    frequencies = 1.0 / (shape.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if shape.rope_scaling is not None:
        frequencies = shape.rope_scaling.apply(frequencies)
    angles = torch.outer(torch.arange(shape.max_seq_len, dtype=torch.float32), frequencies)
    return {"freqs_cis": torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]}


def _same(name: str, tensor: torch.Tensor, shape: RavenShape) -> torch.Tensor:
    return tensor


def _forward_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """num_steps there is the total, and gradient or none is not its business."""
    return {"num_steps": sum(kwargs["num_steps"]), "input_states": kwargs["initial_state"]}


_USAGE = (
    "`num_steps` is the number of iterations of the recurrent part.\n\n"
    "`generate` takes further arguments. `criterion` (with `exit_threshold`, `min_steps`, "
    "`check_criterion_every_n_steps`, `do_not_exit_in_prefill`) lets each sequence leave the recurrence "
    "when it has thought enough about a token: `entropy-diff`, `kl`, `minp-kl`, `argmax-stability`, "
    "`latent-diff`, `cosine`. `cache_lookup_strategy` (`full`, `latest-m4`, `compress-s16`, ...) says what "
    "such tokens show to later ones, and how much memory they take. `draft_steps` (with "
    "`lookahead_for_draft`, `verification_threshold`) drafts tokens with fewer iterations and verifies them "
    "with all. `continuous_compute=True` starts each token from the last state of the one before. "
    "With `return_dict_in_generate=True` it tells `steps` and `exit_values` of each token, and `kv_bytes`. "
    "The docstring of `Thinking` in `generation_raven.py` describes them.\n\n"
    "To finetune: `labels` are the input ids themselves and are shifted inside, "
    "as in every class of transformers. The class released with huginn-0125 takes them shifted; "
    "labels made for it are to be given as `shift_labels`."
)
_CODE = Path(__file__).parent / "huggingface"
_PACKAGE = Path(__file__).parents[2]

HF = HuggingFaceLayout(
    model_type="huginn_raven",
    key_map=key_map,
    to_hf=_same,
    from_hf=_same,
    config_fields=config_fields,
    shape_of=shape_of,
    buffers=buffers,
    derived="freqs_cis",
    code=(
        *sorted(_CODE.glob("*_raven.py")),
        # Generation is the package's own: these import nothing but each other and torch.
        *(_PACKAGE / f"{name}.py" for name in ("errors", "model_steps")),
        *(
            _PACKAGE / "inference" / f"{name}.py"
            for name in ("cache", "exits", "sharing", "speculative", "stepper")
        ),
    ),
    forward_arguments=_forward_arguments,
    example_arguments=lambda shape: {"num_steps": shape.mean_recurrence},
    example_generation={"criterion": "kl", "cache_lookup_strategy": "latest-m4"},
    usage=_USAGE,
)
