"""Adam and AdamW over parameters, with state as named tensors."""

import pytest
import torch
from torch import nn

from torchtitan_rd.optimizer import OptimizerConfig, build_optimizer, optimizer_state, set_lr


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def update(model, optimizer):
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_every_implementation_gives_the_same_updates(name, implementation):
    models = [small_model(), small_model()]
    for model, kind in zip(models, ("for-loop", implementation), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2, implementation=kind))
        for _ in range(3):
            update(model, optimizer)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_norms_and_biases_can_be_left_out_of_the_weight_decay():
    optimizer = build_optimizer(
        small_model(), OptimizerConfig(no_weight_decay_for_bias_and_norm=True, weight_decay=0.3)
    )
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(8, 4): 0.3, (2, 8): 0.3, (8,): 0.0, (2,): 0.0}


def test_making_the_state_early_changes_no_parameter_and_no_later_update():
    plain, early = small_model(), small_model()
    plain_optimizer = build_optimizer(plain, OptimizerConfig(lr=1e-2))
    early_optimizer = build_optimizer(early, OptimizerConfig(lr=1e-2))
    state = optimizer_state(early, early_optimizer)
    assert set(state) == {f"{n}.{k}" for n, _ in early.named_parameters() for k in ("exp_avg", "exp_avg_sq", "step")}
    assert all(not tensor.any() for tensor in state.values())
    for a, b in zip(plain.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b)
    for model, optimizer in ((plain, plain_optimizer), (early, early_optimizer)):
        update(model, optimizer)
    for a, b in zip(plain.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_of_every_group_follows_the_factor():
    optimizer = build_optimizer(small_model(), OptimizerConfig(lr=0.5, no_weight_decay_for_bias_and_norm=True))
    assert set_lr(optimizer, 0.25) == 0.125
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
