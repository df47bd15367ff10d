"""Continuous chain of thought: a token's recurrence starts where that of the one before it ended."""

import pytest
import torch

from tests.inference.common import loaded, prompts
from torchtitan_rd.inference import ExitPolicy, Settings, Stepper, generate, think

DEPTH = 4


@torch.no_grad()
def by_hand(model, prompt: list[int], count: int) -> list[int]:
    """The whole sequence once more for every token: the prompt from noise,
    each later position from the final state of the one before it.
    """
    steps = model.spec.steps(model.model)
    first = [steps.first_state(0, position, 1.0) for position in range(len(prompt))]
    ids, found = list(prompt), []
    finals = []
    handle = model.model.transformer.recurrence.iteration.register_forward_hook(
        lambda m, args, out: finals.append(out)
    )
    for _ in range(count):
        finals.clear()
        logits = model.model(
            torch.tensor([ids]), num_steps=(DEPTH, 0), initial_state=torch.stack(first)[None]
        )
        found.append(int(logits[0, -1].argmax()))
        ids.append(found[-1])
        first.append(finals[-1][0, -1])
    handle.remove()
    return found


@pytest.mark.parametrize("lengths", [(6,), (6, 3)], ids=["one", "two, padded"])
def test_tokens_are_those_of_states_that_go_on(lengths):
    model, given = loaded("raven"), prompts(*lengths)
    rows = generate(model, given, Settings(max_new_tokens=10, depth=DEPTH, continuous=True)).rows
    assert [answer.ids for answer in rows] == [by_hand(model, prompt, 10) for prompt in given]
    assert [answer.ids for answer in rows] != [
        answer.ids for answer in generate(model, given, Settings(max_new_tokens=10, depth=DEPTH)).rows
    ]


@torch.no_grad()
def test_a_row_that_left_early_hands_on_the_state_it_left_with():
    model = loaded("raven")
    policy = ExitPolicy("latent-diff", 0.5)
    given = torch.tensor(prompts(5, 5))
    stepper = Stepper(model.spec, model.model, batch=2, positions=5, depth=14)
    together = think(stepper, given, policy=policy)
    assert together.steps[0] != together.steps[1]
    for row in range(2):
        alone = Stepper(model.spec, model.model, batch=1, positions=5, depth=int(together.steps[row]))
        expected = think(alone, given[row : row + 1])
        torch.testing.assert_close(together.state[row], expected.state[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.logits[row], expected.logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_parts_of_a_forward_make_what_think_makes():
    """As the module's own example has it, for two rows."""
    model, given = loaded("raven"), torch.tensor(prompts(5, 5))
    stepper = Stepper(model.spec, model.model, batch=2, positions=5, depth=DEPTH)
    e, s = stepper.embed(given), stepper.first_state()
    for step in range(DEPTH):
        s = stepper.iterate(s, e, step)
    found = stepper.predict(s, keep=5)
    whole = Stepper(model.spec, model.model, batch=2, positions=5, depth=DEPTH)
    torch.testing.assert_close(found[:, -1], think(whole, given).logits, atol=1e-5, rtol=1e-4)
    assert found.shape == (2, 5, model.shape.vocab_size)
    first = torch.stack(
        [model.spec.steps(model.model).first_state(0, position, 1.0) for position in range(5)]
    )
    expected = model.model(given, num_steps=(DEPTH, 0), initial_state=first.expand(2, -1, -1))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
