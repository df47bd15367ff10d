"""Sums over valid tokens, with and without z-loss."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan_rd.loss import count_valid, cross_entropy_sums


def example():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 3:] = -100
    return logits, labels


def test_ignored_labels_count_neither_in_the_sum_nor_in_the_number():
    logits, labels = example()
    sums = cross_entropy_sums(logits, labels)
    kept = labels != -100
    assert count_valid(labels) == 8
    torch.testing.assert_close(sums.objective, F.cross_entropy(logits[kept], labels[kept], reduction="sum"))
    assert torch.equal(sums.objective, sums.cross_entropy)


@pytest.mark.parametrize("weight", [1e-4, 0.5])
def test_z_loss_adds_the_squared_logsumexp_of_valid_tokens_to_the_objective_alone(weight):
    logits, labels = example()
    sums = cross_entropy_sums(logits, labels, weight)
    kept = labels != -100
    expected = sums.cross_entropy + weight * logits[kept].logsumexp(-1).square().sum()
    torch.testing.assert_close(sums.objective, expected)
    sums.objective.backward()
    assert not logits.grad[~kept].any()
    assert torch.equal(sums.cross_entropy, cross_entropy_sums(logits, labels).cross_entropy)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_gradient_of_the_cross_entropy_is_that_of_torch(scale):
    """scale: of the logits; at 30 most tokens are certain, which is where exp and log lose digits."""
    logits, labels = example()
    logits = (scale * logits.detach()).double().requires_grad_()
    (3 * cross_entropy_sums(logits, labels).objective).backward()
    found, logits.grad = logits.grad, None
    (3 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")).backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-14)


def test_a_batch_without_a_valid_label_has_loss_and_gradient_zero():
    logits, labels = example()
    sums = cross_entropy_sums(logits, torch.full_like(labels, -100))
    sums.objective.backward()
    assert sums.cross_entropy == 0 and not logits.grad.any()
