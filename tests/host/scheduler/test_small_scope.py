"""All states that five blocks and three requests can reach, whatever the order of arrivals, steps, answers and faults.

JAXSERVE_SMALL_SCOPE=large searches the scopes that take minutes.
"""

from __future__ import annotations

import importlib
import os

import pytest

SHORT, LONG = ((1, 2), (1, 2), (1, 3)), ((1, 2, 3), (1, 2, 3), (1, 2, 4))  # prompts of a, b and c; b has n = 2
SMALL = [
    # block size, slots, prompts, tokens in all of each, faults of each kind on a path, aborts anywhere, what happens
    (1, 3, SHORT, (5, 5, 5), 1, False, {"fork", "hit", "swap", "restore"}),
    (2, 3, LONG, (8, 8, 6), 0, False, {"fork", "hit", "swap", "restore", "copy"}),
    (2, 0, LONG, (8, 8, 6), 0, False, {"fork", "hit", "recompute", "copy"}),
    (1, 3, SHORT, (3, 3, 4), 0, True, {"fork", "hit"}),
]
LARGE = [(*scope[:4], 1, True, scope[-1]) for scope in SMALL]
IS_LARGE = os.environ.get("JAXSERVE_SMALL_SCOPE") == "large"


@pytest.mark.parametrize(
    ("size", "slots", "prompts", "totals", "faults", "aborts", "happens"), LARGE if IS_LARGE else SMALL
)
def test_every_reachable_state(
    echo, size: int, slots: int, prompts: tuple, totals: tuple, faults: int, aborts: bool, happens: set[str]
) -> None:
    small_scope = importlib.import_module("simulation.small_scope")
    history = importlib.import_module("simulation.history")
    limits = {
        "num_blocks": 6,
        "block_size": size,
        "max_num_seqs": 2,
        "max_model_len": 8,
        "max_num_batched_tokens": 4,
        "num_swap_blocks": slots,
    }
    adds = tuple(history.Add(*asked, n=n) for *asked, n in zip("abc", prompts, totals, (1, 2, 1), strict=True))
    search = small_scope.Search(small_scope.Scope(limits, adds, faults, aborts))
    found = search.run()
    print(f"{found}, seen: {sorted(search.seen)}")
    assert found.num_states > 1000
    assert happens <= search.seen
