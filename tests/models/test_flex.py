"""Flex attention through the models, against the dense mask, with and without activation checkpointing.

Torch refuses flex attention's backward on CPU, though its eager form has one; these tests allow it.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tests.models.raven.tiny import some_state, tiny_raven
from tests.models.tiny import some_tokens, tiny_llama
from torchtitan_rd.models import attention
from torchtitan_rd.models.llama.plan import wrap_plan as llama_plan
from torchtitan_rd.models.raven.plan import wrap_plan as raven_plan
from torchtitan_rd.parallelism.activation_checkpoint import (
    ActivationCheckpointConfig,
    apply_activation_checkpointing,
    checkpoint_regions,
)
from torchtitan_rd.parallelism.compile import CompileConfig, apply_compile

LENGTH = 24
CHECKPOINTING = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
}


def gradients(
    kind: str, ac: str, documents: torch.Tensor, compiled: bool = False, *, device: str = "cpu", dim: int = 32
) -> dict[str, torch.Tensor]:
    """Of the mean square of the logits of a tiny model, wrapped as training wraps it."""
    model = tiny_raven(dim=dim) if kind == "raven" else tiny_llama(dim=dim)
    plan = raven_plan(model) if kind == "raven" else llama_plan(model)
    config = ActivationCheckpointConfig(**CHECKPOINTING[ac])
    regions = [model.get_submodule(name) for name in checkpoint_regions(plan, config)]
    apply_activation_checkpointing(regions, config)
    compile_config = CompileConfig(enable=compiled, backend="eager" if device == "cpu" else "inductor")
    apply_compile({name: model.get_submodule(name) for name in plan.blocks}, compile_config)
    model.to(device).rotary.init_buffers(device)
    state = some_state(2, LENGTH, dim).to(device)
    recurrent = {"num_steps": (1, 2), "initial_state": state} if kind == "raven" else {}
    model(some_tokens(2, LENGTH).to(device), documents.to(device), **recurrent).square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """-> counts of calls; document masks are BlockMasks here too, and the compiled graphs run eagerly."""
    calls = Counter()

    def counted(function):
        compiled = torch.compile(function, backend="eager")

        def call(*args, block_mask, **kwargs):
            assert isinstance(block_mask, BlockMask)
            calls["flex"] += 1
            return compiled(*args, block_mask=block_mask, **kwargs)

        return call

    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "_visible", attention._document_block_mask)
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    monkeypatch.setattr(attention, "_compiled_flex", counted)
    return calls


def documents(number: int) -> torch.Tensor:
    """Ids of two rows, that differ from number to number."""
    borders = torch.tensor([[3 + number], [17 - number]])
    return (torch.arange(LENGTH) >= borders).to(torch.int32)


WAYS = [
    (kind, ac, compiled) for kind in ("llama", "raven") for ac in CHECKPOINTING for compiled in (False, True)
]
BY_DAY = {("llama", "none", True), ("llama", "op", False), ("raven", "full", True), ("raven", "op", False)}


@pytest.mark.parametrize(
    ("kind", "ac", "compiled"),
    [pytest.param(*way, marks=[] if way in BY_DAY else pytest.mark.slow) for way in WAYS],
)
def test_flex_attention_has_the_gradients_of_the_dense_mask(kind, ac, compiled, request):
    expected = [gradients(kind, "none", documents(number)) for number in range(2)]
    calls = request.getfixturevalue("flex_on_cpu")
    for number, dense in enumerate(expected):
        found = gradients(kind, ac, documents(number), compiled)
        for name, gradient in dense.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert any(not torch.allclose(expected[0][name], expected[1][name], atol=1e-4) for name in expected[0])
    assert bool(calls["flex"]) != compiled, "a compiled block takes flex attention in"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ac", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "raven"])
def test_flex_attention_on_the_gpu_has_the_gradients_of_the_dense_mask_on_the_cpu(kind, ac, compiled):
    """Triton's kernels, forward and backward; they need heads of 16."""
    for number in range(2):
        expected = gradients(kind, "none", documents(number), dim=64)
        found = gradients(kind, ac, documents(number), compiled, device="cuda", dim=64)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 2e-3 * gradient.norm() + 1e-6, name


executed = []


@torch.library.custom_op("torchtitan_rd_tests::count_execution", mutates_args=())
def count_execution(x: torch.Tensor) -> torch.Tensor:
    """x, and a mark for each time that it really runs, however it was compiled."""
    executed.append(1)
    return x.clone()


count_execution.register_fake(torch.empty_like)
count_execution.register_autograd(lambda context, gradient: gradient)


def stand_in(q, k, v, block_mask=None, enable_gqa=False):
    """For flex attention, whose backward inductor cannot build on CPU; one plain document."""
    return F.scaled_dot_product_attention(count_execution(q), k, v, is_causal=True, enable_gqa=enable_gqa)


@pytest.mark.slow
@pytest.mark.parametrize(("ac", "runs"), [("none", 1), ("op", 1), ("full", 2)])
def test_selective_checkpointing_keeps_what_compiled_flex_attention_gave(ac, runs, monkeypatch):
    """Inductor's kernel of an eager block is invisible to checkpointing but for the option that
    attention.py sets.
    """
    one = torch.zeros(2, LENGTH, dtype=torch.int32)
    expected = gradients("llama", "none", one)
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    monkeypatch.setattr(attention, "_visible", attention._document_block_mask)
    monkeypatch.setattr(attention, "flex_attention", stand_in)
    executed.clear()
    found = gradients("llama", ac, one)
    assert len(executed) == 2 * runs  # two layers
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_new_mask_each_step_compiles_nothing(flex_on_cpu):
    torch._dynamo.reset()
    counters.clear()
    seen = []
    for number in range(5):
        gradients("llama", "none", documents(number))
        seen.append(counters["stats"]["unique_graphs"])
    assert 0 < seen[0] == seen[-1]


@pytest.mark.slow
def test_the_compiled_flex_attention_computes_its_mask_forward(monkeypatch):
    """Inductor, with the option, without gradient: what a validation runs."""
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, LENGTH, 16, generator=generator) for _ in range(3))
    mask = attention._document_block_mask(documents(0))
    found = attention._compiled_flex(flex_attention)(q, k, v, block_mask=mask)
    assert torch.allclose(found, attention.attend(q, k, v, attention._visible(documents(0))), atol=1e-5)
