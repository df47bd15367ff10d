"""activation_checkpoint.offload: the inputs of recomputed blocks in host memory, and the same numbers."""

from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._dynamo import register_backend
from torch.multiprocessing.reductions import StorageWeakRef

from tests.ranks import needs_gpus, run_on_ranks
from tests.small_run import Setup, batches_of, make, train
from tests.test_precision import sections
from tests.test_precision import train as train_raven
from torchtitan_rd.parallelism import ActivationCheckpointConfig
from torchtitan_rd.parallelism.activation_checkpoint import apply_activation_checkpointing
from torchtitan_rd.parallelism.offload import Offload, OnHost, apply_offload

FULL = {"activation_checkpoint": {"mode": "full"}}
OFFLOADED = {"activation_checkpoint": {"mode": "full", "offload": True}}
KEPT = {"activation_checkpoint": {"mode": "full", "offload": True, "keep": "attention"}}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("keys", [OFFLOADED, KEPT])
def test_a_llama_trains_on_the_same_bits(keys, world_size):
    expected = run_on_ranks(world_size, train, Setup(FULL))
    assert same_bits(run_on_ranks(world_size, train, Setup(keys)), expected)


@pytest.mark.parametrize("region", ["iteration", "block"])
def test_a_raven_trains_on_the_same_bits(region):
    def setup(keys):
        keys = {"activation_checkpoint": {**keys["activation_checkpoint"], "recurrent_region": region}}
        return Setup(sections("float32", **keys), steps=3)

    assert same_bits(run_on_ranks(2, train_raven, setup(KEPT)), run_on_ranks(2, train_raven, setup(FULL)))


def same_bits(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return all(
        one["losses"] == other["losses"]
        and all(torch.equal(one["gradients"][name], g) for name, g in other["gradients"].items())
        for one, other in pairs
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_each_block_of_each_microbatch_is_sent_once_and_fetched_once(compiled):
    order = run_on_ranks(1, what_happens, compiled)[0]
    of_a_microbatch = [
        *("sent 0", "sent 1", "sent 2", "sent 3"),
        *("fetched 3", "fetched 2", "fetched 1", "fetched 0"),
    ]
    assert order == 2 * of_a_microbatch


def what_happens(rank, world_size, compiled):
    torch._dynamo.reset()
    register_backend(lambda graph, inputs: graph.forward, name="plain")  # recomputation is in the graph
    compile_keys = {"enable": compiled, "backend": "plain" if compiled else "inductor"}
    keys = {**(KEPT if compiled else OFFLOADED), "training": {"local_batch_size": 4}, "compile": compile_keys}
    config, _, step = make(Setup(keys), world_size)
    order, numbers = [], {}

    class Noting(OnHost):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            numbers[id(self)] = len(order) % 8
            order.append(f"sent {numbers[id(self)]}")

        def fetch(self):
            if self.back is None:
                order.append(f"fetched {numbers[id(self)]}")
            return super().fetch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchtitan_rd.parallelism.offload.OnHost", Noting)
        step(1, batches_of(1, rank, world_size, config, padded=False))
    del torch._dynamo.backends.registry._COMPILER_FNS["plain"]
    return order


def test_what_backward_needs_next_is_fetched_when_one_is_taken():
    offload, tensors = Offload(), [torch.full((2,), float(i)) for i in range(3)]
    sent = [offload._send(tensor) for tensor in tensors]
    assert [one.back for one in sent] == [None, None, None]
    assert torch.equal(offload._unpack(sent[2]), tensors[2])
    assert sent[2].back is None, "nothing is kept of what was taken"
    assert torch.equal(sent[1].back, tensors[1]) and sent[0].back is None

    # The next microbatch: what comes before it is gone.
    del sent
    assert torch.equal(offload._unpack(offload._send(tensors[0])), tensors[0])


class Streams:
    """Two streams of a GPU that is not there: what the host asks of each, in its order. A stream does what is
    asked of it one after the other; what one does before the other is known by waiting alone.
    """

    def __init__(self, monkeypatch):
        self.log = []
        self.computing, self.copying = Stream("computing", self.log), Stream("copying", self.log)
        self.current = self.computing
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: self.current)
        monkeypatch.setattr("torch.cuda.stream", self._on)
        monkeypatch.setattr(Offload, "_stream", lambda offload, device: self.copying)
        copy = OnHost._copy

        def logged(sent, sources, targets):
            self.log.append("copy begins")
            return copy(sent, sources, targets)

        monkeypatch.setattr(OnHost, "_copy", logged)

    @contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, name, log):
        self.name, self.log, self.copies = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.copies += 1
        return f"copy {self.copies}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_computing_and_copying_wait_in_order_for_what_the_other_one_uses(monkeypatch):
    """However far the host is ahead of a GPU, memory of the one is not written by the other."""
    streams = Streams(monkeypatch)
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for number, block in enumerate(blocks):
        block.forward = said(streams.log, f"block {number}", block.forward)
    apply_activation_checkpointing(blocks, ActivationCheckpointConfig(mode="full"))
    apply_offload(blocks, True)
    output = blocks[1](blocks[0](torch.ones(2, 4, requires_grad=True)))

    a_copy = ["copy begins", "copying waits for computing"]
    # Each copy out has its block's time, and is over before the input's memory can be let go.
    assert streams.log == [
        *a_copy,
        *("block 0", "computing waits for copy 1"),
        *a_copy,
        *("block 1", "computing waits for copy 2"),
    ]
    streams.log.clear()

    output.sum().backward()
    # Input 1, then input 0 beside the recomputation of block 1.
    assert streams.log == [
        *a_copy,
        "computing waits for copy 3",
        *a_copy,
        "block 1",
        *("computing waits for copy 4", "block 0"),
    ]


def said(log, name, forward):
    def saying(x):
        log.append(name)
        return forward(x)

    return saying


def test_what_was_fetched_and_not_taken_is_written_before_its_memory_is_let_go(monkeypatch):
    streams, offload = Streams(monkeypatch), Offload()
    sent = [offload._send(torch.ones(2)) for _ in range(2)]
    offload._unpack(sent[1])  # fetches the other one too, by the fourth copy
    streams.log.clear()
    del sent
    assert streams.log == ["computing waits for copy 4"]


@pytest.mark.parametrize(("numbers", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_host_memory_is_taken_in_pieces_so_that_little_is_lost_to_rounding(numbers, sizes, monkeypatch):
    """Torch rounds each page-locked piece up to a power of two."""
    monkeypatch.setattr("torchtitan_rd.parallelism.offload.PIECE_BYTES", 16)
    tensor = torch.arange(float(numbers)).view(1, numbers, 1).expand(1, numbers, 1)
    sent = Offload()._send(tensor)
    assert [piece.numel() for piece in sent.host] == sizes
    assert torch.equal(sent.take(), tensor)


def test_the_input_of_a_block_is_let_go_until_backward():
    """Its storage is gone although the graph that will need it is there."""
    gone = {}
    for offload in (False, True):
        blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
        apply_activation_checkpointing(blocks, ActivationCheckpointConfig(mode="full"))
        apply_offload(blocks, offload)
        between = blocks[0](torch.ones(2, 4, requires_grad=True))
        storage = StorageWeakRef(between.untyped_storage())
        output = blocks[1](between)
        del between
        gone[offload] = storage.expired()
        output.sum().backward()
    assert gone == {False: False, True: True}


def test_without_gradients_nothing_is_sent(monkeypatch):
    blocks = [nn.Linear(4, 4)]
    apply_activation_checkpointing(blocks, ActivationCheckpointConfig(mode="full"))
    apply_offload(blocks, True)
    monkeypatch.setattr("torchtitan_rd.parallelism.offload.OnHost", None)
    with torch.no_grad():
        blocks[0](torch.ones(2, 4))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "none", "offload": True}, 'offload has an effect on mode = "full" alone'),
        ({"mode": "selective", "keep": "attention"}, 'keep has an effect on mode = "full" alone'),
        ({"mode": "full", "keep_every": 2}, 'keep_every = 2 has no effect without keep = "attention"'),
        ({"mode": "full", "keep": "attention", "keep_every": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_without_an_effect_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        ActivationCheckpointConfig(**keys)


@pytest.mark.gpu
def test_on_a_gpu_the_inputs_of_blocks_leave_its_memory_however_far_the_host_is_ahead():
    """Memory counts until the streams that use it are done, which torch's `max_memory_allocated` leaves out.
    The first of two steps makes the page-locked memory, for which the host waits.
    """
    needs_gpus(1)
    device = torch.device("cuda")
    peaks, gradients = {}, {}
    for offload in (False, True):
        torch.manual_seed(0)
        blocks = [nn.Linear(4096, 4096, device=device) for _ in range(16)]
        apply_activation_checkpointing(blocks, ActivationCheckpointConfig(mode="full"))
        apply_offload(blocks, offload)
        x = torch.randn(16384, 4096, device=device, requires_grad=True)
        for _ in range(2):
            x.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["active_bytes.all.current"]
            y = x
            for block in blocks:
                y = block(y)
            y.square().sum().backward()
            torch.cuda.synchronize()
            peaks[offload] = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
        gradients[offload] = x.grad
    assert torch.equal(gradients[True], gradients[False])
    assert peaks[False] - peaks[True] > 10 * x.nbytes
