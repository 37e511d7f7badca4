"""The ideals that the replay of traces measures against, and a small trace whose hits are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ideal_cache import IdealCache
from benchmarks.replay import Replay, TraceKind, block_names, unbounded_hits
from benchmarks.traces import TracedRequest, data_folder, read_trace

KIND = TraceKind("", piece_len=16, block_size=16, slowdown=1, pool_sizes=())


def random_trace(seed: int, count: int) -> list[TracedRequest]:
    """Requests whose prompts are paths in a random tree: each continues one before it, from any depth on."""
    rng = np.random.default_rng(seed)
    paths: list[tuple[int, ...]] = [()]
    next_id, requests = 1, []
    for index in range(count):
        base = paths[int(rng.integers(len(paths)))]
        base = base[: int(rng.integers(len(base) + 1))]
        new = tuple(range(next_id, next_id + int(rng.integers(1, 9))))
        next_id += len(new)
        paths.append(base + new)
        length = 16 * len(base + new) - int(rng.integers(0, 16))
        requests.append(TracedRequest(0.01 * index, length, int(rng.integers(1, 40)), base + new))
    return requests


@pytest.mark.parametrize("capacity", [1, 7, 40, None])
def test_ideal_cache_keeps_what_was_used_last(capacity: int | None) -> None:
    """Against the definition: of all names ever used, the `capacity` with the latest times of use."""
    cache, last_use, clock = IdealCache(capacity), {}, 0
    for request in random_trace(0, 200):
        names = block_names(request, KIND)
        newest = sorted(last_use, key=lambda name: -last_use[name])[:capacity]
        expected = 0
        while expected < len(names) and names[expected] in newest:
            expected += 1
        assert cache.num_hits(names) == expected
        for name in reversed(names):
            clock += 1
            last_use[name] = clock
        cache.use(names)
        assert len(cache) == min(len(last_use), len(last_use) if capacity is None else capacity)


def test_names_agree_exactly_where_the_prompts_do() -> None:
    """Names of 16-token blocks out of 48-token pieces are equal where the expanded prompts are."""
    kind = TraceKind("", piece_len=48, block_size=16, slowdown=1, pool_sizes=())
    first = TracedRequest(0.0, 139, 1, (3, 5, 8))
    second = TracedRequest(0.0, 120, 1, (3, 5, 9))
    names = [block_names(request, kind) for request in (first, second)]
    assert [len(n) for n in names] == [8, 7]
    prompts = [request.prompt(48) for request in (first, second)]
    assert [len(p) for p in prompts] == [139, 120]
    for block in range(7):
        here = slice(16 * block, 16 * (block + 1))
        assert (names[0][block] == names[1][block]) == np.array_equal(prompts[0][here], prompts[1][here])


def test_hits_by_hand() -> None:
    """Prompts of 3 full blocks: new, the same again, two blocks and another, and the second after a change in front."""
    ids = [(1, 2, 3), (1, 2, 3), (1, 2, 4), (7, 8, 9)]
    trace = [TracedRequest(float(i), 48, 2, pieces) for i, pieces in enumerate(ids)]
    assert unbounded_hits(trace, KIND) == 0 + 47 + 32 + 0  # of the second, the last token is computed all the same
    run = Replay(KIND, trace, 100)
    run.run()
    assert run.scheduler.counters.prefix_hits == run.lru_hits == run.prompt_lru_hits == 79


@pytest.mark.parametrize("seed", range(3))
def test_the_scheduler_finds_all_that_a_cache_without_bound_has(seed: int) -> None:
    trace = random_trace(seed, 150)
    run = Replay(KIND, trace, 20_000)
    run.run()
    hits = run.scheduler.counters.prefix_hits
    assert hits == unbounded_hits(trace, KIND) == run.lru_hits > 0
    num_needed = sum(request.num_prompt + request.num_output - 1 for request in trace)
    assert run.num_fed == num_needed - hits, "a token was computed twice, or not at all"
    assert 0 < run.waste < 15 / 16


def test_traces_are_read_in_order_of_arrival(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 2500, "input_length": 20, "output_length": 3, "hash_ids": [4, 6]},
        {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert read_trace(path) == [TracedRequest(0.0, 5, 1, (4,)), TracedRequest(2.5, 20, 3, (4, 6))]


def test_the_unbounded_ideal_of_a_recorded_trace() -> None:
    """30.8 % of the chat trace's prompt tokens are repeated prefixes, as its publishers' ids say."""
    path = data_folder() / "traces" / "mooncake" / "conversation_first15min_scaled32_block16.jsonl"
    if not path.exists():
        pytest.skip(f"no trace at {path}")
    trace = read_trace(path)
    num_prompt = sum(request.num_prompt for request in trace)
    assert unbounded_hits(trace, KIND) / num_prompt == pytest.approx(0.308, abs=0.0005)
