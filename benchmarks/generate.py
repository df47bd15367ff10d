"""Generation of our Llama and of a raven against transformers' `generate` on the Llama's weights:
CPU time and aten ops.

    python benchmarks/generate.py [--rounds 5] [--contexts 64 256 1024] [--new 64]

One thread, float32, batch 1, greedy, a static prompt: the Llama and the raven of benchmarks/train_step.py (10
490 112 parameters; width 256, 2 + 4 + 2 blocks, 8 iterations). A token's time is the CPU time of a run with
`new` tokens less that of one with a single new token, so that the prompt does not count; the least of all
rounds, the peers taking turns. Ops repeat exactly, and must be the same at every context.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.one_thread import start_with_settings

if __name__ == "__main__":
    start_with_settings()

import torch
import transformers

from benchmarks import train_step
from benchmarks.count_ops import CountOps
from torchtitan_rd.inference import Loaded, Settings, generate
from torchtitan_rd.inference.loading import Source, lay_out
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.llama.shape import LlamaShape
from torchtitan_rd.models.raven.shape import RavenShape

LLAMA, RAVEN = train_step.CONFIG, train_step.RAVEN_CONFIG
VOCAB, DEPTH = LLAMA.vocab_size, RAVEN.mean_recurrence

Run = Callable[[list[int], int], list[int]]
"""(ids of the prompt, number of new tokens) -> the new tokens."""


@torch.no_grad()
def fresh(family: str, shape: LlamaShape | RavenShape) -> Loaded:
    spec = get_spec(family)
    model = spec.build(shape).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, fill in spec.inits(model).items():
        fill(parameters[name], generator)
    return Loaded(spec, shape, lay_out(model), None, Source(Path(), None, VOCAB, ()))


def of_transformers(ours: Loaded) -> transformers.PreTrainedModel:
    """The same weights in transformers' class."""
    layout, shape = ours.spec.hf, ours.shape
    config = transformers.LlamaConfig(
        **{k: v for k, v in layout.config_fields(shape).items() if v is not None}
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    names, weights = layout.key_map(shape), dict(ours.model.named_parameters())
    theirs.load_state_dict({names[name]: layout.to_hf(name, weights[name], shape) for name in names})
    theirs.generation_config.pad_token_id = 0
    return theirs


def runs() -> dict[str, Run]:
    llama, raven = fresh("llama3", LLAMA), fresh("raven", RAVEN)
    theirs = of_transformers(llama)

    def peer(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        common = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **common)[0, len(prompt) :].tolist()

    def ours(model: Loaded, **options: object) -> Run:
        return lambda prompt, new: (
            generate(model, [prompt], Settings(max_new_tokens=new, **options)).rows[0].ids
        )

    return {
        f"transformers {transformers.__version__} Llama": peer,
        "our Llama": ours(llama),
        f"our raven, {DEPTH} iterations": ours(raven, depth=DEPTH, init_scale=0.0),
    }


def cpu_seconds(run: Run, prompt: list[int], new: int) -> float:
    start = time.process_time()
    run(prompt, new)
    return time.process_time() - start


def ops_per_token(run: Run, prompt: list[int]) -> float:
    """From runs with 5 and with 9 new tokens. A first one has warmed up what is made once."""
    counts = []
    for new in (5, 5, 9):
        with CountOps() as counted:
            run(prompt, new)
        counts.append(counted.ops)
    return (counts[2] - counts[1]) / 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    peers = runs()
    generator = torch.Generator().manual_seed(1)
    for context in arguments.contexts:
        prompt = torch.randint(VOCAB, (context,), generator=generator).tolist()
        first, *others = (run(prompt, 16) for name, run in peers.items() if "Llama" in name)
        if any(other != first for other in others):
            raise SystemExit(f"the Llamas do not agree: {first} and {others}")

        best = dict.fromkeys(peers, float("inf"))
        for _ in range(arguments.rounds):
            for name, run in peers.items():
                more, one = cpu_seconds(run, prompt, arguments.new + 1), cpu_seconds(run, prompt, 1)
                best[name] = min(best[name], (more - one) / arguments.new)
        base = best[next(iter(peers))]
        print(f"context {context}")
        for name, run in peers.items():
            ops = ops_per_token(run, prompt)
            print(
                f"  {name:<34}{best[name] * 1e3:8.2f} ms a token {best[name] / base:6.2f}x {ops:8.1f} ops",
                flush=True,
            )


if __name__ == "__main__":
    main()
