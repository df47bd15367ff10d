"""Cached generation against the model's own forward over the whole sequence, one token after the other."""

import pytest
import torch

from tests.inference.common import greedy_without_cache, loaded, logits_without_cache, prompts
from torchtitan_rd.inference import Settings, Stepper, generate, think

COUNT = 12
FAMILIES = {
    "llama": ("llama3", {}),
    "llama, tied": ("llama3", {"tie_word_embeddings": True, "n_kv_heads": 4}),
    "raven": ("raven", {}),
    "raven, grouped keys": ("raven", {"n_kv_heads": 2, "qk_bias": False}),
    "raven, grouped keys with biases": ("raven", {"n_kv_heads": 2}),
    "raven, post-norm": ("raven", {"block": "post", "injection": "add", "init_strategy": "scaled"}),
    "raven, no injection": ("raven", {"injection": "none"}),
    "raven, no prelude, no coda": ("raven", {"n_layers_prelude": 0, "n_layers_coda": 0}),
}


def depth_of(family: str) -> dict[str, int]:
    return {"depth": 5} if family == "raven" else {}


@pytest.mark.parametrize("lengths", [(9,), (9, 1, 5, 7)], ids=["one", "four, padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_greedy_generation_is_that_without_a_cache(name, lengths):
    family, fields = FAMILIES[name]
    model = loaded(family, **fields)
    given = prompts(*lengths)
    found = generate(model, given, Settings(max_new_tokens=COUNT, seed=4, **depth_of(family)))
    for prompt, answer in zip(given, found.rows, strict=True):
        seeded = {"seed": 4, **depth_of(family)} if family == "raven" else {}
        assert answer.ids == greedy_without_cache(model, prompt, COUNT, **seeded)
        assert answer.ended == "length" and answer.steps == ([5] * COUNT if family == "raven" else [])


@pytest.mark.parametrize("kv", ["full", "latest-m4"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_raven_repeats_itself_from_zero_and_from_seeded_states(scale, kv):
    model, given = loaded("raven"), prompts(6, 3)
    settings = Settings(max_new_tokens=COUNT, depth=4, init_scale=scale, seed=1, kv=kv)
    found = [answer.ids for answer in generate(model, given, settings).rows]
    assert found == [
        greedy_without_cache(model, prompt, COUNT, depth=4, scale=scale, seed=1) for prompt in given
    ]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_on_a_cache_are_those_of_the_whole_forward(name):
    """Which sees more than the most likely token does. The prompt is 4 tokens, or 2 and padding, the rest
    comes singly."""
    family, fields = FAMILIES[name]
    model = loaded(family, **fields)
    long, short = prompts(11, 9)
    stepper = Stepper(model.spec, model.model, batch=2, positions=11, seed=4, **depth_of(family))
    tokens, real = torch.tensor([long, [0, 0, *short]]), torch.ones(2, 11, dtype=torch.bool)
    real[1, :2] = False
    found = [think(stepper, tokens[:, :4], real=real[:, :4]).logits]
    found += [think(stepper, tokens[:, i : i + 1]).logits for i in range(4, 11)]
    seeded = {"seed": 4, **depth_of(family)} if family == "raven" else {}
    for row, ids in enumerate((long, short)):
        expected = logits_without_cache(model, ids, **seeded)[-len(found) :]
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.stack(found)[:, row], expected, atol=2e-4, rtol=1e-4)
