"""models/attention.py: choice, probe and masks."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import (
    SDPBackend,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from tests.models.tiny import some_tokens, tiny_llama
from tests.ranks import run_on_ranks
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models import attention
from torchtitan_rd.models.attention import AttentionShape, Backend, choose_backend, probe, setup_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(4, 2, 16)
TINY_DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 7 + [2] * 14], dtype=torch.int32)


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a GPU of a compute capability, with some FlashAttention modules installed."""

    def pretend(capability: int, *modules: str) -> None:
        monkeypatch.setattr(attention, "_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_installed", lambda module: module in modules)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {capability}.0")

    return pretend


FA3, FA4 = "flash_attn_interface", "flash_attn.cute.interface"


@pytest.mark.parametrize(
    ("capability", "modules", "dtype", "name", "reason"),
    [
        (9, (FA3, FA4), torch.bfloat16, "fa3", "Hopper"),
        (9, (FA4,), torch.bfloat16, "sdpa", "FA3 is not installed"),
        (9, (FA3,), torch.float32, "sdpa", "not torch.float32"),
        (10, (FA3, FA4), torch.bfloat16, "fa4", "Blackwell"),
        (10, (FA3,), torch.bfloat16, "sdpa", "FA4 is not installed"),
        (8, (FA3, FA4), torch.bfloat16, "sdpa", "GPU 8.0"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_is_there_and_says_why(
    machine, capability, modules, dtype, name, reason
):
    machine(capability, *modules)
    chosen = choose_backend("auto", CUDA, dtype, document_mask=False)
    assert chosen.name == name and reason in chosen.reason


def test_auto_on_cpu_is_sdpa():
    assert choose_backend("auto", CPU, torch.float32, document_mask=False).name == "sdpa"


@pytest.mark.parametrize(
    ("requested", "device", "capability", "modules", "dtype", "message"),
    [
        ("fa3", CPU, 0, (), torch.bfloat16, "FA3 needs a Hopper GPU and this is cpu"),
        ("fa4", CPU, 0, (), torch.bfloat16, "FA4 needs a Hopper or Blackwell GPU and this is cpu"),
        ("fa3", CUDA, 8, (FA3,), torch.bfloat16, "FA3 needs a Hopper GPU and this is GPU 8.0"),
        ("fa3", CUDA, 9, (), torch.bfloat16, "build it from the `hopper` folder"),
        ("fa4", CUDA, 10, (), torch.bfloat16, r"pip install 'torchtitan_rd\[fa4\]'"),
        ("fa3", CUDA, 9, (FA3,), torch.float32, "set training.mixed_precision_param"),
        ("flex", CPU, 0, (), torch.float32, "'flex' trains on CUDA only"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_with_a_remedy(
    machine, requested, device, capability, modules, dtype, message
):
    machine(capability, *modules)
    for document_mask in (False, True):
        with pytest.raises(ConfigError, match=message):
            choose_backend(requested, device, dtype, document_mask)


def test_the_document_mask_takes_flex_on_cuda_and_nothing_else(machine):
    machine(9, FA3, FA4)
    assert choose_backend("auto", CUDA, torch.bfloat16, document_mask=True).name == "flex"
    assert choose_backend("flex", CUDA, torch.bfloat16, document_mask=True).name == "flex"
    for requested in ("sdpa", "fa3", "fa4"):
        with pytest.raises(ConfigError, match="document_mask needs flex attention"):
            choose_backend(requested, CUDA, torch.bfloat16, document_mask=True)


def test_an_installed_module_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "some_flash" / "cute").mkdir(parents=True)
    (tmp_path / "some_flash" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_flash" / "cute" / "interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert attention._installed("some_flash") and attention._installed("some_flash.cute.interface")
    assert not attention._installed("some_flash.cute.other") and not attention._installed("some_flash_3")


def test_an_installed_flash_attention_that_does_not_load_is_named(monkeypatch):
    def broken(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", broken)
    with pytest.raises(ConfigError, match="fa3 is installed but does not load: FA3: undefined symbol"):
        attention.activate(Backend("fa3", "test"))


def test_an_active_flash_attention_is_not_outranked_by_cudnn(monkeypatch):
    activated = []
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        attention.activate(Backend("fa4", "test"))
        assert activated == ["FA4"] and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Installed:
    """Stands for an installed FlashAttention 3: torch's registry activates and restores it as
    it does a real one.
    """

    def __init__(self, load_error: Exception | None = None):
        self.load_error, self.removed = load_error, 0

    def register(self) -> "Installed":
        if self.load_error:
            raise self.load_error
        return self

    def remove(self) -> None:
        self.removed += 1


@pytest.fixture
def install(monkeypatch):
    """Installs a stand-in for FlashAttention 3, which `auto` then prefers; leaves torch as it was."""
    registered = torch.nn.attention._registry._FLASH_ATTENTION_IMPLS["FA3"]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(attention, "choose_backend", lambda *arguments: Backend("fa3", "preferred"))

    def install(stand_in: Installed) -> Installed:
        register_flash_attention_impl("FA3", register_fn=stand_in.register)
        return stand_in

    yield install
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    register_flash_attention_impl("FA3", register_fn=registered)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def break_attention_while_fa3_is_active(monkeypatch):
    right = attention.attend

    def attend(q, k, v, mask):
        return right(q, k, v, mask) * (1.1 if current_flash_attention_impl() == "FA3" else 1.0)

    monkeypatch.setattr(attention, "attend", attend)


BROKEN = {
    "does not load": (
        ImportError("undefined symbol"),
        "fa3 is installed but does not load: undefined symbol",
    ),
    "another package": (
        AttributeError("no attribute 'cute'"),
        "fa3 is installed but does not load: no attribute",
    ),
    "wrong numbers": (None, "is wrong: relative errors output 1.00e-01"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_auto_warns_and_takes_sdpa_where_an_installed_flash_attention_is_broken(
    kind, install, monkeypatch, caplog
):
    load_error, message = BROKEN[kind]
    installed = install(Installed(load_error))
    break_attention_while_fa3_is_active(monkeypatch)
    with caplog.at_level(logging.INFO, "torchtitan_rd"):
        backend = setup_attention("auto", SHAPE, CPU, torch.float32, document_mask=False)
    assert backend.name == "sdpa" and "fa3 is installed but broken" in backend.reason
    warning, choice = caplog.records
    assert warning.levelname == "WARNING" and message in warning.getMessage()
    assert choice.getMessage().startswith("attention: sdpa (auto: fa3 is installed but broken")
    assert current_flash_attention_impl() is None and installed.removed == (load_error is None)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "switched off for fa3 alone"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_flash_attention_that_is_asked_for_by_name_is_refused(kind, install, monkeypatch):
    load_error, message = BROKEN[kind]
    install(Installed(load_error))
    break_attention_while_fa3_is_active(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        setup_attention("fa3", SHAPE, CPU, torch.float32, document_mask=False)


def always_wrong(q, k, v, mask):
    return 1.1 * F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_what_auto_falls_back_to_is_probed_too(install, monkeypatch):
    install(Installed(ImportError("undefined symbol")))
    monkeypatch.setattr(attention, "attend", always_wrong)
    with pytest.raises(ConfigError, match=r"sdpa on cpu.* is wrong"):
        setup_attention("auto", SHAPE, CPU, torch.float32, document_mask=False)


def test_there_is_nothing_to_fall_back_to_from_sdpa(monkeypatch, caplog):
    monkeypatch.setattr(attention, "attend", always_wrong)
    with pytest.raises(ConfigError, match=r"sdpa on cpu.* is wrong"):
        setup_attention("auto", SHAPE, CPU, torch.float32, document_mask=False)
    assert not caplog.records


def test_auto_stays_with_an_installed_flash_attention_that_works(install, caplog):
    installed = install(Installed())
    assert setup_attention("auto", SHAPE, CPU, torch.float32, document_mask=False).name == "fa3"
    assert current_flash_attention_impl() == "FA3" and installed.removed == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_probe_passes_on_a_right_kernel(document_mask, dtype, kv_heads):
    shape = AttentionShape(4, kv_heads, 16)
    assert probe(Backend("sdpa", ""), shape, CPU, dtype, document_mask) == "FLASH_ATTENTION"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=0.3
        ),
        lambda q, k, v, mask: (
            F.scaled_dot_product_attention(q, k.detach(), v, is_causal=True, enable_gqa=True) + 0 * k.mean()
        ),
        lambda q, k, v, mask: (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) * torch.nan
        ),
    ],
    ids=["not causal", "wrong scale", "wrong dk", "nan"],
)
def test_the_probe_refuses_a_wrong_kernel_with_numbers(monkeypatch, wrong):
    monkeypatch.setattr(attention, "attend", wrong)
    with pytest.raises(
        ConfigError, match=r"sdpa on cpu.* is wrong: relative errors output .*, dk .* exceed 2e-02"
    ):
        probe(Backend("sdpa", ""), SHAPE, CPU, torch.bfloat16, document_mask=False)


def test_the_probe_refuses_a_kernel_without_backward(monkeypatch):
    monkeypatch.setattr(attention, "attend", lambda q, k, v, mask: q.detach())
    with pytest.raises(ConfigError, match="fails: element 0 of tensors does not require grad"):
        probe(Backend("sdpa", ""), SHAPE, CPU, torch.float32, document_mask=False)


def test_the_probe_refuses_an_active_flash_attention_that_sdpa_does_not_take(monkeypatch):
    monkeypatch.setattr(attention, "_sdpa_kernel", lambda *qkvm: "EFFICIENT_ATTENTION")
    with pytest.raises(ConfigError, match=r"fa3 on cpu.* torch takes EFFICIENT_ATTENTION instead"):
        probe(Backend("fa3", ""), SHAPE, CPU, torch.float32, document_mask=False)


def test_setup_logs_the_choice_once_and_leaves_the_random_state_alone(caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "torchtitan_rd"):
        setup_attention("auto", SHAPE, CPU, torch.float32, document_mask=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(caplog.messages) == 1
    assert "sdpa (flex attention has no backward on CPU" in caplog.messages[0]


@pytest.mark.parametrize(("device", "kernel"), [(CUDA, "MATH"), (CUDA, "FLASH_ATTENTION"), (CPU, "MATH")])
def test_a_gpu_that_has_no_fused_kernel_for_the_heads_is_warned_of(
    device, kernel, machine, monkeypatch, caplog
):
    machine(8)
    monkeypatch.setattr(attention, "probe", lambda *_: kernel)
    setup_attention("sdpa", SHAPE, device, torch.bfloat16, document_mask=False)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (device == CUDA and kernel == "MATH")
    assert all("scores of S x S" in line and "head_dim=16" in line for line in warned)


def test_changing_one_document_leaves_the_logits_of_the_others_unchanged():
    model, tokens = tiny_llama(), some_tokens()
    changed = tokens.clone()
    changed[:, :3] = (changed[:, :3] + 1) % 61  # the first three tokens lie in document 0 of both rows
    masked, masked_after = (model(t, TINY_DOCUMENTS) for t in (tokens, changed))
    others = TINY_DOCUMENTS != 0
    assert torch.equal(masked[others], masked_after[others])
    assert not torch.equal(masked[~others], masked_after[~others])
    assert not torch.allclose(model(tokens)[others], model(changed)[others], atol=1e-4)


def test_a_single_document_is_plain_causal_attention():
    model, tokens = tiny_llama(), some_tokens()
    one = torch.zeros(tokens.shape, dtype=torch.int32)
    assert torch.allclose(model(tokens, one), model(tokens), atol=1e-5)


def _block_inputs_under_mixed_precision(rank, world_size):
    """-> dtypes of what a block receives, and the logits of a sharded bfloat16 forward."""
    model = tiny_llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen = []
    forward = model.layers[1].forward

    def spy(x, rotary, mask):
        seen.append((x.dtype, rotary.dtype))
        return forward(x, rotary, mask)

    model.layers[1].forward = spy
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    logits = model(some_tokens(), TINY_DOCUMENTS)
    logits.sum().backward()
    return seen, logits.detach()


def test_fsdp_mixed_precision_leaves_the_rotary_table_exact():
    ((seen, alone),) = run_on_ranks(1, _block_inputs_under_mixed_precision)
    results = run_on_ranks(2, _block_inputs_under_mixed_precision)
    assert seen == [(torch.bfloat16, torch.complex64)]
    assert all(torch.equal(logits, alone) and dtypes == seen for dtypes, logits in results)


@pytest.mark.gpu
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_automatic_choice_passes_its_probe_on_the_gpu(document_mask, dtype):
    setup_attention("auto", AttentionShape(8, 2, 64), CUDA, dtype, document_mask)


@pytest.fixture
def backend_is_undone(monkeypatch):
    monkeypatch.setattr(attention, "_flex_without_documents", False)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    attention._deactivate(cudnn)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "sdpa"),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("sdpa", "fa3", "fa4", "flex")),
    ],
)
def test_each_backend_has_the_gradients_of_float32_on_the_cpu(device, name, backend_is_undone):
    """In bfloat16, with grouped heads; skips a FlashAttention that is not to be had here."""
    try:
        backend = choose_backend(name, torch.device(device), torch.bfloat16, document_mask=False)
    except ConfigError as obstacle:
        pytest.skip(str(obstacle))
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = (torch.randn(2, heads, 256, 64, generator=generator).bfloat16() for heads in (8, 2, 2, 8))
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    expected = with_gradients(lambda *qkv: dense(*qkv, causal), *(t.float() for t in (q, k, v, out)))

    attention.activate(backend)
    mask = attention.build_mask(torch.zeros(2, 256, dtype=torch.int64, device=device), None)
    kernels = (
        [SDPBackend.FLASH_ATTENTION] if device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    )
    with sdpa_kernel(kernels):
        found = with_gradients(
            lambda *qkv: attention.attend(*qkv, mask), *(t.detach().to(device) for t in (q, k, v, out))
        )
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.float().cpu() - b).norm() < 0.02 * b.norm(), (
            f"{('output', 'dq', 'dk', 'dv')[number]} of {backend}"
        )


def dense(q, k, v, allowed):
    """Attention as its formula says it, each key-value head repeated for its query heads."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def with_gradients(function, q, k, v, out):
    """-> output, dq, dk, dv for the gradient `out` of the output."""
    leaves = [t.requires_grad_() for t in (q, k, v)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, out)]


@pytest.mark.gpu
def test_flex_equals_the_dense_mask_on_the_gpu():
    model, tokens = tiny_llama(dim=64), some_tokens()
    expected = model(tokens, TINY_DOCUMENTS)
    found = model.to("cuda")(tokens.to("cuda"), TINY_DOCUMENTS.to("cuda"))
    assert torch.allclose(found.cpu(), expected, atol=1e-2)
