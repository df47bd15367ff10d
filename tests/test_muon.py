"""Muon: torch's own numbers on whole matrices, the same bits on any number of ranks,
and AdamW for the rest.
"""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.ranks import run_on_ranks
from tests.test_ellis_adam import CountCollectives, hashes, small_model, train
from torchtitan_rd.optimizer import Muon, OptimizerConfig, build_optimizer, muon, optimizer_state, set_lr
from torchtitan_rd.optimizer.muon import MuonKeys, orthogonalize

SHAPES = [(8, 4), (4, 8), (5, 3), (1, 6)]
CONFIG = OptimizerConfig(name="Muon", lr=1e-2, no_weight_decay_for_bias_and_norm=True)


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]


def run(parameters, optimizer, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_whole_matrices_get_torchs_own_updates_bit_for_bit(adjust):
    start, *gradients = matrices()
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    keys = MuonKeys(muon_adjust_lr=adjust)
    left = run(ours, Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02, keys=keys), gradients)
    right = run(theirs, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust), gradients)
    assert all(map(torch.equal, left, right))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_orthogonalized_singular_values_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5).float())
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (4, 2)])
def test_sharded_matrices_get_the_same_bits(world_size, replicas):
    start, *gradients = matrices()
    plain = [nn.Parameter(matrix.clone()) for matrix in start]
    expected = run(plain, Muon([{"params": plain}], lr=0.02, keys=MuonKeys()), gradients)
    for got in run_on_ranks(world_size, sharded, replicas):
        assert all(map(torch.equal, got, expected))


def sharded(rank, world_size, replicas):
    shard = world_size // replicas
    mesh = init_device_mesh("cpu", (replicas, shard) if replicas > 1 else (shard,))
    placements = [Replicate(), Shard(0)] if replicas > 1 else [Shard(0)]
    start, *gradients = [[distribute_tensor(m, mesh, placements) for m in step] for step in matrices()]
    parameters = [nn.Parameter(matrix) for matrix in start]
    return [
        p.full_tensor()
        for p in run(parameters, Muon([{"params": parameters}], lr=0.02, keys=MuonKeys()), gradients)
    ]


def test_a_sharded_step_gathers_each_matrix_once():
    assert run_on_ranks(2, gathers) == [["_c10d_functional::all_gather_into_tensor"] * 2] * 2


def gathers(rank, world_size):
    model = fully_shard(small_model())
    optimizer = build_optimizer(model, CONFIG)
    model(torch.arange(5)).square().sum().backward()
    with CountCollectives() as counter:
        optimizer.step()
    return counter.names


def test_what_was_gathered_on_a_gpu_comes_back_to_a_matrix_in_host_memory(monkeypatch):
    """DTensor gathers on the mesh's device, wherever the parts are. A stand-in for what is there."""

    class OnGpu:
        def __init__(self, part):
            self.part = part

        def to(self, device):
            assert device == torch.device("cpu")
            return self.part

    own_part = muon.own_part
    monkeypatch.setattr(muon, "own_part", lambda matrix, whole: OnGpu(own_part(matrix, whole)))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    (start, *_), (gradient, *_), *_ = matrices()
    plain, parted = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    (expected,) = run([plain], Muon([{"params": [plain]}], lr=0.02, keys=MuonKeys()), [[gradient]])
    gradients = [[distribute_tensor(gradient, mesh, [Shard(0)])]]
    (found,) = run([parted], Muon([{"params": [parted]}], lr=0.02, keys=MuonKeys()), gradients)
    assert torch.equal(found.to_local(), expected)


def test_matrices_go_to_muon_and_everything_else_to_adamw():
    model = small_model()
    optimizer = build_optimizer(model, CONFIG)
    keys = {name.rpartition(".")[2] for name in optimizer_state(model, optimizer)}
    assert keys == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    by_muon = {
        n.removesuffix(".momentum_buffer") for n in optimizer_state(model, optimizer) if "momentum" in n
    }
    assert by_muon == {"up.weight", "down.weight"}
    decays = {group["kind"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"matrices": 0.1, "embeddings and head": 0.1, "norms and biases": 0.0}


def test_the_rate_reaches_both_parts():
    model = small_model()
    optimizer = build_optimizer(model, CONFIG)
    before = hashes(model)
    set_lr(optimizer, 0.0)
    train(model, optimizer, range(2))
    assert all(map(torch.equal, before, hashes(model)))
    set_lr(optimizer, 1.0)
    train(model, optimizer, range(2))
    assert not any(map(torch.equal, before, hashes(model)))


def test_the_rate_of_adamw_may_be_its_own():
    """After one update each part is what a run at its rate makes of it."""
    found = {}
    for name, rates in {
        "both": {"lr": 1e-3, "muon_adamw_lr": 5e-2},
        "muon": {"lr": 1e-3},
        "adamw": {"lr": 5e-2},
    }.items():
        model = small_model()
        optimizer = build_optimizer(model, OptimizerConfig(name="Muon", **rates))
        set_lr(optimizer, 0.5)
        train(model, optimizer, range(1))
        found[name] = model.state_dict()
    for name, tensor in found["both"].items():
        is_matrix = name in ("up.weight", "down.weight")
        assert torch.equal(tensor, found["muon"][name]) == is_matrix, name
        assert torch.equal(tensor, found["adamw"][name]) != is_matrix, name


def test_a_resumed_run_is_bit_equal():
    whole, first, second = small_model(), small_model(), small_model()
    train(whole, build_optimizer(whole, CONFIG), range(6))
    optimizer = build_optimizer(first, CONFIG)
    train(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_state(first, optimizer).items()}
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, CONFIG)
    for name, template in optimizer_state(second, resumed).items():
        template.copy_(saved.pop(name))
    assert not saved
    train(second, resumed, range(3, 6))
    assert all(map(torch.equal, hashes(whole), hashes(second)))


def test_the_adjusted_rate_gives_updates_of_adamws_size():
    """0.2 rms: what AdamW's updates have in practice (arXiv 2502.16982, section 2.2)."""
    for rows, columns in ((64, 256), (256, 64)):
        matrix = nn.Parameter(torch.zeros(rows, columns))
        matrix.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [matrix]}], lr=1.0, keys=MuonKeys()).step()
        assert math.sqrt(matrix.detach().square().mean()) == pytest.approx(0.2, rel=0.2)
