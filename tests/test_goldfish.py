"""Labels that are left out of the loss, and the guard that ends a run."""

import pytest
import torch
from pydantic import ValidationError

from torchtitan_rd.loss import (
    ObjectiveKeys,
    _uniforms,
    count_valid,
    exceeds_guard,
    goldfish_labels,
    guard_error,
)

HASH = ObjectiveKeys(goldfish_strategy="hash-table")


def left_out(labels, config):
    return [row.nonzero().flatten().tolist() for row in goldfish_labels(labels, config) == -100]


def test_the_table_is_the_ancestors():
    assert _uniforms(torch.device("cpu"))[:3].tolist() == pytest.approx(
        [0.233684, 0.441264, 0.741148], abs=1e-6
    )


def test_the_hash_leaves_out_the_ancestors_positions_in_every_row():
    labels = torch.arange(1, 41).repeat(2, 1)
    assert left_out(labels, HASH) == [[18, 21, 32, 33, 37, 38]] * 2
    assert torch.equal(labels, torch.arange(1, 41).repeat(2, 1)), "the caller's labels stay"


def test_the_hash_is_that_of_the_wrapped_product_with_a_floor_modulo():
    labels = torch.randint(1, 65536, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = []
    for last in range(12, 200):
        product = 1
        for label in labels[0, last - 12 : last + 1].tolist():
            product *= label
        wrapped = (product + 2**63) % 2**64 - 2**63
        if _uniforms(torch.device("cpu"))[wrapped % 1_000_003] < 0.25:  # Python's modulo is the floor one
            expected.append(last)
    assert left_out(labels, HASH) == [expected] and 20 < len(expected) < 80


def test_a_passage_loses_the_same_labels_wherever_it_stands():
    passage = torch.randint(1, 1000, (60,), generator=torch.Generator().manual_seed(1))
    shifted = torch.cat([torch.full((7,), 5), passage])
    alone, later = (left_out(row.unsqueeze(0), HASH)[0] for row in (passage, shifted))
    assert alone and [p - 7 for p in later if p - 7 >= 12] == alone


def test_about_one_label_in_k_is_left_out():
    labels = torch.randint(1, 1000, (4, 20000), generator=torch.Generator().manual_seed(2))
    for k in (3, 4, 10):
        masked = goldfish_labels(labels, ObjectiveKeys(goldfish_strategy="hash-table", goldfish_k=k))
        assert 1 - count_valid(masked).item() / labels.numel() == pytest.approx(1 / k, rel=0.05)


@pytest.mark.parametrize("length", [1, 12])
def test_a_row_shorter_than_the_window_keeps_all(length):
    labels = torch.arange(1, length + 1).unsqueeze(0)
    assert torch.equal(goldfish_labels(labels, HASH), labels)


def test_static_leaves_out_every_kth_from_the_start():
    config = ObjectiveKeys(goldfish_strategy="static", goldfish_k=4, goldfish_start_position=2)
    assert left_out(torch.arange(1, 13).repeat(2, 1), config) == [[2, 6, 10]] * 2


def test_none_returns_the_labels_themselves():
    labels = torch.arange(40).unsqueeze(0)
    assert goldfish_labels(labels, ObjectiveKeys()) is labels


IDLE = {
    "k without a strategy": {"goldfish_k": 3},
    "a start for the hash": {"goldfish_strategy": "hash-table", "goldfish_start_position": 1},
    "a window for static": {"goldfish_strategy": "static", "goldfish_context_width": 5},
    "tokens without a guard": {"loss_guard_after_tokens": 5},
}


@pytest.mark.parametrize("mistake", IDLE)
def test_a_key_without_effect_is_refused(mistake):
    with pytest.raises(ValidationError, match="has no effect"):
        ObjectiveKeys(**IDLE[mistake])


def test_leaving_out_every_label_is_refused():
    with pytest.raises(ValidationError, match="goldfish_k"):
        ObjectiveKeys(goldfish_strategy="static", goldfish_k=1)


def test_the_guard_stops_only_above_its_loss_and_after_its_tokens():
    guard = ObjectiveKeys(loss_guard=6.0, loss_guard_after_tokens=100)
    cases = (
        (guard, 9.0, 100, False),
        (guard, 6.0, 101, False),
        (guard, 6.5, 101, True),
        (ObjectiveKeys(), 1e9, 10**12, False),
    )
    for keys, loss, tokens, exceeded in cases:
        assert exceeds_guard(keys, torch.tensor(loss), tokens).item() is exceeded
    assert "step 4: loss 6.5000 exceeds training.loss_guard = 6.0" in str(guard_error(guard, 4, 6.5, 101))
