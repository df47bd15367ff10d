"""Which token is drawn: the filters against transformers', and draws that depend on nothing
but (seed, row).
"""

import pytest
import torch
from transformers.generation import logits_process as theirs

from tests.inference.common import loaded, prompts
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.inference import Drafting, ExitPolicy, Sampling, Settings, generate
from torchtitan_rd.inference.sampling import choose, penalise, restrict, uniforms

FILTERS = {
    "temperature": ({"temperature": 0.7}, [theirs.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 5}, [theirs.TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.6}, [theirs.TopPLogitsWarper(0.6)]),
    "min_p": ({"min_p": 0.2}, [theirs.MinPLogitsWarper(0.2)]),
    "all": (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        [
            theirs.TemperatureLogitsWarper(1.5),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.1),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_what_transformers_leaves(name):
    fields, processors = FILTERS[name]
    logits = 3 * torch.randn(16, 61, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    for processor in processors:
        expected = processor(None, expected)
    found = restrict(logits, Sampling(**{"temperature": 1.0, **fields}))
    assert torch.equal(found, expected) and (name == "temperature" or found.isinf().any())


def test_the_token_that_crosses_top_p_stays():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert restrict(p.log(), Sampling(1.0, top_p=0.6)).isinf().tolist() == [[False, False, True]]


def test_a_repetition_costs_what_it_costs_in_transformers():
    logits = torch.randn(3, 61, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 5], [0, 2, 60], [7, 8, 9]])
    seen = torch.zeros(3, 61, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(
        penalise(logits, seen, 1.7), theirs.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    )


def test_a_penalty_counts_the_prompt_and_new_tokens_but_no_padding():
    model, given = loaded("llama3"), prompts(2, 6)
    plain = generate(model, given, Settings(max_new_tokens=25)).rows
    penalised = Settings(max_new_tokens=25, sampling=Sampling(repetition_penalty=1e9))
    assert len(set(plain[0].ids)) < 25
    for prompt, answer in zip(given, generate(model, given, penalised).rows, strict=True):
        assert len(set(answer.ids)) == 25 and not set(answer.ids) & set(prompt)
    (alone,) = generate(model, given[:1], penalised).rows
    assert alone.ids == generate(model, given, penalised).rows[0].ids  # its padding is id 0


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    ends = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    found = choose(p.log().expand(10_000, -1), Sampling(1.0), ends)
    assert (found.bincount(minlength=4) / 10_000 - p).abs().max() < 2e-4


def test_a_row_draws_the_same_in_any_batch():
    model, given = loaded("raven"), prompts(6, 3, 6)
    settings = Settings(max_new_tokens=10, depth=3, seed=7, sampling=Sampling(1.0, top_k=30))
    together = [answer.ids for answer in generate(model, given, settings).rows]
    alone = [generate(model, [prompt], settings, numbers=[i]).rows[0].ids for i, prompt in enumerate(given)]
    assert together == alone
    assert together != [
        answer.ids for answer in generate(model, given, Settings(10, Sampling(1.0), 8, depth=3)).rows
    ]
    same = generate(model, [given[0]] * 2, settings).rows
    assert same[0].ids != same[1].ids
    assert torch.equal(uniforms(7, [2], 5)[0], uniforms(7, [0, 2], 9)[1, :5])


@pytest.mark.parametrize(
    "fields",
    [
        *({"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}),
        *({"min_p": -0.1}, {"repetition_penalty": 0.0}),
    ],
)
def test_a_value_out_of_range_is_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Sampling(**fields)


def test_the_smallest_top_p_leaves_the_most_likely_token():
    logits = torch.randn(4, 61, generator=torch.Generator().manual_seed(0))
    left = ~restrict(logits, Sampling(1.0, top_p=1e-12)).isinf()
    assert left.sum(-1).tolist() == [1] * 4 and torch.equal(left.float().argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 1e-40}, {"temperature": 1e-320}, {"repetition_penalty": float("inf")}],
    ids=["overflows", "is no float32", "infinite penalty"],
)
def test_settings_that_would_draw_from_nan_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_the_least_temperature_draws_the_most_likely_token():
    logits = 1e4 * torch.randn(3, 61, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, Sampling(1e-6), torch.rand(3).double()), logits.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_new_tokens=4),
        Settings(max_new_tokens=4, sampling=Sampling(0.7)),
        Settings(max_new_tokens=4, depth=4, exits=ExitPolicy("kl")),
        Settings(max_new_tokens=4, depth=4, drafting=Drafting(2)),
    ],
    ids=["greedy", "sampled", "adaptive", "speculative"],
)
def test_a_model_whose_logits_are_nan_writes_no_text(settings):
    model = loaded("raven")
    next(model.model.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="logits of new token 0 are NaN"):
        generate(model, prompts(3, 2), settings)
