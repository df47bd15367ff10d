"""Self-speculative decoding: the tokens of plain greedy decoding, for fewer passes through the model."""

import pytest

from tests.inference.common import loaded, prompts
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import Drafting, ExitPolicy, Sampling, Settings, generate

DEPTH = 10


@pytest.mark.parametrize("lookahead", [1, 3, 8])
@pytest.mark.parametrize("lengths", [(7,), (7, 2, 5)], ids=["one", "three, padded"])
@pytest.mark.parametrize("steps", [1, 6, 9])
def test_the_output_is_that_of_greedy_decoding(steps, lengths, lookahead):
    model, given = loaded("raven", sharp=1.0), prompts(*lengths)
    plain = generate(model, given, Settings(max_new_tokens=20, depth=DEPTH))
    drafted = generate(
        model, given, Settings(max_new_tokens=20, depth=DEPTH, drafting=Drafting(steps, lookahead))
    )
    assert [answer.ids for answer in drafted.rows] == [answer.ids for answer in plain.rows]
    assert drafted.rows[0].steps == [DEPTH] * 20
    assert plain.drafted == 0 and drafted.drafted >= 19 and 0 <= drafted.accepted <= drafted.drafted


def test_good_drafts_are_accepted_and_verified_from_where_they_stand():
    model, given = loaded("raven", block="post", injection="add", init_strategy="scaled"), prompts(7)
    iteration = model.model.transformer.recurrence.iteration

    def run(drafting):
        widths, inject = [], iteration.inject
        iteration.inject = lambda s, e: (widths.append(s.shape[1]), inject(s, e))[1]
        report = generate(model, given, Settings(max_new_tokens=33, depth=DEPTH, drafting=drafting))
        del iteration.inject
        return widths, report

    plain, _ = run(None)
    assert plain == [7] * DEPTH + [1] * 32 * DEPTH
    widths, report = run(Drafting(steps=6, lookahead=8))
    assert report.drafted == report.accepted == 32
    # The prompt, then four times: 8 drafts of 6 iterations each, and the 4 iterations that all of them lack.
    assert widths == [7] * DEPTH + ([1] * 8 * 6 + [8] * 4) * 4


def test_a_lower_threshold_accepts_more():
    model, given = loaded("raven"), prompts(7)

    def run(threshold):
        drafting = Drafting(steps=2, lookahead=4, threshold=threshold)
        return generate(model, given, Settings(max_new_tokens=40, depth=DEPTH, drafting=drafting))

    strict, loose = run(1.0), run(1e-9)
    assert strict.accepted / strict.drafted < 1 and loose.accepted == loose.drafted == 39
    assert loose.rows[0].ids != strict.rows[0].ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": Sampling(1.0)}, "temperature 0"),
        ({"sampling": Sampling(repetition_penalty=1.1)}, "temperature 0"),
        ({"continuous": True}, "no continuous"),
        ({"exits": ExitPolicy("kl")}, "no exit criterion"),
        ({"kv": "compress-s2"}, "mixes iterations"),
        ({"depth": 4}, "below the depth of 4"),
    ],
)
def test_what_drafts_do_not_go_with_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        options = {"depth": DEPTH, **settings}
        generate(loaded("raven"), prompts(3), Settings(max_new_tokens=2, drafting=Drafting(4), **options))
