"""[parallelism] fsdp_prefetch_units: which gathers have begun when a unit computes."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from tests.small_run import Setup, train
from torchtitan_rd.models import get_spec
from torchtitan_rd.parallelism.fsdp import forward_order

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import collectives

LAYERS = 8  # of collectives.LLAMA


class Gathers(TorchDispatchMode):
    """Counts gathers, and notes at the beginning of each unit's forward and backward how many there were."""

    def __init__(self, model, names):
        super().__init__()
        self.begun = 0
        self.at: dict[str, list[int]] = {"forward": [], "backward": []}
        for name in names:
            # FSDP's own hooks come before these.
            model.get_submodule(name).register_forward_pre_hook(lambda *_: self.note("forward"))
            model.get_submodule(name).register_forward_hook(self.follow)

    def note(self, phase, *_):
        self.at[phase].append(self.begun)

    def follow(self, module, inputs, output):
        (output if isinstance(output, torch.Tensor) else output[0]).register_hook(
            lambda *_: self.note("backward")
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.begun += "allgather" in func.__name__
        return func(*args, **(kwargs or {}))


def gathers(name, units):
    """(at the forward, at the backward of each unit: gathers begun since that pass began)."""
    shape, inputs = {
        "llama3": (collectives.LLAMA, {}),
        "raven": (collectives.RAVEN, collectives.inputs_of((4, 4)).kwargs),
    }[name]
    with collectives.fake_ranks():
        _, model = collectives.build(name, shape, "FSDP", fsdp_prefetch_units=units)
        with Gathers(model, forward_order(get_spec(name).wrap_plan(model))) as seen:
            logits = model(torch.zeros(1, collectives.SEQ_LEN, dtype=torch.int64), **inputs)
            forward = seen.begun
            logits.sum().backward()
    return seen.at["forward"], [begun - forward for begun in seen.at["backward"]]


@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_llama_has_gathered_so_many_layers_ahead_of_the_one_that_computes(units):
    forward, backward = gathers("llama3", units)
    # A unit's own gather, those of the units before it and, above 1, those ahead; torch's own prefetch of
    # one in forward is that the host runs ahead of the device.
    ahead = units if units > 1 else 0
    assert forward == [min(i + 1 + ahead, LAYERS + 2) for i in range(LAYERS + 2)]
    # Backward begins with the head, which stays gathered; embedding is the last of LAYERS + 1 others.
    assert backward == [min(i + units, LAYERS + 1) for i in range(LAYERS + 2)]


@pytest.mark.parametrize("units", [1, 4])
def test_a_raven_has_gathered_its_loop_before_the_prelude_computes_and_more_if_asked(units):
    forward, backward = gathers("raven", units)
    # Root, 2 units of the prelude and the loop at once; then the coda. Root and loop stay gathered.
    assert forward == {1: [4, 4, 4, 5, 6], 4: [6] * 5}[units]
    assert backward == {1: [2, 2, 3, 4, 4], 4: [4] * 5}[units]


def test_losses_and_weights_are_the_same_to_the_bit():
    plain, ahead = (
        run_on_ranks(2, train, Setup({"parallelism": {"fsdp_prefetch_units": units}})) for units in (1, 3)
    )
    for expected, result in zip(plain, ahead, strict=True):
        assert (result["losses"], result["after"]) == (expected["losses"], expected["after"])
