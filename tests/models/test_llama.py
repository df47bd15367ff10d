"""models/llama/model.py and models/layers.py: the mathematics, the initial weights and the cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import initialise, some_tokens, tiny_config, tiny_llama
from torchtitan_rd.models.layers import RMSNorm, RopeScaling, Rotary, apply_rotary
from torchtitan_rd.models.llama.init import inits
from torchtitan_rd.models.llama.model import Llama
from torchtitan_rd.models.llama.shape import count_flops


def test_a_later_token_never_changes_earlier_logits():
    model, tokens = tiny_llama(), some_tokens()
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_a_model_built_on_meta_and_poisoned_equals_one_built_directly():
    config = tiny_config(rope_scaling=RopeScaling())
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_buffers("cpu")
    initialise(model)
    assert torch.equal(model(some_tokens()), tiny_llama(rope_scaling=RopeScaling())(some_tokens()))


def test_every_buffer_is_filled_by_init_buffers_and_none_is_saved():
    with torch.device("meta"):
        model = Llama(tiny_config())
    model.to_empty(device="cpu").init_buffers("cpu")
    expected = dict(Llama(tiny_config()).named_buffers())
    assert {name: b.tolist() for name, b in model.named_buffers()} == {
        n: b.tolist() for n, b in expected.items()
    }
    assert set(model.state_dict()) == set(dict(model.named_parameters()))


def test_a_bfloat16_model_keeps_float32_angles_and_logits():
    model = tiny_llama().to(torch.bfloat16)
    assert model.rotary.inv_freq.equal(Rotary(8, 500_000.0).inv_freq)
    assert model.rotary(10).dtype == torch.complex64
    assert model(some_tokens()).dtype == torch.float32


def test_rotary_scores_depend_only_on_the_distance():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    both = torch.stack((q, k)).unflatten(-1, (4, 2)).expand(1, 64, 2, 4, 2)
    turned = apply_rotary(both, Rotary(8, 10_000.0)(64))[0]
    scores = turned[:, 0] @ turned[:, 1].T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-5)
    assert torch.equal(turned[0], torch.stack((q, k)))


def test_rotary_turns_pair_i_by_position_times_theta_to_the_minus_2i_over_d():
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 2, 2).expand(1, 6, 1, 2, 2)
    turned = apply_rotary(x, Rotary(4, 100.0)(6))[0, 5, 0]
    expected = [math.cos(5), math.sin(5), math.cos(0.5), math.sin(0.5)]
    assert torch.allclose(turned, torch.tensor(expected), atol=1e-6)


def test_rope_scaling_keeps_fast_waves_slows_slow_ones_and_blends_between():
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    turns = torch.tensor([100.0, 4.0, 2.5, 1.0, 0.1])  # in the original context
    kept = scaling.apply(turns * 2 * math.pi / 8192) / (turns * 2 * math.pi / 8192)
    assert torch.allclose(kept, torch.tensor([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_on_cpu_equals_torchs_in_value_and_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 3, 5, 16, generator=generator).to(dtype).unbind()
    results = []
    for cls in (RMSNorm, nn.RMSNorm):
        norm = cls(16, eps=1e-5, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2.0, 16))
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, norm.weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_norm_with_a_wider_weight_rounds_once_after_it(compiled):
    """On CPU in eager mode, and as torch has it elsewhere."""
    norm = RMSNorm(32, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data += 0.2 * torch.randn(32, generator=generator)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch._dynamo.reset()
    found = (torch.compile(norm, backend="eager") if compiled else norm)(x)
    assert found.dtype == torch.bfloat16
    # A rounding before the weight would move about a third of them.
    assert (found != wide.bfloat16()).double().mean() < 0.01


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm", "np_layernorm"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_unique_parameter_has_one_initialiser_that_fills_it(norm_type, tied):
    model = Llama(tiny_config(norm_type=norm_type, tie_word_embeddings=tied))
    assert set(inits(model)) == set(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    assert all(parameter.isfinite().all() for parameter in initialise(model).parameters())
    assert model(some_tokens()).isfinite().all()


@pytest.mark.parametrize(("depth_init", "depths"), [(True, (1, 2)), (False, (2, 2))])
def test_initial_weights_have_the_documented_spread(depth_init, depths):
    shape = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 512, "vocab_size": 512}
    state = tiny_llama(**shape, depth_init=depth_init).state_dict()
    # a normal cut at 3 std has 0.9866 of its std.
    expected = {"tok_embeddings": 1.0, "output": 256**-0.5 * 0.9866}
    for layer, depth in enumerate(depths):
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"):
            expected[f"layers.{layer}.{name}"] = 0.02
        for name in ("attention.wo", "feed_forward.w2", "feed_forward.w3"):
            expected[f"layers.{layer}.{name}"] = 0.02 / math.sqrt(2 * depth)
    for name, std in expected.items():
        assert float(state.pop(f"{name}.weight").std()) == pytest.approx(std, rel=0.02), name
    assert all(norm.eq(1).all() for norm in state.values())


def test_the_head_is_cut_at_three_standard_deviations():
    model = tiny_llama(dim=256, vocab_size=4096)
    assert 2.9 < model.output.weight.abs().max() * 16 <= 3.0


def test_a_tied_head_is_the_embedding_and_starts_near_the_uniform_loss():
    model = tiny_llama(dim=256, vocab_size=512, tie_word_embeddings=True)
    assert model.output.weight is model.tok_embeddings.weight
    tokens = some_tokens(vocab_size=512, length=64)
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(512)) < 0.5


@pytest.mark.parametrize("fields", [{"n_kv_heads": 4}, {}, {"tie_word_embeddings": True}, {"head_dim": 16}])
def test_the_flop_formula_equals_what_torch_counts(fields):
    config, batch, length = tiny_config(**fields), 3, 16
    model = Llama(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(batch, length)).sum().backward()
    flops = count_flops(config, length)
    assert counter.get_total_flops() == batch * length * (flops.matmul + flops.attention_full)
    assert flops.attention_causal * 2 * length == flops.attention_full * (length + 1)


def test_a_training_step_of_eight_layers_takes_at_most_1493_aten_ops():
    class Count(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops += 1
            return func(*args, **(kwargs or {}))

    model, tokens = tiny_llama(n_layers=8), some_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for counter in (Count(), Count()):  # the second step is the steady one
        with counter:
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert counter.ops <= 1493
