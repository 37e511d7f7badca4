"""The order of release against a list, past many rounds of its ring."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jaxserve.cache.release_order import ReleaseOrder


@pytest.mark.parametrize("seed", range(12))
def test_is_a_queue_from_which_anybody_may_leave(seed: int) -> None:
    dice = random.Random(seed)
    num_blocks = dice.choice([1, 2, 5, 30])
    order, model = ReleaseOrder(num_blocks), []
    for _ in range(400):
        outside = [block for block in range(num_blocks) if block not in model]
        move = dice.random()
        if move < 0.5 and outside:
            pushed = dice.sample(outside, dice.randint(1, len(outside)))
            order.push(np.array(pushed))
            model += pushed
        elif move < 0.8 and model:
            taken = dice.sample(model, dice.randint(1, len(model)))
            order.take_out(np.array(taken))
            model = [block for block in model if block not in taken]
        else:
            count = dice.randint(0, len(model))
            assert order.pop(count).tolist() == model[:count]
            model = model[count:]
        assert order.count == len(model)
        assert order.in_order().tolist() == model
        assert [block for block in range(num_blocks) if block in order] == sorted(model)
        order.check_integrity()


def test_a_block_that_comes_back_stands_at_the_end() -> None:
    order = ReleaseOrder(4)
    order.push(np.array([3, 1, 2]))
    order.take_out(np.array([3]))
    order.push(np.array([3]))
    assert order.pop(3).tolist() == [1, 2, 3]


def test_many_dead_entries_are_passed_over() -> None:
    """The one live entry stands behind more dead ones than one window has."""
    order = ReleaseOrder(300)
    order.push(np.arange(300))
    order.take_out(np.arange(299))
    assert order.pop(1).tolist() == [299]
    with pytest.raises(AssertionError, match="1 blocks asked, 0 here"):
        order.pop(1)
    with pytest.raises(AssertionError, match="not all here"):
        order.take_out(np.array([3]))
