"""Fewer heads of keys than of queries: what a GPU's kernel takes, and that it computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan_rd.model_spec import AttentionShape
from torchtitan_rd.model_steps import grouped_attention, heads_for_kernel
from torchtitan_rd.models import attention
from torchtitan_rd.models.attention import Backend
from torchtitan_rd.planning.trace import gpu_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MASKS = (None, torch.bool, torch.float32)


def some_heads(dtype=torch.float32, device=CPU, length=48):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, 16, generator=generator).to(device, dtype) for heads in (8, 2, 2)]


def some_mask(kind, q):
    """Each position sees itself and some of those before it; None: all of those before it."""
    length = q.shape[2]
    seen = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(1)) < 0.5
    seen = (seen.tril() | torch.eye(length, dtype=torch.bool)).to(q.device)
    biases = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    return {None: None, torch.bool: seen, torch.float32: biases}[kind]


class OnGPU(torch.Tensor):
    """A tensor on the CPU that says it is not there, which torch cannot do for a device that is not there."""

    is_cpu = False


@pytest.mark.parametrize("kind", MASKS, ids=str)
def test_on_the_cpu_it_is_torchs_own_attention_of_groups_bit_by_bit(kind):
    q, k, v = some_heads()
    mask = some_mask(kind, q)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    assert torch.equal(grouped_attention(q, k, v, mask, causal=mask is None), expected)
    kept = heads_for_kernel(q, k, v, mask)
    assert kept[0] is k and kept[1] is v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS, ids=str)
def test_elsewhere_keys_are_copied_for_each_query_head_where_no_kernel_takes_groups(kind, dtype, monkeypatch):
    """By what torch is handed, and by the output and the gradients against its own attention of groups."""
    q, k, v = some_heads(dtype)
    mask = some_mask(kind, q)
    handed = []
    original = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        handed.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return original(q.as_subclass(torch.Tensor), k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    found = grouped_attention(leaves[0].as_subclass(OnGPU), *leaves[1:], mask, causal=mask is None)
    copied = kind is not None or dtype == torch.float32
    assert handed == [(8, 8, False) if copied else (2, 2, True)]

    others = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = original(*others, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(expected, others, weight), strict=True
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in pairs:
        assert one.shape == other.shape
        assert float((one - other).detach().float().norm() / other.detach().float().norm()) < tolerance


def test_a_plan_counts_the_copies_that_a_gpu_needs():
    with FakeTensorMode(), gpu_kernels():
        q, k, v = (torch.empty(1, heads, 8, 4) for heads in (8, 2, 2))
        assert [t.shape[1] for t in heads_for_kernel(q, k, v, None)] == [8, 8]
        q, k, v = (t.bfloat16() for t in (q, k, v))
        assert [t.shape[1] for t in heads_for_kernel(q, k, v, None)] == [2, 2]


def test_the_probe_draws_heads_that_are_strided_as_in_training(monkeypatch):
    seen = []
    original = attention.attend

    def watched(q, k, v, mask):
        seen.append([t.stride() for t in (q, k, v)])
        return original(q, k, v, mask)

    monkeypatch.setattr(attention, "attend", watched)
    attention.probe(Backend("sdpa", ""), AttentionShape(4, 2, 16), CPU, torch.float32, False)
    row = (4 + 2 + 2) * 16
    assert seen == [[(256 * row, 16, row, 1)] * 3]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (None, torch.float32),
        *((kind, dtype) for kind in MASKS[1:] for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_no_grouped_attention_needs_plain_math_on_the_gpu(kind, dtype):
    q, k, v = some_heads(dtype, CUDA, length=256)
    mask = some_mask(kind, q)
    fused = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ]
    with sdpa_kernel(fused):  # raises where none of them takes it
        found = grouped_attention(q, k, v, mask, causal=mask is None)
    assert attention._sdpa_kernel(q, k, v, mask) != SDPBackend.MATH.name
    inputs = [t.float().cpu() for t in (q, k, v)]
    expected = grouped_attention(*inputs, some_mask(kind, inputs[0]), causal=mask is None)
    assert float((found.float().cpu() - expected).norm() / expected.norm()) < 2e-2
