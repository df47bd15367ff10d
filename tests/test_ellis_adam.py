"""ELLISAdam: the ancestor's numbers, every option against its formula restated,
and sharding that is not seen.
"""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from torchtitan_rd.optimizer import ELLISAdam, OptimizerConfig, build_optimizer, optimizer_state
from torchtitan_rd.optimizer.ellis_adam import EllisKeys

START = [1.0, -2.0, 0.5, 4.0]
GRADS = [[0.1, -0.2, 0.3, 0.0], [0.1, 0.2, -0.3, 0.4], [1.0, 0.0, 0.5, -0.5]]
HUGINN = {"update_clipping": True, "atan_adam": True, "running_init": True}

# Run with the optimizer of Huginn's training program: options, rate, number of updates -> parameters
VECTORS = [
    (HUGINN, 4e-5, 1, [0.999872029, -1.999832034, 0.499891996, 3.999840021]),
    (HUGINN, 4e-5, 3, [0.999750495, -1.999636412, 0.499814272, 3.999509811]),
    ({}, 1e-2, 3, [0.943367004, -1.931730270, 0.471303135, 3.875296354]),
    ({"nesterov": True}, 1e-2, 3, [0.924873471, -1.928026557, 0.463270217, 3.873524904]),
    (
        {"tensor_wise_gradient_normalization": True},
        1e-2,
        3,
        [0.942276597, -1.928422689, 0.470557898, 3.872028828],
    ),
    ({"poly_ema_p": 4.0}, 1e-2, 3, [0.945617914, -1.931872129, 0.471996903, 3.876596212]),
]

OPTIONS = {
    "plain": {},
    "Huginn": HUGINN,
    "clipping alone": {"update_clipping": True},
    "decay by the rate": {"decouple_wd": False},
    "kahan": {"kahan_sum_compensation": True},
    "nesterov": {"nesterov": True},
    "poly": {"poly_ema_p": 4.0},
    "normalized": {"tensor_wise_gradient_normalization": True, "running_init": True},
    "eps inside": {"eps_adjustment": True},
    "finite check": {"tensor_wise_finite_check": True},
    # Without clipping (or running_init) these betas give exactly what the bias corrections give.
    "adafactor": {"adafactor_like_beta_corrections": True, "update_clipping": True},
    "clipped by force": {"brute_force_clip": 0.5, "update_clipping": True},
}


def options_of(**keys):
    return {"lr": 4e-5, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 4e-5, "keys": EllisKeys(**keys)}


def update(optimizer, parameters, gradients, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize(("keys", "lr", "updates", "expected"), VECTORS)
def test_the_ancestors_vectors(keys, lr, updates, expected):
    parameter = nn.Parameter(torch.tensor(START))
    optimizer = ELLISAdam([parameter], **options_of(**keys))
    for gradient in GRADS[:updates]:
        update(optimizer, [parameter], [torch.tensor(gradient)], lr)
    torch.testing.assert_close(parameter.data, torch.tensor(expected), atol=2e-7, rtol=0.0)


def restated(p, grads, lr, k, b1=0.9, b2=0.95, eps=1e-3, wd=4e-5, lr_0=4e-5):
    """Each option as its formula, for one tensor in float64."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g / g.norm() if k.tensor_wise_gradient_normalization else g
        if t == 1 and k.running_init:
            m, v = g, g**2
        c1, c2 = b1, b2
        if k.adafactor_like_beta_corrections:
            c1, c2 = (b1**t - b1) / (b1**t - 1), (b2**t - b2) / (b2**t - 1)
        if k.poly_ema_p is not None:
            c2 = (t - 1) / (t - 1 + k.poly_ema_p)
        m, v = c1 * m + (1 - c1) * g, c2 * v + (1 - c2) * g**2
        a = lr
        if k.update_clipping:
            v = v.clamp(min=eps**2)
            a = a / max(1.0, (g**2 / v).mean().sqrt().item())
        bias1, bias2 = (1.0, 1.0) if k.adafactor_like_beta_corrections else (1 - c1**t, 1 - c2**t)
        look = c1 * m + (1 - c1) * g if k.nesterov else m
        if k.atan_adam:
            u = torch.atan2(look, v.sqrt() / math.sqrt(bias2))
        elif k.eps_adjustment:
            u = look / (v / bias2 + eps**2).sqrt()
        else:
            u = look / (v.sqrt() / math.sqrt(bias2) + eps)
        if k.brute_force_clip is not None:
            u = u / max(u.norm().item(), k.brute_force_clip)
        p = p * (1 - (lr / lr_0 if k.decouple_wd else lr) * wd) - a / bias1 * u
    return p


def draws(shapes):
    """Start values, then gradients that grow and shrink, so that clipping matters at some updates only."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator) * scale for shape in shapes]
        for scale in (1.0, 0.1, 1.0, 0.01)
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_its_formula(name):
    start, *gradients = draws([(5, 3)])
    keys = EllisKeys(**OPTIONS[name])
    parameter = nn.Parameter(start[0].clone())
    optimizer = ELLISAdam([parameter], **{**options_of(**OPTIONS[name]), "eps": 1e-3})  # large enough to tell
    for gradient in gradients:
        update(optimizer, [parameter], gradient, 1e-2)
    expected = restated(start[0].double(), [g[0].double() for g in gradients], 1e-2, keys)
    torch.testing.assert_close(parameter.data.double(), expected, atol=1e-6, rtol=1e-6)


def test_options_change_the_update():
    """Else the rows above could pass without their option."""
    gradients = [g[0].double() for g in draws([(5, 3)])]
    results = {
        name: restated(gradients[0], gradients[1:], 1e-2, EllisKeys(**keys))
        for name, keys in OPTIONS.items()
        if name not in ("kahan", "finite check")
    }
    rows = torch.stack([result.flatten() for result in results.values()])
    distances = torch.cdist(rows, rows, p=math.inf) + torch.eye(len(rows))
    assert distances.min() > 1e-5


def test_kahan_compensation_keeps_updates_and_decay_that_bfloat16_would_lose():
    """1000 updates of 1e-4 and 1000 decays of 1e-4, each far below half a unit in the last place of 1.0."""
    results = {}
    for kahan in (False, True):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        keys = EllisKeys(kahan_sum_compensation=kahan)
        optimizer = ELLISAdam([parameter], lr=1e-4, weight_decay=1e-4, keys=keys)
        for _ in range(1000):
            update(optimizer, [parameter], [torch.ones(3, dtype=torch.bfloat16)], 1e-4)
        results[kahan] = parameter[0].item()
    assert results[False] == 1.0
    assert results[True] == pytest.approx(0.81, abs=0.01)  # p' = -1e-4 (1 + p)


def test_bfloat16_parameters_are_updated_with_the_betas_and_rates_that_were_given():
    """On CPU torch rounds the factor of a bfloat16 tensor: 0.95 would be 0.9492, and 0.0123 be 0.01233."""
    start = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = [
        torch.randn(4000, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2)
    ]
    beta1, beta2, rate, decay = 0.9, 0.95, 0.0123, 0.3
    parameter = nn.Parameter(start.clone())
    options = {"lr": rate, "betas": (beta1, beta2), "eps": 1e-6, "weight_decay": decay}
    optimizer = ELLISAdam([parameter], **options, keys=EllisKeys(atan_adam=True, buffer_dtype="bfloat16"))
    p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for step, g in enumerate(gradients, 1):
        update(optimizer, [parameter], [g], rate)
        m = (m.float() + (1 - beta1) * (g.float() - m.float())).bfloat16()
        v = (v.float() * beta2).bfloat16()
        v = (v.float() + (1 - beta2) * g.float() ** 2).bfloat16()
        u = torch.atan2(m, (v.sqrt().float() / math.sqrt(1 - beta2**step)).bfloat16())
        p = (p.float() * (1 - decay)).bfloat16()
        p = (p.float() - rate / (1 - beta1**step) * u.float()).bfloat16()
    state = optimizer.state[parameter]
    assert (state["exp_avg_sq"] == v).float().mean() > 0.999
    assert (parameter.detach() == p).float().mean() > 0.999


def test_moments_kept_in_bfloat16_halve_the_state_and_stay_close():
    start, *gradients = draws([(8, 4)])
    finals = {}
    for dtype in ("float32", "bfloat16"):
        parameter = nn.Parameter(start[0].clone())
        optimizer = ELLISAdam([parameter], **options_of(buffer_dtype=dtype))
        for gradient in gradients:
            update(optimizer, [parameter], gradient, 1e-2)
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == getattr(torch, dtype)
        assert state["exp_avg"].any() and state["exp_avg_sq"].any()
        finals[dtype] = parameter.detach()
    assert not torch.equal(finals["float32"], finals["bfloat16"])
    torch.testing.assert_close(finals["float32"], finals["bfloat16"], atol=5e-4, rtol=0.0)


def test_a_tensor_with_a_nonfinite_gradient_is_left_out_and_the_others_are_not():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ELLISAdam([first, second], **options_of(tensor_wise_finite_check=True, running_init=True))
    update(optimizer, [first, second], [torch.tensor([1.0, math.nan]), torch.ones(2)], 1e-2)
    assert torch.equal(first.data, torch.ones(2)) and not torch.equal(second.data, torch.ones(2))
    assert optimizer.state[first]["step"] == 0 and optimizer.state[second]["step"] == 1
    update(optimizer, [first, second], [torch.ones(2), torch.ones(2)], 1e-2)  # the first update of `first`
    fresh = nn.Parameter(torch.ones(2))
    update(ELLISAdam([fresh], **options_of(running_init=True)), [fresh], [torch.ones(2)], 1e-2)
    assert torch.equal(first.data, fresh.data)


def test_a_zero_gradient_survives_normalization_and_a_missing_one_is_passed_over():
    keys = options_of(tensor_wise_gradient_normalization=True)
    zero, missing = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ELLISAdam([zero, missing], **keys)
    update(optimizer, [zero, missing], [torch.zeros(2), None], 1e-2)
    assert zero.isfinite().all() and torch.equal(missing.data, torch.ones(2))
    update(ELLISAdam([missing], **keys), [missing], [None], 1e-2)


CONFIG = OptimizerConfig(name="ELLISAdam", lr=1e-2, eps=1e-6, weight_decay=1e-4, **HUGINN)


def small_model():
    torch.manual_seed(0)
    layers = {
        "embed": nn.Embedding(9, 4),
        "up": nn.Linear(4, 8),
        "norm": nn.LayerNorm(8),
        "down": nn.Linear(8, 3),
    }
    return nn.Sequential(OrderedDict(layers))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(0, 9, (5,), generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def hashes(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_resumed_run_is_bit_equal_and_initialises_no_moment_again():
    keys = CONFIG.model_copy(update={"kahan_sum_compensation": True})
    whole, first, second = small_model(), small_model(), small_model()
    train(whole, build_optimizer(whole, keys), range(6))
    optimizer = build_optimizer(first, keys)
    train(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_state(first, optimizer).items()}
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, keys)
    for name, template in optimizer_state(second, resumed).items():
        assert not template.any()
        template.copy_(saved.pop(name))
    assert not saved
    train(second, resumed, range(3, 6))
    assert all(map(torch.equal, hashes(whole), hashes(second)))


def test_asking_for_the_state_early_changes_no_update_of_a_running_init():
    plain, early = small_model(), small_model()
    train(plain, build_optimizer(plain, CONFIG), range(3))
    optimizer = build_optimizer(early, CONFIG)
    assert not any(tensor.any() for tensor in optimizer_state(early, optimizer).values())
    train(early, optimizer, range(3))
    assert all(map(torch.equal, hashes(plain), hashes(early)))


SHAPES = [(8, 4), (5, 3), (1, 6), (7,)]  # even rows, uneven rows, and ranks that hold nothing


@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_sharded_updates_equal_unsharded_ones(world_size, replicas):
    for differences in run_on_ranks(world_size, sharded_against_whole, replicas):
        for name, difference in differences.items():
            assert difference <= 1e-7, name


def sharded_against_whole(rank, world_size, replicas):
    shard = world_size // replicas
    mesh = init_device_mesh("cpu", (replicas, shard) if replicas > 1 else (shard,))
    placements = [Replicate(), Shard(0)] if replicas > 1 else [Shard(0)]
    start, *gradients = draws(SHAPES)
    differences = {}
    for name, keys in OPTIONS.items():
        plain = [nn.Parameter(p.clone()) for p in start]
        split = [nn.Parameter(distribute_tensor(p, mesh, placements)) for p in start]
        optimizers = [ELLISAdam(plain, **options_of(**keys)), ELLISAdam(split, **options_of(**keys))]
        for gradient in gradients:
            update(optimizers[0], plain, gradient, 1e-3)
            update(optimizers[1], split, [distribute_tensor(g, mesh, placements) for g in gradient], 1e-3)
        differences[name] = max(
            (one.full_tensor() - two).abs().max().item() for one, two in zip(split, plain, strict=True)
        )
        for one, two in zip(split, plain, strict=True):
            average = optimizers[1].state[one]["exp_avg"]
            assert isinstance(average, DTensor)
            torch.testing.assert_close(average.full_tensor(), optimizers[0].state[two]["exp_avg"])
    return differences


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        # Neither sends anything.
        if "c10d" in name and not name.endswith(("wait_tensor", "_wrap_tensor_autograd")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_costs_one_all_reduce_whatever_the_number_of_tensors():
    assert run_on_ranks(2, collectives) == [{"plain": 0, "Huginn": 1, "clipped by force": 2}] * 2


def collectives(rank, world_size):
    counts = {}
    for name in ("plain", "Huginn", "clipped by force"):
        model = fully_shard(small_model())
        optimizer = ELLISAdam(model.parameters(), **options_of(**OPTIONS[name]))
        model(torch.arange(5)).square().sum().backward()
        with CountCollectives() as counter:
            optimizer.step()
        counts[name] = len(counter.names)
    return counts


def test_a_nonfinite_part_on_one_rank_leaves_the_tensor_out_on_all():
    assert run_on_ranks(2, one_bad_part) == [(True, True)] * 2


def one_bad_part(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    parameters = [nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])) for _ in range(2)]
    bad = torch.ones(4, 2)
    bad[3, 1] = math.inf
    gradients = [distribute_tensor(g, mesh, [Shard(0)]) for g in (bad, torch.ones(4, 2))]
    optimizer = ELLISAdam(parameters, **options_of(tensor_wise_finite_check=True))
    update(optimizer, parameters, gradients, 1e-2)
    kept, moved = (parameter.full_tensor() for parameter in parameters)
    return torch.equal(kept, torch.ones(4, 2)), not torch.equal(moved, torch.ones(4, 2))


class LongestList(TorchDispatchMode):
    """How many tensors one operation took at most."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.most = max([self.most, *(len(arg) for arg in args if isinstance(arg, list | tuple))])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flagged", [False, True])
def test_an_update_that_may_be_taken_back_copies_one_tensor_at_a_time(flagged):
    """Its copies are of moments and parameters: of all tensors at once they would be three
    more models in memory.
    """
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(5)]
    optimizer = ELLISAdam(parameters, **options_of())
    for parameter in parameters:
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.found_inf = torch.zeros(()) if flagged else None
    with LongestList() as seen:
        optimizer.step()
    assert seen.most == (1 if flagged else 5)
