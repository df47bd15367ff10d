"""models/raven/huggingface: the remote code against our model, loaded as a user loads it,
and its generation.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.models.raven.remote import export, fresh_code, load  # noqa: F401 (a fixture)
from tests.models.raven.tiny import RETROFITTED, some_state, some_tokens, tiny_raven
from torchtitan_rd.models.raven.hf import HF
from torchtitan_rd.models.raven.shape import INJECTIONS

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "huginn": {},
    "untied": {"tie_word_embeddings": False},
    "post-norm": {"block": "post", "qk_bias": False, "init_strategy": "scaled"},
    "grouped keys": {"n_kv_heads": 2, "qk_bias": False},
    "grouped keys with biases": {"n_kv_heads": 2},
    "pre-norm": {"block": "pre"},
    "normalised and clamped": {"qk_norm": True, "clip_qkv": 0.1},
    "retrofitted": RETROFITTED,
    "retrofitted, tied": {**RETROFITTED, "tie_word_embeddings": True, "head_dim": None},
    "no prelude, no coda": {"n_layers_prelude": 0, "n_layers_coda": 0},
    "coda alone": {"n_layers_prelude": 0, "n_layers_coda": 2},
    **{f"injection {injection}": {"injection": injection} for injection in INJECTIONS[1:]},
}
STATES = {"zero": {"state_init": "zero"}, "seeded": {}}
SEEDED = {"state_seed": 5}


def pair(folder, **fields):
    """Our model and the remote one of the same weights."""
    ours = tiny_raven(**fields)
    return ours, load(export(ours, folder / "export"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("huginn"))[1]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_our_model(variant, tmp_path):
    ours = tiny_raven(**VARIANTS[variant])
    theirs, info = load(export(ours, tmp_path / "export"), output_loading_info=True)
    assert not theirs.training and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    for depth in (1, 4, 32):
        for state in (torch.zeros(2, 12, 32), some_state()):
            given = {} if ours.shape.injection == "none" else {"input_states": state}
            found = theirs(some_tokens(), num_steps=depth, **given).logits
            expected = ours(some_tokens(), num_steps=(depth, 0), initial_state=state)
            assert found.dtype == torch.float32 and (expected.std() > 0.01 or not state.any())
            assert (found - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_a_chaotic_model_gives_the_same_bits_after_32_iterations(tmp_path):
    """Here the last bit of one rotary angle moves the logits by 1e-3 and more."""
    ours = tiny_raven(dim=64, n_heads=2)
    for name, parameter in ours.named_parameters():
        if "Wqkv" in name or "fc" in name:
            parameter *= 8
    theirs = load(export(ours, tmp_path / "export"))
    tokens, state = some_tokens(length=64), some_state(length=64, dim=64)
    expected = ours(tokens, num_steps=(32, 0), initial_state=state)
    moved = ours(tokens, num_steps=(32, 0), initial_state=state * (1 + 1e-7))
    assert (moved - expected).abs().max() > 1e-3
    assert torch.equal(theirs(tokens, num_steps=32, input_states=state).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_pair_equal_those_of_our_model(checkpointing, tmp_path):
    ours, theirs = pair(tmp_path)
    if checkpointing:
        theirs.gradient_checkpointing_enable()
    theirs.train()
    tokens = some_tokens()
    found = theirs(tokens, labels=tokens, num_steps=(3, 2), input_states=some_state())
    logits = ours(tokens, num_steps=(3, 2), initial_state=some_state())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    found.loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            gradients[HF.key_map(ours.shape)[name]], parameter.grad, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("injection", ["linear", "none"])
def test_checkpointing_changes_no_gradient_and_keeps_fewer_tensors(injection, tmp_path):
    _, model = pair(tmp_path, injection=injection)
    gradients, saved = [], []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        saved.append([])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved[-1].append(t.numel()), t)[1], lambda t: t
        ):
            loss = model(some_tokens(), labels=some_tokens(), num_steps=(1, 6), **SEEDED).loss
        saved[-1] = sum(saved[-1])  # before backward recomputes
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert saved[1] < saved[0] / 4
    assert len(gradients[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model(some_tokens(), use_cache=True, num_steps=2).past_key_values is None
    with torch.no_grad():
        cache = model(some_tokens(), use_cache=True, num_steps=2).past_key_values
    with pytest.raises(ValueError, match="gradient checkpointing runs blocks twice"):
        model(some_tokens(length=1), past_key_values=cache, num_steps=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_generates_as_a_trainer_leaves_it(checkpointing, tmp_path):
    """In training mode, perhaps with checkpointing; no depth was given."""
    _, model = pair(tmp_path)
    common = {"max_new_tokens": 6, "do_sample": False, **SEEDED}
    expected = model.generate(some_tokens(), **common)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for use_cache in (True, False):
        assert torch.equal(model.generate(some_tokens(), use_cache=use_cache, **common), expected)
    assert model.training


def test_labels_are_shifted_here_and_shift_labels_are_not(model):
    tokens, common = some_tokens(), {"num_steps": 2, **SEEDED}
    logits = model(tokens, **common).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert model(tokens, labels=tokens, **common).loss.item() == pytest.approx(expected, abs=1e-6)
    following = F.pad(tokens[:, 1:], (0, 1), value=-100)
    assert model(tokens, shift_labels=following, **common).loss.item() == pytest.approx(expected, abs=1e-6)
    assert model(tokens, labels=following, **common).loss.item() != pytest.approx(expected, abs=1e-2)


def test_a_trainer_finds_the_labels_that_a_data_set_has_and_reports_the_loss_of_an_evaluation(model):
    """It takes each argument of forward with "label" in its name for one that every batch has."""
    from transformers.utils import find_labels

    assert find_labels(type(model)) == ["labels"]


def test_arguments_of_the_loss_reach_it(model):
    common = {"labels": some_tokens(), "num_steps": 2, **SEEDED}
    mean, half = (
        model(some_tokens(), **common, num_items_in_batch=items).loss.item() for items in (None, 44)
    )
    assert half == pytest.approx(mean / 2)
    ignored = int(some_tokens()[0, 5])
    labels = some_tokens().where(some_tokens() != ignored, -100)
    other = model(some_tokens(), **common, ignore_index=ignored).loss.item()
    assert other == pytest.approx(model(some_tokens(), **{**common, "labels": labels}).loss.item()) != mean


@torch.no_grad()
def test_the_argument_names_of_the_released_class_have_their_meaning(model):
    common = {"num_steps": 2, **SEEDED}
    plain = model(some_tokens(), output_hidden_states=True, **common)
    embeds = model.transformer.wte(some_tokens(seed=7))
    other = model(some_tokens(seed=7), **common)
    assert torch.equal(model(some_tokens(), input_embeds=embeds, **common).logits, other.logits)
    details = {"return_logits": False, "return_latents": False, "return_head": True, "return_stats": False}
    asked = model(some_tokens(), output_details=details, labels=some_tokens(), **common)
    assert asked.logits is None and asked.latent_states is None and asked.loss is not None
    assert torch.equal(asked.hidden_states, plain.hidden_states[-1])
    with pytest.raises(ValueError, match="output_details: 'return_stats' is not supported"):
        model(some_tokens(), output_details={"return_stats": True})


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "init_values", "inputs_embed", "temperature"])
def test_an_unknown_argument_is_refused_by_name(name, model):
    with pytest.raises(TypeError, match=f"takes no argument {name}"):
        model(some_tokens(), **{name: 1})
    model(some_tokens(), num_steps=1, token_type_ids=torch.zeros(2, 12), cache_position=None)  # of tokenizers


@torch.no_grad()
@pytest.mark.parametrize("variant", ["huginn", "grouped keys"])
def test_eager_attention_is_what_it_says_and_gives_the_same_logits(variant, tmp_path, monkeypatch):
    ours = tiny_raven(**VARIANTS[variant])
    folder = export(ours, tmp_path / "export")
    fused, eager = load(folder), load(folder, attn_implementation="eager")
    tokens, mask, _ = ragged("left")
    common = {"num_steps": 3, **SEEDED}
    expected = [fused(tokens, attention_mask=given, **common).logits for given in (None, mask)]
    generated = fused.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **common)

    def never(*args, **kwargs):
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", never)
    for given, logits in zip((None, mask), expected, strict=True):
        torch.testing.assert_close(
            eager(tokens, attention_mask=given, **common).logits, logits, atol=2e-5, rtol=0
        )
    found = eager.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **common)
    assert torch.equal(found, generated)
    with pytest.raises(AssertionError, match="the fused kernel was called"):
        fused(tokens, **common)


def test_what_attention_cannot_do_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(some_tokens(), output_attentions=True)
    folder = export(tiny_raven(), tmp_path / "export")
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError), match=r"(?i)flash|flex"):
            load(folder, attn_implementation=name)


@torch.no_grad()
def test_a_forward_with_a_mask_compiles_into_one_graph(model):
    tokens, mask, _ = ragged("left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given in (mask, torch.ones_like(mask)):
        arguments = {"attention_mask": given, "num_steps": 2, "input_states": some_state()}
        expected = model(tokens, **arguments).logits
        torch.testing.assert_close(compiled(tokens, **arguments).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_new_token_asks_the_device_nothing(model, monkeypatch):
    asked, all_ = [], torch.Tensor.all
    cache = model(some_tokens(), use_cache=True, num_steps=2, **SEEDED).past_key_values
    monkeypatch.setattr(
        torch.Tensor, "all", lambda tensor, *args: asked.append(tensor.shape) or all_(tensor, *args)
    )
    common = {"attention_mask": torch.ones(2, 13), "num_steps": 2, "input_states": some_state(length=13)}
    model(some_tokens(length=1), past_key_values=cache, **common)
    assert not asked


def test_parts_may_be_left_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    ours = tiny_raven()
    folder = export(ours, tmp_path / "export")
    places = {f"transformer.{name}": "cpu" for name in ("wte", "prelude", "coda", "ln_f", "adapter")}
    places |= {"transformer.core_block": "disk", "lm_head": "cpu"}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    found = model(some_tokens(), num_steps=3, input_states=some_state()).logits
    expected = ours(some_tokens(), num_steps=(3, 0), initial_state=some_state())
    assert (found - expected).abs().max() <= 1e-5


CACHED = [(depth, state) for depth in (1, 4, 16) for state in STATES]
LAYOUTS = (
    "post-norm",
    "grouped keys",
    "grouped keys with biases",
    "pre-norm",
    "normalised and clamped",
    "retrofitted",
    "no prelude, no coda",
    "coda alone",
)
LAYOUTS += ("injection none",)


@pytest.mark.parametrize(("depth", "variant"), [*CACHED, *((3, layout) for layout in LAYOUTS)])
def test_cached_generation_equals_uncached_generation(depth, variant, tmp_path):
    _, model = pair(tmp_path, **{**VARIANTS, **STATES}[variant])
    common = {"num_steps": depth, "max_new_tokens": 10, "do_sample": False, **SEEDED}
    cached, uncached = (model.generate(some_tokens(), use_cache=use, **common) for use in (True, False))
    assert cached.shape == (2, 22) and torch.equal(cached, uncached)


def ragged(side):
    """Two rows, the first one 5 tokens shorter and padded."""
    tokens, mask = some_tokens(), torch.ones(2, 12, dtype=torch.int64)
    padding, real = (slice(0, 5), slice(5, 12)) if side == "left" else (slice(7, 12), slice(0, 7))
    tokens[0, padding], mask[0, padding] = 0, 0
    return tokens, mask, real


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logit_of_a_real_token(side, model):
    tokens, mask, real = ragged(side)
    common = {"num_steps": 4, **SEEDED}
    padded = model(tokens, attention_mask=mask, **common).logits
    alone = model(tokens[:1, real], **common).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1, real], alone, atol=1e-5, rtol=0)
    full = model(tokens[1:], **common).logits
    torch.testing.assert_close(padded[1:], full, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite(model, monkeypatch):
    mask = torch.tensor([[0] * 12, [1] * 12])
    masks, attend = [], F.scaled_dot_product_attention

    def noting(*qkv, **kwargs):
        masks.append(kwargs["attn_mask"])
        return attend(*qkv, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    assert model(some_tokens(), attention_mask=mask, num_steps=2).logits.isfinite().all()
    assert len(masks) == 6 and all(mask.any(-1).all() for mask in masks)  # else some kernels give nan


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("depth", [1, 4, 16])
def test_a_left_padded_ragged_batch_generates_what_its_rows_generate_alone(depth, use_cache, model):
    tokens, mask, real = ragged("left")
    common = {"num_steps": depth, "max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, **SEEDED}
    together = model.generate(tokens, attention_mask=mask, pad_token_id=0, **common)
    assert torch.equal(together[:1, 5:], model.generate(tokens[:1, real], **common))
    assert torch.equal(together[1:], model.generate(tokens[1:], **common))


@torch.no_grad()
def test_a_prompt_may_come_in_chunks(model):
    common = {"num_steps": 3, **SEEDED}
    whole = model(some_tokens(), **common).logits
    cache = transformers.DynamicCache()
    chunks = [
        model(part, past_key_values=cache, **common).logits
        for part in some_tokens().split((5, 4, 1, 2), dim=1)
    ]
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beam_search_and_sampling_run_alike_with_and_without_a_cache(how, model):
    common = {"num_steps": 2, "max_new_tokens": 6, **SEEDED, **how}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(some_tokens(), use_cache=use_cache, **common))
    assert torch.equal(*results)


def test_generation_takes_first_states_of_all_tokens(model):
    common = {"num_steps": 1, "max_new_tokens": 4, "do_sample": False}
    states = 3 * some_state(length=15)
    both = [
        model.generate(some_tokens(), input_states=states, use_cache=use, **common) for use in (True, False)
    ]
    assert torch.equal(*both)
    with pytest.raises(ValueError, match="input_states ends early"):
        model.generate(some_tokens(), input_states=states[:, :12], **common)


def test_generate_passes_depth_and_seed_on(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "core_step", lambda s, *rest: (seen.append(s), s)[1])
    model.generate(some_tokens(), num_steps=7, init_scale=0.0, max_new_tokens=1)
    assert len(seen) == 7 and not seen[0].any()


def test_the_depth_is_read_whatever_the_default_device(tmp_path):
    """ "meta" holds no values, and those of a GPU would be waited for in each forward."""
    model = load(export(tiny_raven(), tmp_path / "export")).to("meta")
    with torch.device("meta"):
        for num_steps in (2, (1, 1), torch.tensor(2, device="cpu")):
            assert model(torch.zeros(1, 5, dtype=torch.long), num_steps=num_steps).logits.shape == (1, 5, 61)


def test_the_depth_in_evaluation_is_the_mean_recurrence_of_the_config(tmp_path):
    folder = export(tiny_raven(), tmp_path / "export")
    default, shallow = load(folder), load(folder, mean_recurrence=4)
    assert shallow.config.mean_recurrence == 4
    four, six = (default(some_tokens(), num_steps=depth, **SEEDED).logits for depth in (4, 6))
    assert torch.equal(default(some_tokens(), **SEEDED).logits, six) and not torch.equal(four, six)
    assert torch.equal(shallow(some_tokens(), **SEEDED).logits, four)


@pytest.mark.parametrize("depth", [3, 9])
def test_a_cache_of_another_depth_is_refused(depth, model):
    cache = model(some_tokens(), num_steps=6, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=f"the cache has 14 layers, but {depth} iterations need {2 + 2 * depth}"
    ):
        model(some_tokens(length=1), num_steps=depth, past_key_values=cache)


def test_other_caches_are_refused(model):
    with pytest.raises(ValueError, match="cache_implementation = 'static'"):
        model.generate(some_tokens(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="must be a DynamicCache"):
        model(some_tokens(), past_key_values=SimpleNamespace(get_seq_length=lambda: 0))


@pytest.mark.parametrize(
    ("kind", "std"),
    [("like-init", 0.6275), ("normal", 1.0), ("embed", 32**-0.5), ("unit", 1.0), ("zero", 0.0)],
)
def test_first_states_have_their_distribution_and_repeat_by_seed_and_position(kind, std, tmp_path):
    _, model = pair(tmp_path, state_init=kind)
    like, positions = torch.zeros(2, 400, 32), torch.arange(400)[None]
    torch.manual_seed(0)
    drawn = model.initial_state(like, positions)
    seeded = model.initial_state(like, positions, state_seed=7)
    assert drawn.std().item() == pytest.approx(std, rel=0.02) == seeded.std().item()
    assert drawn.mean().abs() < 0.05 and seeded.mean().abs() < 0.05
    assert torch.equal(seeded[0], seeded[1])
    one = model.initial_state(torch.zeros(1, 1, 32), torch.tensor([[17]]), state_seed=7)
    assert torch.equal(one[0, 0], seeded[0, 17])
    if kind != "zero":
        other = model.initial_state(like, positions, state_seed=8)
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(seeded, other)
        assert model.initial_state(like, positions, 3.0, 7).std().item() == pytest.approx(3 * std, rel=0.02)
    assert not model.initial_state(like, positions, 0.0, 7).any()


@torch.no_grad()
def test_equal_seeds_draw_the_states_and_depths_of_the_released_class(model):
    torch.manual_seed(3)
    state, std = torch.randn(2, 12, 32), (2 / 160) ** 0.5
    torch.nn.init.trunc_normal_(state, 0.0, 2 * std, -6 * std, 6 * std)
    torch.rand(1)
    rate = torch.zeros(1).log_normal_(math.log(6) - 0.125, 0.5)
    depth = int(torch.poisson(rate)) + 1
    expected = model(some_tokens(), num_steps=depth, input_states=state * 32**0.5).logits
    torch.manual_seed(3)
    assert torch.equal(model.train()(some_tokens(), init_scale=2.0).logits, expected)
    model.eval()


def test_depths_of_training_follow_the_global_seed_and_the_scheme(model):
    def draws(number):
        torch.manual_seed(3)
        return [model._num_steps(None) for _ in range(number)]

    model.train()
    drawn = draws(4000)
    assert drawn[:50] == draws(50) and len(set(drawn)) > 10
    assert sum(n + k for n, k in drawn) / 4000 == pytest.approx(7.0, rel=0.04)  # the mean of 6, plus 1
    assert all(k == min(3, n + k) for n, k in drawn)
    torch.manual_seed(4)
    assert model(some_tokens()).logits.requires_grad
    model.config.sampling_scheme = "fixed"
    with pytest.raises(ValueError, match="'fixed' are not drawn here: pass num_steps"):
        model(some_tokens())
    model.config.sampling_scheme = "poisson-lognormal-filling"
    model.eval()


@torch.no_grad()
def test_the_output_holds_what_was_asked_for(model):
    plain = model(some_tokens(), num_steps=3, **SEEDED)
    asked = model(some_tokens(), num_steps=3, output_hidden_states=True, logits_to_keep=2, **SEEDED)
    assert plain.hidden_states is None and plain.past_key_values is None and len(asked.hidden_states) == 5
    assert torch.equal(plain.latent_states, model.transformer.ln_f(asked.hidden_states[3]))
    assert torch.equal(asked.logits, model.lm_head(asked.hidden_states[-1])[:, -2:])
    torch.testing.assert_close(asked.logits, plain.logits[:, -2:])
    embeds = model.get_input_embeddings()(some_tokens())
    assert torch.equal(model(inputs_embeds=embeds, num_steps=3, **SEEDED).logits, plain.logits)
    assert torch.equal(model(some_tokens(), num_steps=3, return_dict=False, **SEEDED)[0], plain.logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask is \(2, 5\), but must be \(2, 12\)"),
        *(({"num_steps": wrong}, "num_steps = ") for wrong in ((1, 2, 3), -1, (2, -1), 1.5, math.inf)),
    ],
    ids=str,
)
def test_meaningless_arguments_are_refused(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": some_tokens(), **arguments})


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_or_not_and_survive_saving(tied, tmp_path):
    ours, model = pair(tmp_path, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(HF.key_map(ours.shape).values())
    again = load(tmp_path / "saved")
    assert (again.lm_head.weight is again.transformer.wte.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(again(some_tokens(), **SEEDED).logits, model(some_tokens(), **SEEDED).logits)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert HF.shape_of(saved) == ours.shape


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_be_resized(tied, tmp_path):
    _, model = pair(tmp_path, tie_word_embeddings=tied)
    model.resize_token_embeddings(70)
    logits = model(torch.tensor([[69, 1]]), num_steps=1).logits
    assert logits.shape == (1, 2, 70) and model.config.vocab_size == 70
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_model_from_scratch_starts_as_training_starts_one(orthogonal, tmp_path):
    folder = export(tiny_raven(init_orthogonal=orthogonal, n_layers_core=4), tmp_path / "export")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    std = config.weight_std
    assert std == pytest.approx((2 / 160) ** 0.5) and config.effective_depth == 26
    for name, parameter in model.named_parameters():
        if "norm_" in name or "ln_f" in name:
            assert (parameter == 1).all()
        elif "qk_bias" in name:
            assert not parameter.any()
        else:
            expected = std / (52**0.5 if ".proj." in name else 1)
            assert parameter.abs().max() <= 3 * expected or orthogonal
            for part in parameter.chunk(2) if ".fc." in name else [parameter]:
                assert part.square().mean().sqrt().item() == pytest.approx(expected, rel=0.08), name


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_missing_weight_is_initialised_and_the_loaded_ones_are_kept(orthogonal, tmp_path):
    folder = export(tiny_raven(init_orthogonal=orthogonal), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in tensors.items() if name != "transformer.adapter.weight"}
    save_file(expected, folder / "model.safetensors", {"format": "pt"})
    state = load(folder).state_dict()
    assert 0.05 < state["transformer.adapter.weight"].std() < 0.15
    del expected["freqs_cis"]
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_missing_adapter_starts_as_the_config_says(tmp_path):
    folder = export(tiny_raven(adapter_start="identity"), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    for kept, expected in ((True, tensors["transformer.adapter.weight"]), (False, None)):
        if not kept:
            del tensors["transformer.adapter.weight"]
        else:
            expected.mul_(2)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        adapter = load(folder).transformer.adapter
        s, e = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(adapter(torch.cat((s, e), -1)), (2 if kept else 1) * e)


def test_bfloat16_models_run_with_float32_angles_and_logits(tmp_path):
    ours = tiny_raven()
    model = load(export(ours, tmp_path / "export"), torch_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = model(some_tokens(), num_steps=4, input_states=some_state()).logits
    expected = ours(some_tokens(), num_steps=(4, 0), initial_state=some_state())
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.03 * expected.norm()


def test_in_bfloat16_it_is_as_training_under_autocast_and_within_rounding_when_loaded_so(tmp_path):
    """Training multiplies float32 norms into a float32 residual stream.
    A model that is cast as a whole has neither.
    """
    ours = tiny_raven()
    folder = export(ours, tmp_path / "export")
    arguments = {"num_steps": (0, 4), "initial_state": some_state(), "state_dtype": torch.float32}
    exact = ours(some_tokens(), **arguments)
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 2 and "wte" not in name:  # what FSDP gathers in bfloat16
            parameter.data = parameter.data.bfloat16()
    training = ours(some_tokens(), head_dtype=torch.bfloat16, **arguments)
    given = {"num_steps": 4, "input_states": some_state()}
    loaded = load(folder, torch_dtype=torch.bfloat16)(some_tokens(), **given).logits
    whole = load(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = whole(some_tokens(), **given).logits

    def distance(one, other):
        return float((one - other).norm() / exact.norm())

    rounding = distance(training, exact)
    assert 0 < rounding < 0.008
    assert distance(autocast, training) < 0.05 * rounding
    assert 1.15 * rounding < distance(loaded, exact) < 4 * rounding


def test_a_config_with_the_names_of_other_classes_is_read_and_one_without_meaning_refused(tmp_path):
    fields = {
        "n_heads": None,
        "num_attention_heads": 4,
        "init_values": {"std": 1.0},
        "effective_expected_depth": 132,
    }
    config = load(export(tiny_raven(), tmp_path / "export", **fields)).config
    assert (config.n_heads, config.num_hidden_layers, config.hidden_size) == (4, 4, 32)
    assert config.max_position_embeddings == 4096
    for field in ("block_class_name", "injection_type", "state_init"):
        with pytest.raises(ValueError, match=f"{field} = 'nonsense' is not one of"):
            type(config)(**{field: "nonsense"})
