"""Options of raven's attention and blocks against the plain restatement in float64,
and that none acts unless set.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.raven.test_model import Restated
from tests.models.raven.tiny import some_state, some_tokens, tiny_config, tiny_raven
from torchtitan_rd.models.raven.model import BLOCKS, Raven
from torchtitan_rd.models.raven.shape import count_flops

OPTIONS = {
    "plain": {"qk_bias": False},
    "bias": {},
    "clip": {"clip_qkv": 0.1, "qk_bias": False},
    "norm": {"qk_norm": True, "qk_bias": False},
    "all": {"clip_qkv": 0.1, "qk_norm": True},
}
KEYS = {"all heads": {}, "grouped keys": {"n_kv_heads": 2}, "one key": {"n_kv_heads": 1}}
CASES = {
    f"{block}, {options}, {keys}": {"block": block, **OPTIONS[options], **KEYS[keys]}
    for block, options, keys in itertools.product(BLOCKS, OPTIONS, KEYS)
}


def logits_and_gradients(case):
    """-> those of the model in float32 and of the restatement in float64."""
    model, tokens, state = tiny_raven(**case), some_tokens(), some_state()
    logits = model(tokens, num_steps=(0, 2), initial_state=state)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    restated = Restated(model.shape, {**leaves, "lm_head.weight": leaves["transformer.wte.weight"]})
    expected = restated.logits(tokens, 2, state.double())
    F.cross_entropy(expected.flatten(0, 1), tokens.flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return (logits, found), (expected, {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_the_restatement(case):
    (logits, gradients), (expected, expected_gradients) = logits_and_gradients(CASES[case])
    assert (logits - expected).norm() <= 1e-6 * expected.norm()
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        difference = (gradient - wanted).abs()
        assert difference.max() <= 1e-6 and difference.norm() <= 1e-5 * wanted.norm(), name


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {"clip_qkv": 0.1}),
        ({}, {"qk_norm": True}),
        ({"qk_bias": False}, {"qk_norm": True}),
        ({"n_kv_heads": 2}, {"qk_norm": True}),
    ],
    ids=str,
)
def test_an_option_changes_the_logits_of_the_same_weights(fields, changed):
    inputs = {"num_steps": (1, 1), "initial_state": some_state()}
    before, after = (tiny_raven(**fields, **more)(some_tokens(), **inputs) for more in ({}, changed))
    assert (before - after).abs().max() > 1e-3


def test_a_bound_that_nothing_reaches_changes_nothing():
    inputs = {"num_steps": (1, 1), "initial_state": some_state()}
    free, bounded = (tiny_raven(clip_qkv=bound)(some_tokens(), **inputs) for bound in (None, 1e6))
    assert torch.equal(free, bounded)


@torch.no_grad()
def test_the_bias_of_a_key_is_its_query_heads_own_and_without_biases_grouped_keys_are_the_kernels():
    model, inputs = tiny_raven(n_kv_heads=2), {"num_steps": (0, 1), "initial_state": some_state()}
    biases = [p for name, p in model.named_parameters() if name.endswith("qk_bias")]
    assert len(biases) == 4 and all(bias.shape == (2, 1, 4, 8) for bias in biases)
    for bias in biases:
        bias.zero_()
    grouped = Raven(tiny_config(n_kv_heads=2, qk_bias=False))
    grouped.load_state_dict(
        {name: p for name, p in model.state_dict().items() if not name.endswith("qk_bias")}
    )
    copied = model(some_tokens(), **inputs)
    torch.testing.assert_close(copied, grouped(some_tokens(), **inputs), atol=1e-6, rtol=1e-5)
    biases[0][1, 0, 1] += 1.0  # the keys of the second query head of the first group
    assert not torch.allclose(copied, model(some_tokens(), **inputs))


def test_normalised_queries_and_keys_do_not_see_the_scale_of_their_weights():
    model = tiny_raven(qk_norm=True, qk_bias=False)
    inputs = {"num_steps": (0, 1), "initial_state": some_state()}
    before = model(some_tokens(), **inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("Wqkv.weight"):
                parameter[:64] *= 100.0
    assert (before - model(some_tokens(), **inputs)).abs().max() < 1e-3  # eps counts less than this


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def ops_of_attention(**fields) -> list[str]:
    model = tiny_raven(**fields)
    rotary, x = model.rotary(12), some_state()
    with Ops() as ops, torch.no_grad():
        model.transformer.prelude[0].attn(x, rotary, None)
    return [name.removeprefix("aten::") for name in ops.names]


@pytest.mark.parametrize("keys", [{}, {"n_kv_heads": 2, "qk_bias": False}], ids=str)
def test_options_that_are_not_set_cost_no_operation(keys):
    plain = ops_of_attention(**keys)
    assert not {"clamp", "cat", "rsqrt", "index_select", "repeat_interleave"} & set(plain)
    clipped = ops_of_attention(**keys, clip_qkv=8.0)
    assert [name for name in clipped if name != "clamp"] == plain and clipped.count("clamp") == 1
    assert len(ops_of_attention(**keys, qk_norm=True)) > len(plain)


def test_a_compiled_block_with_every_option_computes_the_same():
    model, x = tiny_raven(**CASES["pre, all, grouped keys"]), some_state()
    block, rotary = model.transformer.prelude[0], model.rotary(12)
    expected = block(x, rotary, None)
    torch._dynamo.reset()
    found = torch.compile(block, backend="eager", fullgraph=True)(x, rotary, None)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "all," in case])
def test_the_flop_formula_counts_what_torch_counts(case):
    model, tokens = tiny_raven(**CASES[case]), some_tokens()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, num_steps=(2, 1), initial_state=some_state()).sum().backward()
    flops = count_flops(model.shape, 12, (2, 1))
    assert counter.get_total_flops() == pytest.approx(
        tokens.numel() * (flops.matmul + flops.attention_full), rel=1e-12
    )


def test_qk_norm_and_clip_qkv_have_no_weights_and_a_pre_norm_block_two_norms():
    def names(**fields):
        return [name for name, _ in Raven(tiny_config(**fields)).named_parameters()]

    assert names(qk_norm=True, clip_qkv=1.0) == names()
    assert [name for name in names(block="pre") if "coda.0.norm" in name] == [
        "transformer.coda.0.norm_1.weight",
        "transformer.coda.0.norm_2.weight",
    ]


def test_a_pre_norm_block_never_normalises_the_residual_stream():
    block = tiny_raven(block="pre").transformer.prelude[0]
    model, x = tiny_raven(block="pre"), 100 * some_state()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "proj" in name:
                parameter.zero_()
        assert torch.equal(block(x, model.rotary(12), None), x)
