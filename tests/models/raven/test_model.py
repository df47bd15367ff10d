"""models/raven/model.py, init.py and shape.py: the mathematics of docs/recurrence.md,
its gradients, sizes and cost.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.raven.tiny import RETROFITTED, some_state, some_tokens, tiny_config, tiny_raven
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.raven.init import inits
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.released import NOT_BUILT
from torchtitan_rd.models.raven.shape import INJECTIONS, RAVEN_FLAVORS, count_flops

DRAWS = [(0, 1), (3, 2), (5, 4)]


def released_name(name: str) -> str:
    return name.replace("recurrence.iteration.", "")


class Restated:
    """The model once more, from the page alone: separate projections, real rotary, explicit softmax."""

    def __init__(self, config, state_dict):
        self.shape = config
        self.w = {released_name(name): tensor for name, tensor in state_dict.items()}

    def norm(self, x, name):
        weight = self.w[f"{name}.weight"]
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.shape.norm_eps) * weight

    def rotate(self, x):  # (B, S, H, D)
        half = x.shape[-1] // 2
        speeds = [self.speed(self.shape.rope_theta ** (-i / half)) for i in range(half)]
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor(speeds, dtype=x.dtype)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def speed(self, speed):
        """Llama 3.1: slow waves are divided, fast ones kept, those between mixed by their wave length."""
        scaling = self.shape.rope_scaling
        if scaling is None:
            return speed
        length, context = 2 * math.pi / speed, scaling.original_max_position_embeddings
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if length < context / high:
            return speed
        if length > context / low:
            return speed / scaling.factor
        smooth = (context / length - low) / (high - low)
        return (1 - smooth) * speed / scaling.factor + smooth * speed

    def attention(self, x, name):
        heads, kv_heads, head_dim = self.shape.attention_shape
        rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = ((x @ w.T).unflatten(-1, (-1, head_dim)) for w in self.w[f"{name}.Wqkv.weight"].split(rows))
        if self.shape.clip_qkv is not None:
            bound = torch.tensor(self.shape.clip_qkv, dtype=x.dtype)
            q, k, v = (torch.minimum(torch.maximum(t, -bound), bound) for t in (q, k, v))
        k, v = (torch.stack([t[:, :, h * kv_heads // heads] for h in range(heads)], dim=2) for t in (k, v))
        if self.shape.qk_bias:
            q, k = q + self.w[f"{name}.qk_bias"][0], k + self.w[f"{name}.qk_bias"][1]
        q, k = self.rotate(q), self.rotate(k)
        if self.shape.qk_norm:
            q, k = (t / torch.sqrt((t * t).mean(-1, keepdim=True) + 2.0**-23) for t in (q, k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2) @ self.w[f"{name}.proj.weight"].T

    def mlp(self, x, name):
        gate, up = (x @ w.T for w in self.w[f"{name}.fc.weight"].split(self.shape.ffn_dim))
        return (gate * torch.sigmoid(gate) * up) @ self.w[f"{name}.proj.weight"].T

    def block(self, x, name):
        attn, mlp = f"{name}.attn", f"{name}.mlp"
        if self.shape.block == "post":
            x = self.norm(self.attention(x, attn) + x, f"{name}.norm_1")
            return self.norm(self.mlp(x, mlp) + x, f"{name}.norm_2")
        if self.shape.block == "pre":
            x = self.attention(self.norm(x, f"{name}.norm_1"), attn) + x
            return self.mlp(self.norm(x, f"{name}.norm_2"), mlp) + x
        x = self.norm(self.attention(self.norm(x, f"{name}.norm_1"), attn) + x, f"{name}.norm_2")
        return self.norm(self.mlp(self.norm(x, f"{name}.norm_3"), mlp) + x, f"{name}.norm_4")

    def blocks(self, x, part, number):
        for i in range(number):
            x = self.block(x, f"transformer.{part}.{i}")
        return x

    def embed(self, tokens):
        scale = math.sqrt(self.shape.dim) if self.shape.init_strategy == "takase" else 1.0
        return self.blocks(
            self.w["transformer.wte.weight"][tokens] * scale, "prelude", self.shape.n_layers_prelude
        )

    def iterate(self, s, e):
        injected = {"add": s + e, "gate": s * e, "none": s}
        if self.shape.injection == "linear":
            injected["linear"] = torch.cat((s, e), -1) @ self.w["transformer.adapter.weight"].T
        return self.blocks(injected[self.shape.injection], "core_block", self.shape.n_layers_core)

    def latent(self, s):
        return {"twice": self.norm(s, "transformer.ln_f"), "once": s}[self.shape.final_norm]

    def head(self, s):
        s = self.blocks(self.latent(s), "coda", self.shape.n_layers_coda)
        return self.norm(s, "transformer.ln_f") @ self.w["lm_head.weight"].T

    def logits(self, tokens, steps, state):
        e = self.embed(tokens)
        s = e if self.shape.injection == "none" else state
        for _ in range(steps):
            s = self.iterate(s, e)
        return self.head(s)


VARIANTS = {
    "huginn": {},
    "untied": {"tie_word_embeddings": False},
    "post-norm": {"block": "post", "qk_bias": False, "init_strategy": "scaled"},
    "grouped keys": {"n_kv_heads": 2, "qk_bias": False},
    "retrofitted": RETROFITTED,
    "final norm once": {"final_norm": "once"},
    "no prelude, no coda": {"n_layers_prelude": 0, "n_layers_coda": 0},
    **{f"injection {injection}": {"injection": injection} for injection in INJECTIONS},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_an_independent_restatement_of_the_page(variant):
    model = tiny_raven(**VARIANTS[variant])
    expected = Restated(model.shape, model.state_dict()).logits(some_tokens(), 5, some_state())
    for draw in ((5, 0), (2, 3), (0, 5)):
        logits = model(some_tokens(), num_steps=draw, initial_state=some_state())
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("draw", [*DRAWS, (4, 0), (0, 0)])
def test_truncated_gradients_equal_those_of_the_hand_unrolled_last_iterations(draw):
    model, tokens = tiny_raven(), some_tokens()
    logits = model(tokens, num_steps=draw, initial_state=some_state())
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    restated = Restated(model.shape, {**leaves, "lm_head.weight": leaves["transformer.wte.weight"]})
    e, s = restated.embed(tokens), some_state()
    for _ in range(draw[0]):
        s = restated.iterate(s, e).detach()
    for _ in range(draw[1]):
        s = restated.iterate(s, e)
    F.cross_entropy(restated.head(s).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (leaves[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, leaves[name].grad, atol=1e-6, rtol=1e-4, msg=name)
    reached = any(p.grad is not None for p in model.transformer.recurrence.parameters())
    assert reached == (draw[1] > 0)


def test_parameter_names_are_the_released_ones_but_for_the_loop():
    block = ("attn.Wqkv.weight", "attn.proj.weight", "attn.qk_bias", "mlp.fc.weight", "mlp.proj.weight")
    block = (*block, *(f"norm_{i}.weight" for i in range(1, 5)))
    expected = {f"transformer.{name}.weight" for name in ("wte", "adapter", "ln_f")} | {"lm_head.weight"}
    for part in ("prelude.0", "core_block.0", "core_block.1", "coda.0"):
        expected |= {f"transformer.{part}.{name}" for name in block}
    state = Raven(tiny_config()).state_dict()
    assert {released_name(name) for name in state} == expected and len(state) == len(expected)


def test_a_later_token_never_changes_earlier_logits():
    model, tokens = tiny_raven(), some_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = (model(t, num_steps=(2, 1), initial_state=some_state()) for t in (tokens, changed))
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


def test_documents_do_not_see_each_other():
    model, tokens = tiny_raven(), some_tokens()
    documents = (torch.arange(12) >= 5).int().expand(2, 12)
    joined = model(tokens, documents, num_steps=(2, 1), initial_state=some_state())
    alone = model(tokens[:, 5:], num_steps=(2, 1), initial_state=some_state()[:, 5:])
    # Rotary scores know distances only.
    torch.testing.assert_close(joined[:, 5:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("flavor", "total", "loop"),
    [
        ("nebel-raven-3.5b", 3_564_976_800, 1_637_349_120),
        ("nebel-baseline-3.5b", 3_564_976_800, 1_637_349_120),
        ("deluge-raven-4b", 4_426_421_120, 1_982_520_320),
        # Two norms a block less.
        ("corone-raven-3.5b", 3_564_976_800 - 8 * 2 * 5280, 1_637_349_120 - 4 * 2 * 5280),
        ("debug-demo", 304_000, 271_104),
        # TinyLlama's embedding, head, 16 of its 22 layers of 44_044_288, norm, and an adapter.
        (
            "retrofit-tinyllama-1.1b",
            2 * 32000 * 2048 + 16 * 44_044_288 + 2048 + 2 * 2048**2,
            8 * 44_044_288 + 2 * 2048**2,
        ),
        # Llama-3.2-1B is 1_235_814_400 parameters, 16 layers among them.
        (
            "retrofit-llama-3.2-1b",
            1_235_814_400 - 8 * 60_821_504 + 2 * 2048**2,
            4 * 60_821_504 + 2 * 2048**2,
        ),
    ],
)
def test_flavors_have_their_published_sizes(flavor, total, loop):
    with torch.device("meta"):
        model = Raven(RAVEN_FLAVORS[flavor])
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.transformer.recurrence.parameters()) == loop


def test_the_large_flavor_is_132_layers_deep_and_starts_as_huginn_did():
    config = RAVEN_FLAVORS["nebel-raven-3.5b"]
    assert config.effective_depth == 132
    assert config.weight_std == pytest.approx(0.0087038828)
    assert config.weight_std / math.sqrt(2 * 132) == pytest.approx(0.0005356870)
    assert config.embedding_scale == pytest.approx(72.6636, abs=1e-4)


def filled(**fields) -> dict[str, torch.Tensor]:
    model = Raven(tiny_config(dim=64, ffn_dim=128, **fields))
    for name, fill in inits(model).items():
        parameter = model.get_parameter(name).data.fill_(math.nan)
        fill(parameter, torch.Generator().manual_seed(len(name)))
    return dict(model.named_parameters())


@pytest.mark.parametrize("orthogonal", [False, True])
def test_initial_weights_have_the_documented_spread(orthogonal):
    std, depth = math.sqrt(2 / (5 * 64)), 1 + 2 * 6 + 1
    for name, value in filled(init_orthogonal=orthogonal, tie_word_embeddings=False).items():
        if "norm" in name or "ln_f" in name:
            assert value.eq(1).all()
        elif "qk_bias" in name:
            assert value.eq(0).all()
        else:
            expected = std / math.sqrt(2 * depth) if ".proj." in name else std
            rms = float(value.detach().square().mean().sqrt())
            assert rms == pytest.approx(
                expected * (1 if orthogonal else 0.98658), rel=1e-4 if orthogonal else 0.03
            )
            if not orthogonal:
                assert value.abs().max() <= 3 * expected


@pytest.mark.parametrize("orthogonal", [False, True])
def test_an_adapter_that_starts_as_the_identity_gives_the_embedded_input_whatever_the_state(orthogonal):
    (weight,) = (
        value.detach()
        for name, value in filled(adapter_start="identity", init_orthogonal=orthogonal).items()
        if "adapter" in name
    )
    s, e = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert weight.shape == (64, 128) and torch.equal(torch.cat((s, e), -1) @ weight.T, e)


def test_the_final_norm_is_applied_once_or_twice():
    """A state that is scaled is the same to a norm, and another one without."""
    for kind, alike in (("twice", True), ("once", False)):
        model = tiny_raven(final_norm=kind, norm_eps=1e-12)
        arguments = {"num_steps": (0, 0)}
        one, other = (
            model(some_tokens(), initial_state=factor * some_state(), **arguments) for factor in (1, 3)
        )
        assert torch.allclose(one, other, atol=1e-5) == alike


def test_orthogonal_init_treats_queries_keys_values_gates_and_ups_apart():
    weights = filled(init_orthogonal=True)
    std = math.sqrt(2 / (5 * 64))
    qkv = next(
        value for name, value in weights.items() if name.endswith("prelude.0.attn.Wqkv.weight")
    ).detach()
    for part in qkv.split(64):
        torch.testing.assert_close(part @ part.T, torch.eye(64) * std**2 * 64, atol=1e-5, rtol=0)
    fc = next(value for name, value in weights.items() if name.endswith("prelude.0.mlp.fc.weight")).detach()
    for part in fc.split(128):
        torch.testing.assert_close(part.T @ part, torch.eye(64) * std**2 * 128, atol=1e-5, rtol=0)


def test_a_model_built_on_meta_and_poisoned_equals_one_built_directly():
    with torch.device("meta"):
        model = Raven(tiny_config())
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    direct = tiny_raven()
    model.load_state_dict(direct.state_dict())
    arguments = {"num_steps": (1, 1), "initial_state": some_state()}
    assert torch.equal(model(some_tokens(), **arguments), direct(some_tokens(), **arguments))


def saved_bytes(draw) -> int:
    model, sizes = tiny_raven(), {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(some_tokens(), num_steps=draw, initial_state=some_state())
    assert logits.requires_grad
    return sum(sizes.values())


def test_saved_tensors_are_flat_in_n_and_linear_in_k():
    one, two, three, six = (saved_bytes((4, k)) for k in (1, 2, 3, 6))
    assert two - one == three - two > 0 and six - three == 3 * (two - one)
    assert saved_bytes((1, 2)) == saved_bytes((20, 2)) == two
    assert saved_bytes((0, 0)) == saved_bytes((9, 0))


@pytest.mark.parametrize(
    "variant", ["huginn", "untied", "post-norm", "grouped keys", "injection gate", "retrofitted"]
)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_flop_formula_equals_what_torch_counts(variant, draw):
    model, tokens = tiny_raven(**VARIANTS[variant]), some_tokens()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, num_steps=draw, initial_state=some_state()).sum().backward()
    flops = count_flops(model.shape, 12, draw)
    assert counter.get_total_flops() == pytest.approx(
        tokens.numel() * (flops.matmul + flops.attention_full), rel=1e-12
    )
    assert flops.attention_causal * 2 * 12 == pytest.approx(flops.attention_full * 13)


def test_an_iteration_costs_two_flops_a_weight_without_and_six_with_gradient():
    config = tiny_config()
    core = sum(p.numel() for p in Raven(config).transformer.recurrence.iteration.parameters() if p.ndim == 2)
    base, more_n, more_k = (count_flops(config, 12, draw).matmul for draw in ((4, 2), (5, 2), (4, 3)))
    assert (more_n - base, more_k - base) == (pytest.approx(2 * core), pytest.approx(6 * core))
    assert count_flops(config, 12) == count_flops(config, 12, (3, 3))


def test_a_training_step_of_the_reference_shape_takes_at_most_6110_aten_ops():
    class Count(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops += 1
            return func(*args, **(kwargs or {}))

    fields = {"n_layers_prelude": 2, "n_layers_core": 4, "n_layers_coda": 2}
    model, tokens = tiny_raven(**fields), some_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for counter in (Count(), Count()):  # the second step is the steady one
        with counter:
            logits = model(tokens, num_steps=(4, 4), initial_state=some_state())
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert counter.ops <= 6110


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"injection": "linaer"}, "did you mean 'linear'"),
        ({"state_init": "zeros"}, "did you mean 'zero'"),
        ({"sampling_scheme": "poisson"}, "did you mean 'poisson-fill'"),
        ({"n_layers_prelude": -1}, "n_layers_prelude = -1 must be at least 0"),
        ({"n_layers_core": 0}, "n_layers_core = 0 must be at least 1"),
        ({"dim": 250}, "dim = 250 must be an even multiple of n_heads = 16"),
        ({"n_kv_heads": 3}, "not divisible by n_kv_heads = 3"),
        ({"head_dim": 15}, "head_dim = 15 must be even"),
        ({"final_norm": "thrice"}, "final_norm = 'thrice' is unknown"),
        ({"adapter_start": "identitty", "injection": "linear"}, "did you mean 'identity'"),
        ({"adapter_start": "identity"}, "needs injection = \"linear\": there is no adapter with 'add'"),
        ({"rope_scaling": {"factr": 2.0}}, "model.overrides.rope_scaling"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be positive"),
        ({"block": "swin"}, "'sandwich', 'post' or 'pre'"),
        ({"clip_qkv": 0}, "clip_qkv = 0.0 must be positive and finite"),
        ({"clip_qkv": "8"}, "model.overrides.clip_qkv = '8': Input should be a valid number"),
        ({"qk_norm": 1}, "model.overrides.qk_norm = 1: Input should be a valid boolean"),
        ({"qk_nrom": True}, "did you mean 'qk_norm'"),
        *(({name: 1}, f"model.overrides.{name}: what {name} = ") for name in NOT_BUILT),
        (
            {"norm_class_name": "LayerNorm"},
            "model.overrides.norm_class_name: what norm_class_name = 'RMSNorm_llama'",
        ),
        ({"n_embd": 64}, "model.overrides.n_embd: dim is its name here"),
        ({"block_class_name": "SandwichBlock"}, "block is its name here"),
        ({"padding_multiple": 8}, "set model.vocab_padding_multiple"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(overrides, message):
    with pytest.raises(ConfigError) as raised:
        get_flavor(MODELS["raven"], "debug", overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)
