"""What does the host pay for a block of KV memory?

    python -m benchmarks.blocks [--quick] [--json FILE]

Microseconds a block, as the scheduler uses `BlockPool` and `KVMemory`. Processor time of the thread, medians of seven
rounds. 32 sequences hold blocks; in each turn the oldest gives its own back and a new one takes as many:

* empty: blocks without content, freed and allocated;
* evicting: the same where all free blocks have content that is kept, so that each one taken is evicted;
* cached: the whole life of a block in the prefix cache: allocated, for which another is forgotten, entered, freed.

* held, kept: one holder more and one less, of blocks that others hold, and of free ones whose content is kept;
* prefix: a prompt of 512 blocks looked up, and one entered.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from benchmarks.report import Report
from jaxserve.cache.blocks import BlockPool
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.cache.prefix import namespace

BLOCK_SIZE = 16
COUNTS = (1, 16, 64, 512)
NUM_HELD = 32
SALT = namespace("model", b"")


def us_a_block(turn: Callable[[], object], num_turns: int, count: int) -> float:
    """Median over seven rounds of `num_turns` turns that handle `count` blocks each."""
    laps_ns = []
    for _ in range(7):
        start = time.thread_time_ns()
        for _ in range(num_turns):
            turn()
        laps_ns.append(time.thread_time_ns() - start)
    return float(np.median(laps_ns)) / 1e3 / num_turns / count


def turnover(count: int, keeps: bool) -> Callable[[], None]:
    """A turn of a pool with room for twice the held blocks: `count` blocks freed and as many allocated."""
    pool = BlockPool(1 + 2 * NUM_HELD * count)
    held: deque[np.ndarray] = deque()

    def turn() -> None:
        if len(held) == NUM_HELD:
            pool.free(held.popleft())
        held.append(pool.allocate(count)[0])
        if keeps:
            pool.keep(held[-1])

    for _ in range(3 * NUM_HELD):
        turn()
    assert pool.num_kept_free == (pool.num_free if keeps else 0)
    return turn


def cached_turnover(count: int) -> Callable[[], None]:
    """The same in a `KVMemory` whose free blocks are all cached, with prompts that nobody has seen before."""
    memory = KVMemory(1 + 2 * NUM_HELD * count, BLOCK_SIZE, NUM_HELD, count, 0, True)
    tokens, cols = np.zeros(count * BLOCK_SIZE, np.int32), np.arange(count)
    rows = deque(range(NUM_HELD))

    def turn() -> None:
        row = rows[0]
        rows.rotate(-1)
        if memory.table.num_blocks[row]:
            memory.release(np.array([row]))
        memory.extend(np.full(count, row), cols)
        tokens[0] += 1
        assert memory.publish(row, tokens, 0, count, SALT) == count

    for _ in range(3 * NUM_HELD):
        turn()
    assert memory.pool.num_kept_free == memory.pool.num_free
    return turn


def sharing(count: int, kept: bool) -> Callable[[], None]:
    """A turn that gives `count` blocks a holder and takes it away again."""
    pool = BlockPool(1 + 2 * count)
    ids = pool.allocate(count)[0]
    if kept:
        pool.keep(ids)
        pool.free(ids)

    def turn() -> None:
        pool.share(ids)
        pool.free(ids)

    return turn


def prefix_rows(report: Report, num_turns: int) -> None:
    """A prompt of 512 blocks in the prefix index: looked up, and entered."""
    count = 512
    memory = KVMemory(1 + (7 * num_turns + 1) * count, BLOCK_SIZE, 1, count, 0, True)
    prompt = np.arange(count * BLOCK_SIZE, dtype=np.int32)
    row, cols = np.array([0]), np.arange(count)
    laps_ns = []
    for index in range(7 * num_turns):
        memory.extend(np.zeros(count, int), cols)
        prompt[0] = index
        start = time.thread_time_ns()
        assert memory.publish(0, prompt, 0, count, SALT) == count
        laps_ns.append(time.thread_time_ns() - start)
        memory.release(row)
    report.add("prefix: enter 512 blocks", float(np.median(laps_ns)) / 1e3 / count, "us", "< 1")
    assert len(memory.match(prompt, SALT)) == count
    report.add(
        "prefix: look 512 blocks up", us_a_block(lambda: memory.match(prompt, SALT), num_turns, count), "us", "< 1"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What does the host pay for a block of KV memory?")
    parser.add_argument("--quick", action="store_true", help="fewer turns, rougher figures")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    num_turns = 200 if args.quick else 2000
    report = Report("blocks")
    kinds: list[tuple[str, Callable[[int], Callable[[], None]]]] = [
        ("empty: free and allocate", lambda count: turnover(count, keeps=False)),
        ("evicting: free and allocate", lambda count: turnover(count, keeps=True)),
        ("cached: allocate, enter, free", cached_turnover),
        ("held: share and free", lambda count: sharing(count, kept=False)),
        ("kept: share and free", lambda count: sharing(count, kept=True)),
    ]
    for name, prepare in kinds:
        for count in COUNTS:
            each_us = us_a_block(prepare(count), max(num_turns // max(count // 16, 1), 100), count)
            report.add(f"{name}, {count} at a time", each_us, "us", "< 1" if count > 1 else None)
    prefix_rows(report, 20)
    report.finish(args.json)


if __name__ == "__main__":
    main()
