"""Training files of Huginn's program: the model in them comes back bit by bit, whatever else they hold."""

import json
import logging
import resource
import sys
import types
from collections import defaultdict
from dataclasses import asdict, field, make_dataclass
from pathlib import Path

import pytest
import torch

from tests.models.raven.tiny import some_state, some_tokens, tiny_raven
from torchtitan_rd.conversion import huginn
from torchtitan_rd.conversion.huginn import open_huginn
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.models import get_flavor
from torchtitan_rd.models.raven import RAVEN
from torchtitan_rd.models.raven.model import Raven

NAME = "step-00000640-run_0.pth"
WRAPPER = "_orig_mod._original_module."
CONFIG = {
    "name": "tiny-raven",
    "architecture_class_name": "RecurrentGPT",
    "block_size": 4096,
    "n_embd": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 60,
    "padding_multiple": 61,
    "padded_vocab_size": 61,
    "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50_000},
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-6,
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "bias": False,
    "qk_bias": True,
    "init_strategy": "takase",
    "init_orthogonal": False,
    "clip_qkv": None,
    "injection_type": "linear",
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_prelude": 1,
    "n_layers_in_coda": 1,
    "state_init": "like-init",
    "sampling_scheme": "poisson-lognormal-filling",
    "mean_recurrence": 6,
    "mean_backprop_depth": 3,
    "tie_embeddings": True,
}


@pytest.fixture
def lost():
    """make(name, **attributes) -> an object of a class that is gone when the test reads the file."""
    module = types.ModuleType("recpre_of_the_test")
    sys.modules[module.__name__] = module

    def make(name: str, /, **attributes):
        kind = type(name, (), {"__module__": module.__name__})
        setattr(module, name, kind)
        made = kind()
        vars(made).update(attributes)
        return made

    make.module = module
    yield make
    sys.modules.pop(module.__name__, None)


def released(model: Raven) -> dict[str, torch.Tensor]:
    """The state dict by the released names; a tied head is in it, as the same storage."""
    return {name.replace("recurrence.iteration.", ""): tensor for name, tensor in model.state_dict().items()}


def state_of(model: Raven, prefix: str = WRAPPER, **entries) -> dict:
    weights = released(model) | {"freqs_cis": torch.ones(1, 4, 1, 4, 2)}
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    if prefix:
        wrapped |= {f"_orig_mod._forward_module.module.{name}": torch.zeros(1) for name in weights}
    return {"model": wrapped, "model_config": CONFIG, "microbatch_step": 640, "optimizer_step": 10} | entries


def write(path, state: dict):
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(state, path)
    return path


def assert_holds(weights, model: Raven) -> None:
    wanted = model.state_dict()
    assert list(weights.tensors) == list(wanted)
    for name, tensor in wanted.items():
        assert weights.tensors[name] == (tensor.shape, tensor.dtype)
        assert torch.equal(weights.read(name), tensor), name


def test_every_tensor_comes_back_under_our_name(tmp_path):
    model = tiny_raven()
    weights = open_huginn(write(tmp_path / NAME, state_of(model)))
    assert weights.shape == model.shape
    assert (weights.spec, weights.flavor, weights.step) == (RAVEN, "custom", 10)
    assert_holds(weights, model)


def test_the_model_that_is_opened_computes_the_same_logits(tmp_path):
    model = tiny_raven().bfloat16()
    weights = open_huginn(write(tmp_path / NAME, state_of(model)))
    again = Raven(weights.shape).bfloat16()
    again.load_state_dict({name: weights.read(name) for name in weights.tensors})
    inputs = {"num_steps": (2, 1), "initial_state": some_state()}
    assert torch.equal(again(some_tokens(), **inputs), model(some_tokens(), **inputs))


@pytest.mark.parametrize("prefix", [WRAPPER, "_original_module.", ""])
def test_names_of_a_compiled_a_wrapped_and_a_bare_model_are_known(tmp_path, prefix):
    model = tiny_raven()
    assert_holds(open_huginn(write(tmp_path / NAME, state_of(model, prefix))), model)


def test_a_post_norm_model_with_its_unused_factors_and_an_untied_head_is_read(tmp_path):
    before = {
        "block": "post",
        "qk_bias": False,
        "injection": "add",
        "init_strategy": "scaled",
        "n_kv_heads": 2,
    }
    model = tiny_raven(**before, tie_word_embeddings=False, norm_eps=1e-5)
    config = CONFIG | {
        "block_class_name": "TransformerPostNormBlock",
        "qk_bias": False,
        "injection_type": "add",
        "init_strategy": "scaled",
        "num_key_value_heads": 2,
        "tie_embeddings": False,
        "norm_eps": 1e-5,
        "padded_vocab_size": None,
    }
    state = state_of(model, model_config=config)
    state["model"][f"{WRAPPER}transformer.prelude.0.res_scale"] = torch.tensor(1.0)
    state["model"][f"{WRAPPER}transformer.core_block.0.skip_scale"] = torch.tensor(1.0)
    weights = open_huginn(write(tmp_path / NAME, state))
    assert weights.shape == model.shape
    assert_holds(weights, model)


def test_a_pre_norm_model_with_every_option_and_biased_grouped_keys_is_read(tmp_path):
    model = tiny_raven(block="pre", n_kv_heads=2, qk_norm=True, clip_qkv=8.0)
    theirs = {
        "block_class_name": "TransformerPreNormBlock",
        "num_key_value_heads": 2,
        "qk_norm": True,
        "clip_qkv": 8,
    }
    weights = open_huginn(write(tmp_path / NAME, state_of(model, model_config={**CONFIG, **theirs})))
    assert weights.shape == model.shape
    assert_holds(weights, model)


def test_other_objects_are_passed_over_and_their_code_does_not_run(tmp_path, lost):
    model = tiny_raven()
    ran = []
    scheduler = lost("DataScheduler", sources=[lost("Source", weight=0.5)])
    type(scheduler).__setstate__ = lambda self, state: ran.append(state)
    type(scheduler).__reduce__ = lambda self: (lost.module.build, (1,), {"sources": [1]})
    lost.module.build = lambda number: ran.append(number)
    lost.module.build.__module__, lost.module.build.__qualname__ = lost.module.__name__, "build"
    state = state_of(
        model,
        optimizer={"state": defaultdict(dict, {0: {"step": torch.ones(()), "exp_avg": torch.zeros(9)}})},
        tokenizer=lost("Tokenizer", vocab=["a"]),
        data_scheduler=scheduler,
        train_dataloader={"rng": torch.get_rng_state()},
        metrics={"lr": 1e-3},
    )
    path = write(tmp_path / NAME, state)
    del sys.modules[lost.module.__name__]
    assert_holds(open_huginn(path), model)
    assert ran == []


def test_a_configuration_object_of_a_lost_class_is_read_by_its_attributes(tmp_path, lost):
    rope = lost("RoPESettings", **{**CONFIG["rope_settings"], "rope_base": 10_000})
    path = write(
        tmp_path / NAME,
        state_of(tiny_raven(), model_config=lost("RecurrentConfig", **{**CONFIG, "rope_settings": rope})),
    )
    del sys.modules[lost.module.__name__]
    assert open_huginn(path).shape == tiny_raven(rope_theta=10_000.0).shape


def test_a_configuration_that_reduces_itself_to_a_table_is_read(tmp_path, lost):
    """As Huginn's dataclass: __getstate__ gives its fields, and nested ones as tables."""
    fields = [
        (key, object, field(default_factory=lambda value=value: value)) for key, value in CONFIG.items()
    ]
    kind = make_dataclass("RecurrentConfig", fields)
    kind.__getstate__ = lambda self: {**asdict(self), "_class_name": "RecurrentConfig"}
    kind.__setstate__ = lambda self, state: 1 / 0
    kind.__module__, lost.module.RecurrentConfig = lost.module.__name__, kind
    path = write(tmp_path / NAME, state_of(tiny_raven(), model_config=kind()))
    del sys.modules[lost.module.__name__]
    assert open_huginn(path).shape == tiny_raven().shape


@pytest.mark.parametrize("place", [".", ".."])
def test_without_a_configuration_in_the_file_the_one_of_the_run_counts(tmp_path, place):
    path = write(tmp_path / "checkpoints" / NAME, state_of(tiny_raven(), model_config=None))
    (path.parent / place / "model_config.json").write_text(json.dumps({**CONFIG, "mean_recurrence": 5}))
    assert open_huginn(path).shape == tiny_raven(mean_recurrence=5).shape
    (path.parent / place / "model_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_config\.json is no JSON"):
        open_huginn(path)


def test_without_any_configuration_the_flavor_counts_and_must_be_given(tmp_path):
    flavor = get_flavor(RAVEN, "debug-demo")
    path = write(tmp_path / NAME, state_of(tiny_raven(**vars(flavor)), model_config=None))
    with pytest.raises(ConfigError, match=r"0\.pth does not tell the model's shape, .*: pass --flavor"):
        open_huginn(path)
    weights = open_huginn(path, "debug-demo")
    assert (weights.shape, weights.flavor) == (flavor, "debug-demo")
    with pytest.raises(ConfigError, match="no flavor of raven"):
        open_huginn(path, "debug-demos")
    with pytest.raises(CheckpointError, match=r"lacks|holds|shape"):
        open_huginn(path, "debug")


def test_a_flavor_at_odds_with_the_file_is_warned_about(tmp_path, caplog):
    path = write(tmp_path / NAME, state_of(tiny_raven()))
    with caplog.at_level(logging.WARNING, "torchtitan_rd"):
        assert open_huginn(path, "nebel-raven-3.5b").shape == tiny_raven().shape
    assert "it is not that of flavor nebel-raven-3.5b" in caplog.text


def test_the_configuration_of_the_large_run_is_its_flavor():
    """Facts of the public registry."""
    sizes = {"n_embd": 5280, "num_attention_heads": 55, "num_key_value_heads": 55, "intermediate_size": 17920}
    layers = {"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2}
    means = {"mean_recurrence": 32, "mean_backprop_depth": 8, "padded_vocab_size": 65536, "vocab_size": 65536}
    assert huginn._shape(huginn._table({**CONFIG, **sizes, **layers, **means}), "x") == get_flavor(
        RAVEN, "nebel-raven-3.5b"
    )


@pytest.mark.parametrize(
    ("entries", "name", "step"),
    [
        ({"optimizer_step": None}, NAME, 640),
        ({"optimizer_step": None, "microbatch_step": None}, NAME, 640),
        ({"optimizer_step": None, "microbatch_step": None}, "last.pth", None),
    ],
)
def test_the_step_is_the_best_that_is_known(tmp_path, entries, name, step):
    assert open_huginn(write(tmp_path / name, state_of(tiny_raven(), **entries))).step == step


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture_class_name", "GPT"),
        ("norm_class_name", "UnparametrizedRMSNorm"),
        ("mlp_class_name", "BaseMLP"),
        ("nonlin_name", "GELU"),
        ("bias", True),
        ("center_attention", True),
        ("qk_norm", "rms"),
        ("clip_qkv", "eight"),
        ("clip_qkv", -8.0),
        ("mup_model_scaling_factor", 2),
        ("embed_step", True),
        ("intermediate_noise_injection", 0.1),
        ("block_class_name", "TransformerPreNormSwinBlock"),
        ("init_strategy", "takase-scaled"),
        ("injection_type", "ffn"),
        ("state_init", "other"),
        ("sampling_scheme", "other"),
    ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(tmp_path, key, value):
    path = write(tmp_path / NAME, state_of(tiny_raven(), model_config={**CONFIG, key: value}))
    ours = {"injection_type": "injection"}.get(key, key)
    with pytest.raises(ConfigError, match=rf"0\.pth: model_config: {ours}.*{value!r}"):
        open_huginn(path)


def test_other_rotary_settings_are_refused_by_name(tmp_path):
    rope = {**CONFIG["rope_settings"], "rope_condense_ratio": 2}
    path = write(tmp_path / NAME, state_of(tiny_raven(), model_config={**CONFIG, "rope_settings": rope}))
    with pytest.raises(ConfigError, match=r"rope_settings\.rope_condense_ratio = 2 is not supported, only 1"):
        open_huginn(path)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is missing"), ("32", "of the wrong type"), (True, "wrong type")]
)
def test_a_missing_or_mistyped_size_is_refused_by_name(tmp_path, value, message):
    path = write(tmp_path / NAME, state_of(tiny_raven(), model_config={**CONFIG, "n_embd": value}))
    with pytest.raises(ConfigError, match=rf"model_config: n_embd .*{message}"):
        open_huginn(path)


def test_a_missing_surplus_or_misshapen_tensor_is_named(tmp_path):
    state = state_of(tiny_raven())
    norm = f"{WRAPPER}transformer.ln_f.weight"
    for value, message in (
        (None, r"lacks transformer\.ln_f\.weight"),
        (torch.ones(31), r"ln_f\.weight has shape \(31,\)"),
    ):
        model = {name: tensor for name, tensor in state["model"].items() if name != norm}
        model |= {} if value is None else {norm: value}
        with pytest.raises(CheckpointError, match=message):
            open_huginn(write(tmp_path / NAME, {**state, "model": model}))
    state["model"][f"{WRAPPER}step_embedding.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"holds step_embedding\.weight"):
        open_huginn(write(tmp_path / NAME, state))


def test_a_tied_head_may_be_a_copy_or_absent_but_not_another(tmp_path):
    model, state = tiny_raven(), state_of(tiny_raven())
    head = f"{WRAPPER}lm_head.weight"
    state["model"][head] = state["model"][head].clone()
    assert_holds(open_huginn(write(tmp_path / NAME, state)), model)
    state["model"][head][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
        open_huginn(write(tmp_path / NAME, state))
    del state["model"][head]
    assert_holds(open_huginn(write(tmp_path / NAME, state)), model)


def test_another_file_is_named(tmp_path):
    for content in ({"weights": {}}, [1], {"model": [1]}, {"model": {"a": 1}}):
        with pytest.raises(CheckpointError, match=rf"{NAME}"):
            open_huginn(write(tmp_path / NAME, content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_huginn(tmp_path / "absent.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_optimizer_is_not_read(tmp_path):
    """64 MB beside a model of 0.2 MB; pages of the file that were touched would count."""
    moments = {"exp_avg": torch.ones(8 << 20), "exp_avg_sq": torch.ones(8 << 20)}
    path = write(tmp_path / NAME, state_of(tiny_raven(), optimizer={"state": {0: moments}}))
    before = resident()
    weights = open_huginn(path)
    for name in weights.tensors:
        weights.read(name).sum()
    assert resident() - before < 16 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
