"""models/__init__.py: families, flavors and overrides."""

from dataclasses import asdict

import pytest
import torch
from pydantic import ValidationError

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import Microbatch
from torchtitan_rd.models import MODELS, get_flavor, get_spec
from torchtitan_rd.models.config import ModelConfig
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.raven import RecurrenceConfig

LLAMA3, AIXSIM = MODELS["llama3"], MODELS["aixsim"]


def sizes(spec, flavor: str) -> tuple[int, int]:
    """Parameters with and without the input embedding."""
    with torch.device("meta"):
        model = spec.build(get_flavor(spec, flavor))
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - model.tok_embeddings.weight.numel()


def test_the_8b_has_6_981_685_248_parameters_at_a_vocabulary_of_256():
    assert sizes(LLAMA3, "8B") == (6_981_685_248, 6_980_636_672)
    assert sizes(LLAMA3, "8B_131k") == sizes(LLAMA3, "8B")


@pytest.mark.parametrize(
    ("flavor", "total", "without_embedding"),
    [
        ("60M", 82_101_120, 63_226_752),
        ("200M", 261.9e6, 224.2e6),
        ("400M", 455.7e6, 408.5e6),
        ("600M", 679.6e6, 622.9e6),
        ("1.1B", 1145.1e6, 1069.6e6),
    ],
)
def test_the_clm_flavors_have_their_published_sizes(flavor, total, without_embedding):
    assert sizes(AIXSIM, flavor) == pytest.approx((total, without_embedding), abs=0.05e6)


@pytest.mark.parametrize(
    ("flavor", "shape", "theta"),
    [
        ("250M", (1024, 16, 16, 8, 4096), 100_000),
        ("870M", (2048, 16, 32, 8, 7168), 100_000),
        ("1B", (2048, 16, 32, 8, 7168), 500_000),
        ("2B", (3072, 16, 32, 8, 11264), 100_000),
        ("7B", (4096, 32, 32, 8, 14336), 100_000),
        ("8B", (4096, 32, 32, 8, 14336), 500_000),
        ("8B_131k", (4096, 32, 32, 8, 14336), 500_000),
    ],
)
def test_the_neural_flavors_have_the_shapes_of_their_line(flavor, shape, theta):
    config = LLAMA3.flavors[flavor]
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.hidden_dim) == shape
    assert (config.rope_theta, config.vocab_size, config.norm_eps) == (theta, 256, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_debug_flavor_of_every_family_trains_on_cpu(name):
    spec = get_spec(name)
    shape = get_flavor(spec, "debug", {"vocab_size": 97})
    model = spec.build(shape)
    extra = {}
    if spec.inputs is not None:
        drawing = spec.inputs(shape, RecurrenceConfig(), seed=0, total_steps=1)
        extra = drawing(Microbatch(1, 1, 0, [0, 1], 16, torch.device("cpu"), torch.float32)).kwargs
    logits = model(torch.randint(97, (2, 16)), None, **extra)
    assert logits.shape == (2, 16, 97) and logits.dtype == torch.float32
    logits.logsumexp(-1).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_llama_is_the_older_name_of_llama3():
    assert get_spec("llama") is get_spec("llama3")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_spec("lama3"), "did you mean 'llama3'"),
        (lambda: get_flavor(LLAMA3, "8B_128k"), "did you mean '8B_131k'"),
        (lambda: get_flavor(LLAMA3, "debug", {"n_layer": 2}), "did you mean 'n_layers'"),
        (
            lambda: get_flavor(LLAMA3, "debug", {"dim": "wide"}),
            "model.overrides.dim = 'wide': Input should be a valid int",
        ),
        (lambda: get_flavor(LLAMA3, "debug", {"n_layers": 2.5}), "model.overrides.n_layers = 2.5"),
        (lambda: get_flavor(LLAMA3, "debug", {"tie_word_embeddings": 1}), "should be a valid boolean"),
        (
            lambda: get_flavor(LLAMA3, "debug", {"norm_type": "batchnorm"}),
            "'rmsnorm', 'layernorm' or 'np_layernorm'",
        ),
        (lambda: get_flavor(LLAMA3, "debug", {"rope_scaling": {"faktor": 8.0}}), "faktor"),
        (
            lambda: get_flavor(LLAMA3, "debug", {"rope_scaling": {"low_freq_factor": 4.0}}),
            "low_freq_factor < high_freq",
        ),
        (lambda: get_flavor(LLAMA3, "debug", {"dim": 130}), "dim = 130 is not divisible by n_heads = 4"),
        (
            lambda: get_flavor(LLAMA3, "debug", {"n_kv_heads": 3}),
            "n_heads = 4 is not divisible by n_kv_heads = 3",
        ),
        (lambda: get_flavor(LLAMA3, "debug", {"head_dim": 33}), "head_dim = 33 must be even"),
        (lambda: get_flavor(LLAMA3, "debug", {"n_layers": 0}), "n_layers = 0 must be positive"),
        (lambda: get_flavor(LLAMA3, "debug", {"norm_eps": float("nan")}), "norm_eps = nan must be positive"),
    ],
)
def test_a_wrong_model_setting_is_one_clear_message(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_overrides_replace_fields_and_tables_of_fields():
    overrides = {"n_layers": 3, "rope_theta": 1000, "rope_scaling": {"factor": 4, "low_freq_factor": 2}}
    config = get_flavor(LLAMA3, "debug", overrides)
    assert (config.n_layers, config.rope_theta) == (3, 1000)
    assert config.rope_scaling == RopeScaling(factor=4, low_freq_factor=2)
    assert LLAMA3.flavors["debug"].n_layers == 4


def test_a_stored_shape_builds_the_same_config_again():
    config = get_flavor(LLAMA3, "8B_131k", {"rope_scaling": {"factor": 4.0}, "tie_word_embeddings": True})
    assert get_flavor(LLAMA3, "debug", asdict(config)) == config


def test_the_vocabulary_has_one_place():
    with pytest.raises(ValidationError, match=r"set model\.vocab_size"):
        ModelConfig(overrides={"vocab_size": 9})


@pytest.mark.parametrize("tied", [False, True])
def test_the_wrap_plan_names_existing_modules_and_leaves_tied_weights_to_the_root(tied):
    model = LLAMA3.build(get_flavor(LLAMA3, "debug", {"tie_word_embeddings": tied}))
    plan = LLAMA3.wrap_plan(model)
    assert plan.blocks == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert plan.shard_only == (() if tied else (("tok_embeddings",), ("norm", "output")))
    wrapped = [name for names in ((*plan.blocks,), *plan.shard_only) for name in names]
    inside = {id(p) for name in wrapped for p in model.get_submodule(name).parameters()}
    left_to_root = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    assert left_to_root == ({"tok_embeddings.weight", "norm.weight"} if tied else set())
