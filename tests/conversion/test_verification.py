"""conversion/verification.py: equal models pass, and each way to convert wrongly is found."""

import json
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models.tiny import tiny_config
from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion import verification
from torchtitan_rd.conversion.memory import cgroup_bytes
from torchtitan_rd.conversion.verification import (
    Comparison,
    Native,
    compare,
    fixed_tokens,
    native,
    native_logits,
    transformers_logits,
    transformers_logits_from,
    unavailable,
    verification_steps,
)
from torchtitan_rd.conversion.weights import Weights
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.layers import RopeScaling

SCALING = RopeScaling(factor=4.0, original_max_position_embeddings=64)
SHAPES = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "short": {"max_seq_len": 40},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def random_weights(shape, spec=MODELS["llama3"], dtype=torch.float32) -> Weights:
    """Large enough, norms too, for an error to show."""
    generator = torch.Generator().manual_seed(0)
    state = spec.build(shape).state_dict(keep_vars=True)
    drawn = {id(t): (torch.randn(t.shape, generator=generator) * 0.2).to(dtype) for t in state.values()}
    tensors = {name: drawn[id(t)] for name, t in state.items()}
    info = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return Weights(spec, shape, "tiny", info, tensors.__getitem__, "made up")


def export(weights: Weights, folder, **changed_fields):
    layout, shape = weights.spec.hf, weights.shape
    names = layout.key_map(shape)
    tensors = {
        theirs: layout.to_hf(ours, weights.read(ours), shape).contiguous() for ours, theirs in names.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {**layout.config_fields(shape), **changed_fields}
    (folder / "config.json").write_text(json.dumps(fields))
    for name, content in layout.code_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_models_pass_from_a_folder_and_from_memory(shape, tmp_path):
    weights = random_weights(tiny_config(**SHAPES[shape]))
    ours = native(weights)
    assert ours.logits.shape == (1, SHAPES[shape].get("max_seq_len", 128), 61) and ours.logits.std() > 0.1
    for theirs in (
        transformers_logits(export(weights, tmp_path), weights),
        transformers_logits_from(weights),
    ):
        found = compare(ours, theirs)
        assert found.passed and found.max_difference <= 1e-5 and abs(found.kl) < 1e-9, str(found)


def test_bfloat16_weights_are_compared_in_float32(tmp_path):
    weights = random_weights(tiny_config(), dtype=torch.bfloat16)
    ours = native(weights)
    folder = export(weights, tmp_path, torch_dtype="bfloat16")
    for theirs in (transformers_logits(folder, weights), transformers_logits_from(weights)):
        assert theirs.dtype == torch.float32 and compare(ours, theirs).passed


FIELDS = {"rope_theta": 120.0, "rope_scaling": None, "rms_norm_eps": 1e-3}
TENSORS = {
    "the rotary permutation": ("layers.0.attention.wq.weight", "layers.0.attention.wq.weight"),
    "a norm": ("layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"),
    "the gate": ("layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w3.weight"),
    "a layer": ("layers.0.attention.wo.weight", "layers.1.attention.wo.weight"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_of_config_json_is_found(field, tmp_path):
    weights = random_weights(tiny_config(**SHAPES["scaled"]))
    folder = export(weights, tmp_path, **{field: FIELDS[field]})
    found = compare(native(weights), transformers_logits(folder, weights))
    assert not found.passed and str(found).endswith("DIFFERENT")


@pytest.mark.parametrize("mistake", [*TENSORS, "a transposition"])
def test_a_wrongly_converted_weight_is_found(mistake, tmp_path):
    weights = random_weights(tiny_config())

    def wrong(name, tensor, shape):
        if mistake == "a transposition":
            return (
                tensor.T
                if name == "layers.1.attention.wo.weight"
                else weights.spec.hf.to_hf(name, tensor, shape)
            )
        first, second = TENSORS[mistake]
        if name not in (first, second):
            return weights.spec.hf.to_hf(name, tensor, shape)
        return weights.read(second if name == first else first)  # the permuted one: as it is

    broken = replace(weights, spec=replace(weights.spec, hf=replace(weights.spec.hf, to_hf=wrong)))
    ours = native(weights)
    for theirs in (transformers_logits(export(broken, tmp_path), weights), transformers_logits_from(broken)):
        assert not compare(ours, theirs).passed


def test_tied_weights_are_read_once_and_shared():
    weights, read = random_weights(tiny_config(tie_word_embeddings=True)), []
    logits = native_logits(replace(weights, read=lambda name: read.append(name) or weights.read(name)))
    assert len(read) == len(set(read)) and "output.weight" not in read and "tok_embeddings.weight" in read
    twin = random_weights(tiny_config())
    tensors = {name: weights.read(name) for name in weights.tensors}
    assert torch.equal(native_logits(replace(twin, read=tensors.__getitem__)), logits)


def test_a_tensor_of_another_shape_is_an_error_and_not_broadcast():
    weights = random_weights(tiny_config())
    wrong = replace(weights, read=lambda name: weights.read(name)[:1])
    with pytest.raises(
        CheckpointError, match=r"tok_embeddings.weight has shape \(1, 32\), but .* \(61, 32\)"
    ):
        native_logits(wrong)


def test_a_key_map_with_a_gap_is_an_error():
    weights = random_weights(tiny_config())
    gap = replace(weights.spec.hf, key_map=lambda shape: {"norm.weight": "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"disagree about .*lm_head\.weight"):
        transformers_logits_from(replace(weights, spec=replace(weights.spec, hf=gap)))


def test_a_folder_that_transformers_cannot_load_is_an_error_that_names_it(tmp_path):
    weights = random_weights(tiny_config())
    (export(weights, tmp_path) / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=f"transformers cannot load {tmp_path}"):
        transformers_logits(tmp_path, weights)


def test_a_recurrent_model_is_compared_at_a_fixed_depth_from_a_fixed_state(monkeypatch):
    shape = get_flavor(MODELS["raven"], "debug", {"mean_recurrence": 6})
    weights = random_weights(shape, MODELS["raven"])
    assert verification_steps(weights) == 4
    assert verification_steps(replace(weights, shape=replace(shape, mean_recurrence=2))) == 2
    assert verification_steps(random_weights(tiny_config())) is None
    assert torch.equal(native_logits(weights), native_logits(weights, 4))
    assert not torch.equal(native_logits(weights, 1), native_logits(weights, 4))
    taken = {}

    class Theirs(nn.Module):
        def forward(self, input_ids, **inputs):
            taken.update(inputs, tokens=input_ids)
            return type("Output", (), {"logits": torch.zeros(1)})

    verification._logits(Theirs(), weights, None)
    model = weights.spec.build(shape)
    model.load_state_dict({name: weights.read(name) for name in weights.tensors})
    steps, state = taken["num_steps"], taken["input_states"]
    assert (steps, state.shape) == (4, (1, 128, shape.dim)) and state.std() > 0.01
    with torch.no_grad():
        ours = model(taken["tokens"], num_steps=(steps, 0), initial_state=state)
    assert torch.equal(native_logits(weights), ours)


OTHER = {"block": "post", "injection": "add", "qk_bias": False, "n_kv_heads": 4}


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (None, {}),
        (3, OTHER),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, {}), (3, {}), (None, OTHER), (1, OTHER))
        ),
    ],
)
def test_equal_recurrent_models_pass_at_each_depth_and_others_do_not(fields, steps, tmp_path):
    spec = MODELS["raven"]
    weights = random_weights(
        get_flavor(spec, "debug", {"tie_word_embeddings": True, "mean_recurrence": 6, **fields}), spec
    )
    ours, folder = native(weights, steps), export(weights, tmp_path)
    for theirs in (transformers_logits(folder, weights, steps), transformers_logits_from(weights, steps)):
        assert compare(ours, theirs).passed, str(compare(ours, theirs))
    assert not compare(ours, transformers_logits(folder, weights, 2)).passed
    wrong = replace(weights, shape=replace(weights.shape, rope_theta=100.0))
    assert not compare(ours, transformers_logits(export(wrong, tmp_path), weights, steps)).passed


def test_only_the_code_of_this_package_is_run_and_each_change_of_it_counts(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    source = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tiny_llama'\n"
        "class TinyModel(LlamaForCausalLM):\n    config_class = TinyConfig\n"
        "    def forward(self, *args, **kwargs):\n        out = super().forward(*args, **kwargs)\n"
        "        out.logits = out.logits + SHIFT\n        return out\n"
    )
    code = package / "modeling_tiny.py"
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    fields = {"model_type": "tiny_llama", "architectures": ["TinyModel"], "auto_map": auto_map}
    plain = random_weights(tiny_config())
    layout = replace(
        plain.spec.hf,
        code=(code,),
        config_fields=lambda shape: {**plain.spec.hf.config_fields(shape), **fields},
    )
    weights = replace(plain, spec=replace(plain.spec, hf=layout))
    ours = native(weights)
    for shift in (0, 1):
        code.write_text(source.replace("SHIFT", str(shift)))
        folder = export(weights, tmp_path / "exported")
        (folder / "modeling_tiny.py").write_text("raise SystemExit('remote code was run')")
        for theirs in (transformers_logits(folder, weights), transformers_logits_from(weights)):
            found = compare(ours, theirs)
            assert found.passed == (shift == 0) and found.max_difference == pytest.approx(shift, abs=1e-5)


def given(logits: torch.Tensor, noise: float = 1e-5) -> Native:
    return Native(logits, noise, 0.0, None)


def test_five_times_the_noise_or_a_divergence_of_1e_6_nats_is_too_much_and_the_result_is_one_line():
    logits = torch.linspace(-1, 1, 40).view(1, 8, 5)
    assert compare(given(logits), logits) == Comparison(0.0, 1e-5, 0.0, 0.0, 8)
    for shift, passes in ((4.9e-5, True), (5.2e-5, False)):
        found = compare(given(logits), logits + shift)
        assert found.passed == passes and found.error == pytest.approx(shift, rel=0.01), str(found)
    diverging = logits + torch.tensor([5e-3, 0, 0, 0, 0])
    assert (
        not compare(given(logits, 1.0), diverging).passed
        and compare(given(logits, 1.0), logits + 1e-3).passed
    )
    text = "max |delta logit| 3.1e-06, rms 1.0e-06 (at most 5 times the rounding noise of 2.0e-06), "
    text += "KL 1.2e-12 nats (at most 1e-06) over 64 tokens: equal"
    assert str(Comparison(1e-6, 2e-6, 1.2e-12, 3.1e-6, 64)) == text
    assert "64 tokens and 4 iterations: DIFFERENT" in str(Comparison(1.0, 0.1, 0.1, 1.0, 64, 4))


def test_the_divergence_is_that_of_ours_from_theirs_per_token():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = float((p * (p / q).log()).sum())
    ours, theirs = (x.log().expand(2, 20, 2) for x in (p, q))
    found = compare(given(ours), theirs)
    assert found.kl == pytest.approx(expected) and found.tokens == 40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_not_finite_never_passes(value, side):
    logits = [torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)]
    logits[side][0, 2, 1] = value
    found = compare(given(logits[0]), logits[1])
    assert not found.passed and "1 logits" in str(found) and ("here", "in transformers")[side] in str(found)


def test_other_shapes_never_pass():
    found = compare(given(torch.zeros(1, 4, 5)), torch.zeros(1, 4, 6))
    assert (
        not found.passed
        and str(found) == "logits are (1, 4, 5) here and (1, 4, 6) in transformers: DIFFERENT"
    )


@pytest.mark.parametrize("vocab_size", [2, 61, 258, 128_256])
def test_the_tokens_are_fixed_and_span_the_vocabulary(vocab_size):
    tokens = fixed_tokens(vocab_size)
    assert tokens.shape == (1, 128) and torch.equal(tokens, fixed_tokens(vocab_size))
    assert (int(tokens.min()), int(tokens.max())) == (0, vocab_size - 1)
    assert len(tokens.unique()) == min(128, vocab_size)
    assert not torch.equal(tokens, tokens.sort().values)


def test_what_stands_against_a_comparison_is_said_with_the_remedy(monkeypatch):
    weights = random_weights(tiny_config())
    assert unavailable(weights) is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    assert unavailable(weights) == (
        "it needs about 0.0 GB of memory and 0.0 GB are available: convert where there is more"
    )
    huge = replace(weights, shape=MODELS["llama3"].flavors["8B"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 30 * 10**9}))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in huge.spec.build(huge.shape).parameters())
    assert f"about {5.2e-9 * parameters:.1f} GB of memory and 30.0 GB are available" in unavailable(huge)
    assert unavailable(weights) is None

    def absent(name):
        raise verification.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(verification.importlib.metadata, "version", lambda name: "4.52.4")
    assert unavailable(weights) == "transformers 4.52.4 is too old: pip install 'transformers>=4.53'"
    monkeypatch.setattr(verification.importlib.metadata, "version", absent)
    assert unavailable(weights) == "transformers is not installed: pip install 'transformers>=4.53'"


@pytest.mark.parametrize(
    ("line", "base", "limit", "usage", "cached"),
    [
        ("0::/job/step", "", "memory.max", "memory.current", "file"),
        ("4:memory:/job/step", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ],
)
def test_the_limit_of_the_job_counts_and_its_cached_files_do_not(line, base, limit, usage, cached, tmp_path):
    membership = tmp_path / "membership"
    assert cgroup_bytes(tmp_path, membership) == [float("inf")]
    membership.write_text(f"7:cpu,cpuacct:/job\n{line}\n")
    for name, most in (("job", "1000"), ("job/step", "max")):
        folder = tmp_path / base / name
        folder.mkdir(parents=True)
        (folder / limit).write_text(most)
        (folder / usage).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 600\n{cached} 100\n")
    assert min(cgroup_bytes(tmp_path, membership)) == 400
