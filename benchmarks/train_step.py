"""Training step of our Llama against transformers' (and torchtitan's where it imports),
and of a raven: CPU time, ops.

    python benchmarks/train_step.py [--rounds 5] [--runs 1]

One thread, float32, 10 490 112 parameters, 4 sequences of 512 tokens: forward, loss, backward, clip to norm
1, fused AdamW. The bare models have torch's own clipping, and the loss that each trains with: ours from
torchtitan_rd.loss, the peers' torch's. `TrainStep` is what a run does, under FSDP on one gloo rank: copies of
all parameters and gradients, counts, reductions, checks. Shared machines move wall time twofold, so each
peer's figure in a run is its least CPU time of all rounds, the peers taking turns, and what is printed is the
median of the runs with their range; call +-7 % equal. Ops and FLOPs repeat exactly; the FLOPs lack the
attention of a peer that insists on its own kernel (torchtitan), for which torch has no formula on CPU.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.one_thread import start_with_settings

if __name__ == "__main__":
    start_with_settings()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.count_ops import CountOps
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import Batch
from torchtitan_rd.loss import cross_entropy_sums
from torchtitan_rd.model_spec import NO_INPUTS, ForwardInputs
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.llama.shape import LlamaShape, count_flops
from torchtitan_rd.models.raven.shape import RavenShape
from torchtitan_rd.models.raven.shape import count_flops as raven_flops
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.train_step import TrainStep

BATCH, SEQ_LEN = 4, 512
RAVEN_DRAW = (4, 4)  # iterations without and with gradient
RAVEN_CONFIG = RavenShape(
    dim=256,
    n_heads=4,
    ffn_dim=1024,
    n_layers_prelude=2,
    n_layers_core=4,
    n_layers_coda=2,
    mean_recurrence=8,
    mean_backprop_depth=4,
    vocab_size=8192,
)
CONFIG = LlamaShape(dim=256, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=768, vocab_size=8192)


def ours() -> nn.Module:
    spec = get_spec("llama3")
    model = spec.build(CONFIG)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, fill in spec.inits(model).items():
            fill(parameters[name], generator)
    return model


def transformers_llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    from torchtitan_rd.models.llama.hf import config_fields

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = LlamaForCausalLM(
                LlamaForCausalLM.config_class(**config_fields(CONFIG), use_cache=False)
            )

        def forward(self, tokens):
            return self.llama(tokens).logits

    return Logits()


def torchtitan_llama() -> nn.Module:
    """Of the 0.2 releases; the later ones have no SDPA attention for language models."""
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    arguments = TransformerModelArgs(
        dim=256, n_layers=8, n_heads=8, n_kv_heads=4, vocab_size=8192, multiple_of=256, ffn_dim_multiplier=1.0
    )
    model = Transformer(arguments)
    with torch.no_grad():
        model.init_weights()
    return model


def raven() -> nn.Module:
    """Not a peer: the depth-recurrent model at a draw of RAVEN_DRAW, for its cost in units of a Llama's."""
    from torchtitan_rd.models.raven.init import inits
    from torchtitan_rd.models.raven.model import Raven

    class AtOneDepth(nn.Module):
        def __init__(self):
            super().__init__()
            self.raven = Raven(RAVEN_CONFIG)
            parameters = dict(self.raven.named_parameters())
            with torch.no_grad():
                for name, fill in inits(self.raven).items():
                    fill(parameters[name], torch.Generator().manual_seed(0))

        def forward(self, tokens):
            state = torch.randn(*tokens.shape, RAVEN_CONFIG.dim)
            return self.raven(tokens, num_steps=RAVEN_DRAW, initial_state=state)

    return AtOneDepth()


PEERS = {
    "torchtitan_rd": ours,
    "transformers": transformers_llama,
    "torchtitan": torchtitan_llama,
    "raven": raven,
}


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (BATCH, SEQ_LEN) of the one batch that all train on."""
    ids = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def our_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sums(logits, labels).objective / labels.numel()


def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def bare_step(name: str, model: nn.Module) -> Callable[[], float]:
    """-> a function that makes one update and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, labels = text()
    loss_of = our_loss if name in ("torchtitan_rd", "raven") else torch_loss

    def step() -> float:
        loss = loss_of(model(tokens), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def real_step(name: str) -> Callable[[], float]:
    """The same update by the step of a run: TrainStep over a model that FSDP shards over one rank."""
    config = JobConfig.model_validate(
        {
            "model": {"name": name},
            "optimizer": {"lr": 1e-4},
            "training": {"mixed_precision_param": "float32", "local_batch_size": BATCH, "seq_len": SEQ_LEN},
            "activation_checkpoint": {"mode": "none"},
        }
    )
    shape = RAVEN_CONFIG if name == "raven" else CONFIG
    mesh = ParallelDims.resolve(config.parallelism, 1).build_mesh("cpu")
    model = build_model(config, get_spec(name), shape, mesh, torch.device("cpu"))

    def inputs(step: int, number: int, batch: Batch) -> ForwardInputs:
        if name != "raven":
            return NO_INPUTS
        state = torch.randn(BATCH, SEQ_LEN, RAVEN_CONFIG.dim)
        return ForwardInputs({"num_steps": RAVEN_DRAW, "initial_state": state}, RAVEN_DRAW)

    update = TrainStep(
        model,
        build_optimizer(model, config.optimizer),
        config.training,
        torch.device("cpu"),
        forward_inputs=inputs,
    )
    batch = Batch(*text())
    return lambda: update(1, [batch]).loss


def build_peers() -> dict[str, Callable[[], float]]:
    steps = {}
    for name, build in PEERS.items():
        try:
            torch.manual_seed(0)
            steps[name] = bare_step(name, build())
        except Exception as error:  # a peer may be absent, or need a GPU build to import
            print(f"{name}: not compared: {type(error).__name__}: {error}")
    return steps | {"llama, TrainStep": real_step("llama3"), "raven, TrainStep": real_step("raven")}


def count(step: Callable[[], float]) -> tuple[int, int]:
    """-> aten ops and FLOPs of a step; the latter under the math kernel, since the CPU kernel
    has no formula.
    """
    with CountOps() as ops:
        step()
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        step()
    return ops.ops, flops.get_total_flops()


def least_times(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """One run: CPU seconds of a step, the least of all rounds, in which the peers take turns."""
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step(), step()
            least[name] = min(least[name], (time.process_time() - start) / 2)
            gc.collect()
    return least


def shown(values: list[float], digits: int = 3) -> str:
    """Median, and the range where there are several."""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{median(values):.{digits}f}{spread}"


def release(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer in a run")
    parser.add_argument("--runs", type=int, default=1, help="runs that medians are over")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("; ".join(release(package) for package in ("torch", "transformers", "torchtitan")))
    steps = build_peers()
    for step in steps.values():
        step(), step()
    counts = {name: count(step) for name, step in steps.items()}
    gc.disable()
    runs = [least_times(steps, arguments.rounds) for _ in range(arguments.runs)]

    tokens = BATCH * SEQ_LEN
    print(f"{arguments.runs} runs of {arguments.rounds} rounds")
    print(f"{'peer':18} {'CPU us/token':>18} {'ours/peer':>20} {'aten ops':>9} {'FLOPs':>16}")
    for name in steps:
        times = shown([run[name] / tokens * 1e6 for run in runs], 0)
        ratio = shown([run["torchtitan_rd"] / run[name] for run in runs])
        ops, flops = counts[name]
        print(f"{name:18} {times:>18} {ratio:>20} {ops:9} {flops:16}")

    theory = count_flops(CONFIG, SEQ_LEN)
    print(
        f"theory: {int(tokens * theory.matmul)} FLOPs in weights, "
        f"{int(tokens * theory.attention_full)} in attention"
    )
    if "transformers" in steps:
        theory = raven_flops(RAVEN_CONFIG, SEQ_LEN, RAVEN_DRAW)
        total = int(tokens * (theory.matmul + theory.attention_full))
        times = shown([run["raven"] / run["transformers"] for run in runs], 2)
        print(f"raven at {RAVEN_DRAW}: {times} times transformers' Llama (target 3.1); theory: {total} FLOPs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
