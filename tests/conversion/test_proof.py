"""The proof of a conversion refuses each wrong one and accepts each right one,
also where rounding is multiplied.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.conversion.common import weights_of
from tests.models.raven.tiny import tiny_raven
from tests.models.tiny import tiny_llama
from torchtitan_rd.conversion import verification
from torchtitan_rd.conversion.pipeline import to_hf
from torchtitan_rd.conversion.verification import (
    compare,
    native,
    transformers_logits,
    transformers_logits_from,
)
from torchtitan_rd.models.layers import RopeScaling

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))]
SCALING = RopeScaling(factor=32.0)  # of Llama 3.2; 8 is Llama 3.1's


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@torch.no_grad()
def outlier_llama(seed: int, **fields):
    """With a channel that is far larger than the others, as those of trained
    models ("massive activations").
    """
    model = tiny_llama(**{"dim": 64, "n_layers": 4, "ffn_dim": 160, "rope_scaling": SCALING, **fields})
    generator = torch.Generator().manual_seed(seed)
    std = (0.05, 0.1, 0.2)[seed % 3]
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, std, generator=generator)
    channel = int(torch.randint(64, (1,), generator=generator))
    model.tok_embeddings.weight[:, channel] *= 10
    model.layers[1].feed_forward.w2.weight[channel] *= 100
    model.norm.weight[channel] *= 0.1
    return model


@torch.no_grad()
def chaotic_raven(seed: int, **fields):
    """Two first states that differ in the last bit end 32 iterations apart."""
    model = tiny_raven(seed, dim=64, mean_recurrence=32, **fields)
    for name, parameter in model.named_parameters():
        if "Wqkv" in name or "fc" in name:
            parameter *= (4, 8)[seed % 2]
    return model


def proven(weights, steps=None):
    ours = native(weights, steps)
    return compare(ours, transformers_logits_from(weights, ours.steps))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_llama_with_outliers_is_accepted(seed):
    found = proven(weights_of(outlier_llama(seed)))
    assert found.passed and 0.05 < found.error / found.noise < 3, str(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_chaotic_raven_is_accepted(seed):
    weights = weights_of(chaotic_raven(seed), "raven")
    assert proven(weights).passed, str(proven(weights))
    assert proven(weights, 32).passed, str(proven(weights, 32))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_chaotic_raven_with_other_rounding_is_accepted(seed):
    """Its rotary table is off by one unit in the last place here and there, as another machine's may be."""
    weights = weights_of(chaotic_raven(seed), "raven")
    ours, model = native(weights), verification._native_model(weights)
    table = model.rotary.forward
    with torch.no_grad():
        model.rotary.forward = lambda length: torch.polar(torch.ones(()), table(length).angle())
        theirs = model(verification._tokens(weights), **verification._forward_inputs(weights, ours.steps))
    assert not torch.equal(ours.logits, theirs)
    assert compare(ours, theirs).passed, str(compare(ours, theirs))


def swap(first: str, second: str):
    def change(tensors, fields):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def swap_parts(name: str, parts: int, first: int = 0, second: int = 1):
    def change(tensors, fields):
        pieces = list(tensors[name].chunk(parts))
        pieces[first], pieces[second] = pieces[second], pieces[first]
        tensors[name] = torch.cat(pieces)

    return change


def transpose(name: str):
    def change(tensors, fields):
        tensors[name] = tensors[name].T.contiguous()

    return change


def state(**wrong):
    return lambda tensors, fields: fields.update(wrong)


def interleave(tensors, fields):
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name].view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)


def tie(tensors, fields):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def lose_the_last_layer(tensors, fields):
    fields["num_hidden_layers"] -= 1
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


LAYER = "model.layers.2."
LLAMA = {
    "another rope theta": state(rope_theta=490_000.0),
    "another factor of the rotary scaling": state(
        rope_scaling={**vars(SCALING), "rope_type": "llama3", "factor": 8.0},
    ),
    "no rotary scaling": state(rope_scaling=None),
    "rotary pairs not permuted": interleave,
    "two heads swapped": swap_parts(f"{LAYER}self_attn.q_proj.weight", 4),
    "k and v swapped": swap(f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
    "gate and up swapped": swap(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"),
    "an untied head tied": tie,
    "another eps of the norms": state(rms_norm_eps=1e-6),
    "a matrix transposed": transpose(f"{LAYER}self_attn.o_proj.weight"),
    "two norms swapped": swap(f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"),
    "two layers swapped": swap("model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"),
    "a layer missing": lose_the_last_layer,
}
CORE = "transformer.core_block.1."
RAVEN = {
    "another rope base": state(rope_base=49_000.0),
    "no scale of the embeddings": state(init_strategy="scaled"),
    "q and k swapped": swap_parts(f"{CORE}attn.Wqkv.weight", 3),
    "two heads swapped": swap_parts(f"{CORE}attn.Wqkv.weight", 12),
    "gate and up swapped": swap_parts(f"{CORE}mlp.fc.weight", 2),
    "biases of q and k swapped": swap_parts(f"{CORE}attn.qk_bias", 2),
    "another eps of the norms": state(norm_eps=1e-5),
    "two norms swapped": swap(f"{CORE}norm_2.weight", f"{CORE}norm_3.weight"),
    "e before s in the adapter": lambda tensors, fields: tensors.update(
        {"transformer.adapter.weight": tensors["transformer.adapter.weight"].roll(64, 1)}
    ),
    "another way to take e in": state(injection_type="add"),
    "a matrix transposed": transpose(f"{CORE}attn.proj.weight"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """family -> (weights, what our model computes, their folder)."""
    found = {}
    for family, model in (
        ("llama3", outlier_llama(0, tie_word_embeddings=False)),
        ("raven", chaotic_raven(0)),
    ):
        weights, folder = weights_of(model, family), tmp_path_factory.mktemp("right") / family
        to_hf(weights, folder, verify=False)
        found[family] = weights, native(weights), folder
    return found


def changed(folder, place, change):
    """A copy of a folder with a mistake in it."""
    place.mkdir()
    tensors, fields = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, fields)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(fields))
    return place


@pytest.mark.parametrize(
    ("family", "mistake"), [("llama3", name) for name in LLAMA] + [("raven", name) for name in RAVEN]
)
def test_a_wrong_conversion_is_refused(family, mistake, right, tmp_path):
    weights, ours, folder = right[family]
    place = changed(folder, tmp_path / "wrong", (LLAMA if family == "llama3" else RAVEN)[mistake])
    found = compare(ours, transformers_logits(place, weights, ours.steps))
    assert not found.passed, str(found)
    assert found.error > 2 * verification.MAX_NOISES * found.noise, f"found, but only just: {found}"


def test_the_copies_are_accepted_without_a_mistake(right, tmp_path):
    for family, (weights, ours, folder) in right.items():
        place = changed(folder, tmp_path / family, lambda tensors, fields: None)
        found = compare(ours, transformers_logits(place, weights, ours.steps))
        assert found.passed, str(found)


def test_a_depth_at_which_rounding_hides_all_is_not_the_one_of_the_proof():
    weights = weights_of(chaotic_raven(3), "raven")
    assert native(weights, 4).noise_kl > verification.MAX_KL / 100 >= native(weights).noise_kl
    assert native(weights).steps == 2 and native(weights_of(chaotic_raven(0), "raven")).steps == 4


@torch.no_grad()
def test_the_noise_is_measured_in_every_sum_over_features():
    layer, x, (q, k) = outlier_llama(0).layers[0], torch.randn(1, 40, 64), torch.randn(2, 1, 2, 40, 64)
    for compute in (
        lambda: layer.attention.wq(x),
        lambda: layer.attention_norm(x),
        lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True),
    ):
        expected, moved = compute(), []
        for cut in verification._CUTS:
            with verification._OtherOrder(cut):
                found = compute()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            moved.append(not torch.equal(found, expected))
        assert any(moved)
