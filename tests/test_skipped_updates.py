"""Updates that must not happen: decided on the device, known to the host a step later,
and without any trace.
"""

from dataclasses import replace

import pytest
import torch

from tests.models.tiny import tiny_llama
from tests.ranks import TWO_FIRST, run_on_ranks
from tests.small_run import Setup, all_equal, batches_of, hash_of, make
from torchtitan_rd import train_step
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.optimizer import (
    OptimizerConfig,
    build_optimizer,
    optimizer_state,
    takes_flag,
    update_unless,
)
from torchtitan_rd.parallelism.local_part import local
from torchtitan_rd.train_step import TrainingConfig, Verdict

OPTIMIZERS = {
    "AdamW": {"name": "AdamW"},
    "Adam": {"name": "Adam"},
    "AdamW, foreach": {"name": "AdamW", "implementation": "foreach"},
    "Muon": {"name": "Muon"},
    "ELLISAdam": {"name": "ELLISAdam", "update_clipping": True, "atan_adam": True, "running_init": True},
    "ELLISAdam, bfloat16": {"name": "ELLISAdam", "buffer_dtype": "bfloat16", "kahan_sum_compensation": True},
}
# (name, late): what the host decides is correct too, and all there is for an optimizer that takes no flag.
CASES = [
    # Adam differs from AdamW in how it decays alone.
    pytest.param(name, late, marks=[pytest.mark.slow] if name == "Adam" else [])
    for name in OPTIMIZERS
    for late in (False, True)
    if not (late and "foreach" in name)
]
LATE = [pytest.param(case.values[0], marks=case.marks) for case in CASES if case.values[1]]


class Run:
    """A small run whose last rank can be made to find a NaN."""

    def __init__(self, rank, world_size, optimizer, late, **training):
        self.place = rank, world_size
        sections = {"optimizer": {"lr": 1e-2, **optimizer}, "training": {"local_batch_size": 4, **training}}
        self.config, self.model, self.step = make(Setup(sections=sections), world_size, late=late)
        optimizer_state(self.model, self.step.optimizer)  # as a run that saves checkpoints does

    def do(self, number, *, bad=None, tokens_seen=0):
        """Update `number`; bad: "loss" or "gradient"."""
        rank, world_size = self.place
        poison = float("nan") if bad and rank == world_size - 1 else 1.0
        target = self.model.output if bad == "loss" else self.model.layers[0]
        if bad == "loss":
            hook = target.register_forward_hook(lambda module, inputs, output: output * poison)
        else:
            hook = target.register_full_backward_hook(
                lambda module, given, taken: tuple(g if g is None else g * poison for g in given)
            )
        try:
            return self.step(number, batches_of(number, rank, world_size, self.config, False), tokens_seen)
        finally:
            hook.remove()

    def state(self):
        """Parameters, and this rank's part of every tensor of the optimizer, counts included, as they go
        into the checkpoint.
        """
        self.step.settle()
        tensors = optimizer_state(self.model, self.step.optimizer)
        return hash_of(self.model), {name: local(tensor).clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "late"), CASES)
@pytest.mark.parametrize("world_size", TWO_FIRST)
def test_a_skipped_update_leaves_no_trace_in_parameters_moments_or_counts(world_size, name, late):
    assert all(run_on_ranks(world_size, no_trace, OPTIMIZERS[name], late))


def no_trace(rank, world_size, optimizer, late):
    skipping, plain = (Run(rank, world_size, optimizer, late, on_nonfinite="skip") for _ in range(2))
    skipping.do(9, bad="gradient")  # before any state is there
    for number in (1, 2, 3):
        skipping.do(number)
        plain.do(number)
        skipping.do(10 + number, bad="loss")
    (weights, state), (expected, expected_state) = skipping.state(), plain.state()
    counts = {float(tensor) for name, tensor in state.items() if name.endswith(".step")}
    return (
        weights == expected
        and state.keys() == expected_state.keys()
        and all(torch.equal(tensor, expected_state[key]) for key, tensor in state.items())
        and counts in ({3.0}, set())
    )


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("world_size", TWO_FIRST)
def test_an_update_that_awaits_its_flag_is_bit_for_bit_the_one_that_does_not(world_size, name):
    for (weights, state), (expected, expected_state) in run_on_ranks(world_size, with_and_without_flag, name):
        assert weights == expected and state.keys() == expected_state.keys()
        for key, tensor in expected_state.items():
            assert torch.equal(state[key], tensor), key


def with_and_without_flag(rank, world_size, name):
    runs = [Run(rank, world_size, OPTIMIZERS[name], late) for late in (True, False)]
    for run in runs:
        for number in (1, 2, 3):
            run.do(number)
    return [run.state() for run in runs]


@pytest.mark.parametrize("name", LATE)
def test_a_flag_is_for_one_update(name):
    model = tiny_llama()
    optimizer = build_optimizer(model, OptimizerConfig(**OPTIMIZERS[name]))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_unless(torch.tensor(1.0), optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(("name", "late"), CASES)
def test_after_a_nonfinite_step_nothing_is_updated_until_the_error_names_that_step(name, late):
    for weights, expected, message in run_on_ranks(2, stopped, OPTIMIZERS[name], late):
        assert weights == expected
        assert "step 2: " in message and "nan" in message and "stopped before the update" in message


def stopped(rank, world_size, optimizer, late):
    run = Run(rank, world_size, optimizer, late)
    run.do(1)
    expected = run.state()[0]
    with pytest.raises(TrainingError) as raised:
        run.do(2, bad="gradient")
        assert late and hash_of(run.model) == expected
        run.do(3)  # a good one: it must not be taken
    return hash_of(run.model), expected, str(raised.value)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_batch_without_a_label_is_said_to_be_one(policy, chunk):
    for message, same in run_on_ranks(2, unlabelled, policy, chunk):
        assert message.startswith("step 2: no label in its batch counts toward the loss")
        assert "update skipped (1 in a row)" in message if policy == "skip" else "stopped before" in message
        assert same


def unlabelled(rank, world_size, policy, chunk):
    """-> what is said of such a step, and whether it left no trace."""
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], False, on_nonfinite=policy, loss_chunk_tokens=chunk)
    run.do(1)
    expected = run.state()[0]
    batches = batches_of(2, rank, world_size, run.config, False)
    batches = [replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in batches]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step.logger, "warning", lambda text, *values: said.append(text % values))
        try:
            run.step(2, batches)
        except TrainingError as error:
            said.append(str(error))
    return said[0], run.state()[0] == expected


def test_the_error_surfaces_before_a_checkpoint_or_a_validation_is_made():
    assert run_on_ranks(2, settled) == [True, True]


def settled(rank, world_size):
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], True)
    run.do(1)
    run.step.settle()
    run.do(2, bad="loss")
    with pytest.raises(TrainingError, match=r"step 2: loss nan"):
        run.step.settle()
    return True


@pytest.mark.parametrize("late", [False, True])
def test_more_skips_in_a_row_than_allowed_stop_the_run_and_none_is_forgiven_afterwards(late):
    for skips, weights, expected, message in run_on_ranks(2, too_many, late):
        assert skips == [1, 0, 1, 2]
        assert weights == expected
        assert "step 6: " in message and "allows 2 skipped updates in a row" in message


def too_many(rank, world_size, late):
    """Steps 1, 3, 4, 5 and 6 are bad, of which two in a row are allowed."""
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], late, on_nonfinite="skip", max_consecutive_skips=2)
    results = [run.do(number, bad=None if number == 2 else "loss") for number in (1, 2)]
    expected = run.state()[0]
    results += [run.do(number, bad="loss") for number in (4, 5)]
    skips = [result.numbers.consecutive_skips for result in results]
    with pytest.raises(TrainingError) as raised:
        run.do(6, bad="loss")
        run.do(7)
    return skips, hash_of(run.model), expected, str(raised.value)


@pytest.mark.parametrize("late", [False, True])
def test_the_loss_guard_stops_before_the_update_of_the_step_that_exceeds_it(late):
    for weights, expected, message in run_on_ranks(2, guarded, late):
        assert weights == expected
        assert "step 2: loss " in message and "exceeds training.loss_guard = 1.0 after 101 tokens" in message


def guarded(rank, world_size, late):
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], late, loss_guard=1.0, loss_guard_after_tokens=100)
    run.do(1, tokens_seen=100)
    expected = run.state()[0]
    with pytest.raises(TrainingError) as raised:
        run.do(2, tokens_seen=101)
        run.do(3, tokens_seen=102)
    return hash_of(run.model), expected, str(raised.value)


@pytest.mark.parametrize("late", [False, True])
def test_numbers_are_the_same_whenever_the_host_reads_them(late):
    (first, same), *others = run_on_ranks(2, numbers, late)
    assert same and all(other == (first, same) for other in others)
    expected = run_on_ranks(2, numbers, False)[0][0]
    assert first == expected


def numbers(rank, world_size, late):
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], late)
    results = [run.do(number) for number in (1, 2, 3)]
    run.step.settle()
    found = [result.numbers for result in results]
    return found, all_equal(found)


def test_the_largest_mean_loss_and_its_rank_are_found():
    for numbers, own in run_on_ranks(2, largest):
        assert numbers.loss_max == pytest.approx(max(own), abs=1e-6)
        assert numbers.loss_max_rank == own.index(max(own))
        assert numbers.loss == pytest.approx(sum(own) / 2, abs=1e-6)


def largest(rank, world_size):
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], False)
    own = []
    for other in range(world_size):  # FSDP's forward is collective: both ranks compute both shares
        (batch,) = batches_of(1, other, world_size, run.config, False)
        logits = run.model(batch.inputs)
        own.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item())
    for module in run.model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return run.do(1).numbers, own


def test_only_an_optimizer_whose_parameters_are_on_the_device_takes_a_flag():
    for name, keys in OPTIMIZERS.items():
        _, _, step = run_on_ranks(1, flagged, keys)[0]
        assert step == ("foreach" not in name, False), name


def flagged(rank, world_size, keys):
    run = Run(rank, world_size, keys, False)
    optimizer = run.step.optimizer
    return (
        None,
        None,
        (takes_flag(optimizer, torch.device("cpu")), takes_flag(optimizer, torch.device("cuda"))),
    )


def test_the_host_reads_late_on_a_gpu_alone_and_only_where_the_optimizer_takes_the_flag():
    assert run_on_ranks(1, late_by_default) == [
        {("cuda", True): True, ("cuda", False): False, ("cpu", True): False}
    ]


def late_by_default(rank, world_size):
    """By (device, whether the optimizer takes a flag there), without what would be made on a GPU."""
    run = Run(rank, world_size, OPTIMIZERS["AdamW"], None)
    found, real = {}, (train_step.Verdict, train_step.Readback, train_step.takes_flag)
    train_step.Verdict = train_step.Readback = lambda *arguments: None
    try:
        for device, takes in (("cuda", True), ("cuda", False), ("cpu", True)):
            train_step.takes_flag = lambda optimizer, device, takes=takes: takes
            made = train_step.TrainStep(
                run.model, run.step.optimizer, run.config.training, torch.device(device)
            )
            found[device, takes] = made.late
    finally:
        train_step.Verdict, train_step.Readback, train_step.takes_flag = real
    return found


def test_once_training_must_stop_the_device_lets_no_later_update_happen():
    """However late the host may read: the flag stays set through good steps."""
    verdict = Verdict(TrainingConfig(), torch.device("cpu"))
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert [verdict(loss, good, 0).item() for loss in (good, bad, good, good)] == [0.0, 1.0, 1.0, 1.0]


def test_an_infinite_loss_is_skipped_where_skipping_is_allowed_even_with_a_guard():
    """Infinity exceeds any guard; that the loss has gone up for good is for finite losses to show."""
    config = TrainingConfig(on_nonfinite="skip", loss_guard=6.0, loss_guard_after_tokens=0)
    verdict = Verdict(config, torch.device("cpu"))
    norm, losses = torch.tensor(1.0), [float("inf"), 5.0, 7.0, 5.0]
    assert [verdict(torch.tensor(loss), norm, 1).item() for loss in losses] == [1.0, 0.0, 1.0, 1.0]
