"""Cases that once failed, by name, and the histories that were found by seeds."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from jaxserve.cache.kv_memory import KVMemory

NAMES = (
    "a sibling wrote to what an ended one had cached",
    "a fork's co-holder changed within one commit",
    "a fork took over the count of more blocks than it has",
    "the last token was cached before it was written",
)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_history(echo, name: str, depth: int) -> None:
    history = importlib.import_module("simulation.history")
    case = importlib.import_module("simulation.regressions").REGRESSIONS[name]
    sim = history.run(history.at_depth(case, depth), deep_every=1)  # compares every output with its reference
    assert sim.results, "nobody got anything"


def test_every_history_is_replayed(echo) -> None:
    assert set(NAMES) == set(importlib.import_module("simulation.regressions").REGRESSIONS)


def test_a_restored_row_enters_no_orphan() -> None:
    """What a returning row shares need not be cached: what follows is entered from the beginning, or not at all."""
    tokens = np.arange(8, dtype=np.int32)
    memory = KVMemory(12, 2, 2, 8, 6, True)
    memory.extend(np.zeros(3, int), np.arange(3))
    blocks = memory.table.row(0).copy()
    memory.share(1, blocks[:2])  # a sibling, so that two blocks stay on the device
    slots, _, _ = memory.save(blocks, 3)
    memory.release(np.array([0]))
    memory.restore(0, slots, 3)
    assert memory.table.row(0)[:2].tolist() == blocks[:2].tolist()
    assert memory.publish(0, tokens, 2, 3, b"") == 2, "its first two are in no cache: nothing can follow them"
    memory.check_integrity([])
    assert memory.publish(0, tokens, 0, 3, b"") == 3
    assert memory.match(tokens, b"").tolist() == memory.table.row(0).tolist()
    memory.check_integrity([])
