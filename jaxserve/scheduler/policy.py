"""Who gives way when the blocks run out, and by which means.

Owns the rules, as pure functions of the tables; it changes nothing. `admission` has the rules of who enters.

* When blocks run out, one of the `VICTIM_WINDOW` youngest rows gives way, the one that gives back blocks at the lowest
  cost, and takes its old place in the queue. Its blocks go to host memory, or are dropped and computed again, by cost.
* A sequence that gave way `MAX_PREEMPTIONS` times is protected from then on: it never gives way again. It is
  admitted only when the whole pool holds all protected rows at their longest, so that none of them ever needs
  another's blocks. The beams of a search are protected from the start: their scores live on the device.

So preemptions a sequence are bounded, and nothing can deadlock: the protected rows, or where there are none the
oldest row, can take every other row's blocks, and finish with them (`Scheduler.add` refused what the whole pool
cannot hold; who waits holds no block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.errors import ConfigError, KVBudgetError
from jaxserve.scheduler.decision import Victim
from jaxserve.scheduler.sequences import Request, SequenceTable

MAX_PREEMPTIONS = 4  # healthy servers see at most 4 a request; 5 is where users call it a livelock
VICTIM_WINDOW = 4  # who waits is overtaken by at most three younger ones


@dataclass(frozen=True, slots=True)
class MemoryCosts:
    """What the two means of preemption cost, as measured on the device.

    Attributes:
        swap_fixed_s: of a swap, out and in, however small.
        swap_block_s: for each block, out and in.
        prefill_token_s: of computing a token again.
    """

    swap_fixed_s: float = 0.0
    swap_block_s: float = 1e-5
    prefill_token_s: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The bounds a scheduler works in.

    Attributes:
        num_blocks: KV blocks, the null block included.
        block_size: tokens a block, a power of two.
        max_num_seqs: R, rows of the running batch.
        max_model_len: tokens of the longest sequence.
        max_num_batched_tokens: tokens a step, at least one for each row.
        max_num_queued_reqs: sequences that may wait, beside those for which a row is free.
        eos_token_ids: the model's end-of-sequence ids; a stop at one of them has no stop_reason.
        num_swap_blocks: blocks that host memory holds; 0 turns swapping off.
        enable_prefix_caching: whether blocks are kept for others that begin alike.
        costs: of swapping and computing.
        model_version: names the weights: KV of one version is never another's.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int = 1024
    eos_token_ids: tuple[int, ...] = ()
    num_swap_blocks: int = 0
    enable_prefix_caching: bool = True
    costs: MemoryCosts = MemoryCosts()
    model_version: str = ""

    def __post_init__(self) -> None:
        bounds = {"num_blocks": 2, "max_num_seqs": 1, "max_model_len": 1, "max_num_queued_reqs": 1}
        for name, low in (*bounds.items(), ("num_swap_blocks", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}. Try 16.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running sequence gets a token a step. "
                "Raise the first or lower the second."
            )

    @property
    def max_blocks_per_row(self) -> int:
        return blocks_for(self.max_model_len, self.block_size)


def blocks_at_longest(request: Request, block_size: int) -> int:
    """Blocks without which the request cannot be served: one sequence's, or all beams', at their longest."""
    longest = blocks_for(request.max_total_len, block_size)
    if request.beam is None:
        return longest
    return longest + (request.num_sequences - 1) * (longest - len(request.prompt_token_ids) // block_size)


def check_budget(request: Request, limits: SchedulerLimits) -> None:
    """Raises KVBudgetError if the whole pool could not hold what the request must have at once."""
    needed, usable = blocks_at_longest(request, limits.block_size), limits.num_blocks - 1
    if needed <= usable:
        return
    num_prompt = len(request.prompt_token_ids)
    beams = f" on {request.num_sequences} beams" if request.beam else ""
    raise KVBudgetError(
        f"The request needs {needed} KV blocks of {limits.block_size} tokens for its {num_prompt} prompt "
        f"tokens and {request.max_total_len - num_prompt} output tokens{beams}, but the KV cache has only "
        f"{usable}. Shorten the prompt, lower max_tokens, or enlarge the KV cache.",
        param="max_tokens",
    )


def by_seniority(sequences: SequenceTable, rows: np.ndarray) -> np.ndarray:
    """The rows, protected ones first, then in order of arrival."""
    return rows[np.lexsort((sequences.place[rows], ~sequences.is_protected[rows]))]


class Victims:
    """One plan's choice of who gives way.

    Args:
        needy: rows that need a block each for this step; one that gives way needs none.
    """

    def __init__(self, sequences: SequenceTable, memory: KVMemory, costs: MemoryCosts, needy: np.ndarray):
        self._sequences, self._memory, self._costs = sequences, memory, costs
        self._needy = set(needy.tolist())
        self._ref_count = memory.pool.ref_count.copy()
        self._num_slots = memory.host.num_free

    def choose(self, shortage: int) -> tuple[list[Victim], int]:
        """Victims until `shortage` blocks more are free or not needed; and the blocks that they free."""
        sequences = self._sequences
        rows = np.flatnonzero(sequences.active & ~sequences.is_protected)
        ending = sequences.is_ending()[rows]
        youngest = np.argsort(-sequences.place[rows])
        candidates = [*rows[youngest][~ending[youngest]].tolist(), *rows[youngest][ending[youngest]].tolist()]
        num_staying = int(np.count_nonzero(~ending))
        chosen: list[Victim] = []
        num_freed = 0
        while shortage > 0:
            assert candidates, f"{shortage} blocks short and nobody left to give way"
            # Rows that are about to end give their blocks back by themselves: they come last, one by one. The oldest
            # stays while anybody else can go: it is what makes progress certain.
            window = candidates[: max(min(VICTIM_WINDOW, num_staying - 1), 1)]
            victim, freed, _ = min(map(self._price, window), key=lambda priced: priced[2])
            place = candidates.index(victim.row)
            del candidates[place]
            num_staying -= place < num_staying
            shortage -= freed + (victim.row in self._needy)
            num_freed += freed
            self._take(victim)
            chosen.append(victim)
        return chosen, num_freed

    def _price(self, row: int) -> tuple[Victim, int, float]:
        """How the row would give way, the blocks that it would free, and seconds a block."""
        memory, costs = self._memory, self._costs
        ids = memory.table.row(row)
        counts = self._ref_count[ids]
        num_stored = int(min(self._sequences.num_computed[row], self._sequences.num_known[row]))
        num_lost = num_stored - memory.block_size * int(np.count_nonzero((counts > 1) & memory.pool.is_kept[ids]))
        num_copied = memory.num_to_copy(ids, num_stored // memory.block_size)
        swap_s = costs.swap_fixed_s + costs.swap_block_s * num_copied
        recompute_s = costs.prefill_token_s * num_lost
        wants_swap = swap_s < recompute_s and memory.host.num_slots > 0
        swaps = wants_swap and num_copied <= self._num_slots
        freed = int(np.count_nonzero(counts == 1))
        cost_s = swap_s if swaps else recompute_s
        price = cost_s / (freed + (row in self._needy)) if freed or row in self._needy else np.inf
        return Victim(row, swaps, wants_swap and not swaps), freed, price

    def _take(self, victim: Victim) -> None:
        """Counts the victim's blocks as given back, and its slots as taken."""
        ids = self._memory.table.row(victim.row)
        self._ref_count[ids] -= 1
        if victim.swaps:
            self._num_slots -= len(ids)  # at most
