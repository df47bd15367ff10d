"""A step that is not logged never makes the host wait for the device, and costs two small all-reduces."""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_on_ranks
from tests.small_run import SEQ_LEN, VOCAB, Setup, batches_of, make
from torchtitan_rd import job, train_step
from torchtitan_rd.config import load
from torchtitan_rd.data import Batch
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import OptimizerConfig, build_optimizer
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import Readback, TrainingConfig, TrainStep

META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Counts all-reduces, reads of single numbers, and copies between devices that the host waits for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        if name.startswith("allreduce_"):
            self.counts["all-reduce"] += 1
        if name.startswith("_local_scalar_dense"):
            self.counts[f"read on {args[0].device.type}"] += 1
        if (
            name.startswith("_to_copy")
            and torch.device(kwargs.get("device") or args[0].device) != args[0].device
        ):
            self.counts["copy" if kwargs.get("non_blocking") else "blocking copy"] += 1
        if name.startswith("copy_") and args[0].device != args[1].device:
            self.counts[
                "copy" if (len(args) > 2 and args[2]) or kwargs.get("non_blocking") else "blocking copy"
            ] += 1
        return function(*args, **kwargs)


class NothingToRead:
    """In place of Readback, since a meta tensor has no numbers: an ordinary step."""

    def __init__(self, size, device):
        self.size = size

    def post(self, vector):
        assert vector.device == META and vector.shape == (self.size,)
        return lambda: [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.fixture
def a_rank_of_eight():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def on_meta(name: str, overrides: dict) -> nn.Module:
    spec = get_spec(name)
    flavor = "debug" if name == "llama3" else "debug-demo"
    with META:
        model = spec.build(replace(get_flavor(spec, flavor, overrides), vocab_size=VOCAB))
    model.init_buffers(META)
    return model


def raven_inputs(step: int, number: int, batch: Batch) -> ForwardInputs:
    state = torch.zeros(*batch.inputs.shape, 32, device=META)
    return ForwardInputs({"num_steps": (2, 2), "initial_state": state}, (2, 2))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "ELLISAdam", "Muon"])
@pytest.mark.parametrize("family", ["llama3", "raven"])
def test_nothing_in_a_step_waits_for_the_device(family, name, a_rank_of_eight, monkeypatch):
    """On the meta device, where reading a number raises: with all that the objective has,
    and two microbatches.
    """
    monkeypatch.setattr(train_step, "Readback", NothingToRead)
    # Else fused Adam refuses this device.
    for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        monkeypatch.setattr(sys.modules[module], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    model = on_meta(
        family, {"dim": 32, "n_heads": 2, "ffn_dim": 48} | ({"n_layers": 2} if family == "llama3" else {})
    )
    inputs = {"forward_inputs": raven_inputs} if family == "raven" else {}
    config = TrainingConfig(
        goldfish_strategy="hash-table", z_loss_weight=1e-4, loss_guard=9.0, on_nonfinite="skip"
    )
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    step = TrainStep(model, optimizer, config, META, late=True, **inputs)
    assert train_step.takes_flag(optimizer, META)

    ids = torch.zeros(2, SEQ_LEN, dtype=torch.int64)
    step(1, [Batch(ids, ids)])  # makes state and the table of the goldfish loss
    with Watch() as watch:
        step(2, [Batch(ids, ids), Batch(ids, ids)])
    # What Adam keeps on the host by intent is not the device's;
    # inputs and labels of two microbatches are copied.
    assert {name: n for name, n in watch.counts.items() if name != "read on cpu"} == {
        "all-reduce": 2,
        "copy": 4,
    }
    assert watch.counts["read on cpu"] == 0 or name == "ELLISAdam"


def test_the_watch_sees_what_it_is_to_count():
    with Watch() as watch:
        (
            torch.ones(1).item(),
            bool(torch.ones(1)),
            torch.ones(1).to("meta"),
            torch.ones(1).to("meta", non_blocking=True),
        )
        torch.empty(1, device="meta").copy_(torch.ones(1))
    assert watch.counts == {"read on cpu": 2, "blocking copy": 2, "copy": 1}
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").tolist()


@pytest.mark.parametrize(
    ("world_size", "sections"), [(1, {}), (2, {}), (4, {"data_parallel_replicate_degree": 2})]
)
def test_an_update_costs_two_small_all_reduces_under_fsdp(world_size, sections):
    for counts in run_on_ranks(world_size, count_all_reduces, sections):
        assert counts == {"all-reduce": 2}


def count_all_reduces(rank, world_size, parallelism):
    sections = {"parallelism": parallelism, "training": {"local_batch_size": 1}}
    setup = Setup(sections=sections)
    config, _, step = make(setup, world_size)
    step(1, batches_of(1, rank, world_size, config, padded=True))
    sizes = []

    class Small(Watch):
        """HSDP's own all-reduces of gradients are not small."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.__name__.startswith("allreduce_"):
                sizes.append(sum(tensor.numel() for tensor in args[0]))
                if sizes[-1] > 200:
                    return function(*args, **(kwargs or {}))
            return super().__torch_dispatch__(function, types, args, kwargs)

    with Small() as watch:
        step(2, batches_of(2, rank, world_size, config, padded=True))
    return {name: n for name, n in watch.counts.items() if name == "all-reduce"}


@pytest.mark.parametrize("late", [False, True])
def test_the_whole_loop_reads_and_reduces_nothing_more_on_an_unlogged_step(late, tmp_path, monkeypatch):
    """From one step's data to the next one's, signals, metrics and checkpoints included."""
    reads = Counter()

    def counted(kind, plain):
        def reading(tensor, *arguments):
            reads[kind] += 1
            return plain(tensor, *arguments)

        return reading

    def of_the_copy(self):
        """The one read of a step, of a copy that arrived on the host."""
        values = TOLIST(self._host)
        reads["copy"] += 1
        return values

    TOLIST = torch.Tensor.tolist
    for kind in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, kind, counted(kind, getattr(torch.Tensor, kind)))
    monkeypatch.setattr(Readback, "_read", of_the_copy)
    monkeypatch.setattr(train_step, "takes_flag", lambda optimizer, device: True)
    plain_step = TrainStep.__init__
    monkeypatch.setattr(TrainStep, "__init__", lambda self, *a, **k: plain_step(self, *a, **k, late=late))

    found = []
    watch = Watch()

    def between_steps(self, step):
        found.append((step, dict(watch.counts), dict(reads)))
        watch.counts.clear(), reads.clear()

    arguments = [
        *(
            "--training.seq_len=16",
            "--training.local_batch_size=2",
            "--training.steps=6",
            "--metrics.log_freq=100",
        ),
        *(
            "--model.overrides.dim=32",
            "--model.overrides.n_layers=1",
            "--training.mixed_precision_param=float32",
        ),
        *("--checkpoint.enable", "--checkpoint.interval=100", f"--job.dump_folder={tmp_path}"),
    ]
    environment = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
    monkeypatch.setattr(job.GarbageCollector, "run", between_steps)
    with watch:
        Trainer(load(arguments, environment), environment).run()
    during = {step - 1: (counts, host) for step, counts, host in found}
    for step in (3, 4, 5):  # each begins with the data of its own and ends where the next begins
        counts, host = during[step]
        assert counts == {"all-reduce": 2}, step
        assert host == {"copy": 1}, step
