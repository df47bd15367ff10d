"""The work of a new token does not grow with the context, but for the length of what attention reads."""

import pytest
import torch

from benchmarks.count_ops import CountOps
from tests.inference.common import loaded, prompts
from torchtitan_rd.inference import ExitPolicy, Stepper, think
from torchtitan_rd.models.raven.steps import RavenSteps

NEVER = ExitPolicy("kl", 0.0)
ALWAYS = ExitPolicy("latent-diff", float("inf"))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("family", "kv", "policy"),
    [
        *(("llama3", "full", None), ("raven", "full", None), ("raven", "full", NEVER)),
        ("raven, no injection", "full", None),
        *(("raven", "latest-m4", ALWAYS), ("raven", "compress-s2", NEVER)),
    ],
)
@torch.no_grad()
def test_operations_of_a_new_token_are_the_same_at_every_context(family, kv, policy, padded, monkeypatch):
    family, _, rest = family.partition(", ")
    model = loaded(family, max_seq_len=4096, **({"injection": "none"} if rest else {}))
    asked, first_state = [], RavenSteps.first_state  # no operation of torch, where there is no noise
    monkeypatch.setattr(
        RavenSteps, "first_state", lambda self, *place: (asked.append(place), first_state(self, *place))[1]
    )
    found = []
    for context in (64, 256, 1024):
        fields = {"depth": 4, "strategy": kv} if family == "raven" else {}
        stepper = Stepper(model.spec, model.model, batch=2, positions=context + 3, **fields)
        tokens, real = torch.tensor(prompts(context, context)), torch.ones(2, context, dtype=torch.bool)
        real[1, :3] = not padded
        think(stepper, tokens, real=real, policy=policy)
        think(stepper, tokens[:, :1], policy=policy)
        asked.clear()
        with CountOps() as ops:
            think(stepper, tokens[:, :1], policy=policy)
        found.append((ops.ops, ops.elements, len(asked)))
    assert len(set(found)) == 1 and found[0][0] > 50, found
