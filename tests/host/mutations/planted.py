"""Bugs to plant, one at a time, in the host's side: each is a known mistake of a paged engine, and a test must see it.

An entry is (name, file, text that stands there once, text to put in its place, what should see it). `scripts/mutate`
plants them. Whoever changes a line that stands here changes it here too: a text that is not found is an error.
"""

# ruff: noqa: E501  (lines of source are quoted as they stand)

from __future__ import annotations

from typing import NamedTuple

BLOCKS = "jaxserve/cache/blocks.py"
ORDER = "jaxserve/cache/release_order.py"
TABLE = "jaxserve/cache/block_table.py"
PREFIX = "jaxserve/cache/prefix.py"
SWAP = "jaxserve/cache/swap.py"
MEMORY = "jaxserve/cache/kv_memory.py"
SEQUENCES = "jaxserve/scheduler/sequences.py"
ROSTER = "jaxserve/scheduler/roster.py"
WAITING = "jaxserve/scheduler/waiting.py"
ADMISSION = "jaxserve/scheduler/admission.py"
POLICY = "jaxserve/scheduler/policy.py"
PLANNER = "jaxserve/scheduler/planner.py"
COMMITTING = "jaxserve/scheduler/committing.py"
SCHEDULER = "jaxserve/scheduler/scheduler.py"
FINISH = "jaxserve/scheduler/finish.py"
COUNTERS = "jaxserve/scheduler/counters.py"

UNIT_CACHE = "tests/host/cache --ignore=tests/host/cache/test_kv_machine.py"  # which would shrink what it found
UNIT_SCHEDULER = "tests/host/scheduler/test_scheduler.py"
PREEMPTION = "tests/host/scheduler/test_preemption.py"
UNIT_ADMISSION = "tests/host/scheduler/test_admission.py"
UNIT_VICTIMS = "tests/host/scheduler/test_victims.py"
PARALLEL = "tests/host/scheduler/test_parallel_samples.py"
REGRESSIONS = "tests/host/scheduler/test_regressions.py"
SIMULATION = "simulation"


class Planted(NamedTuple):
    """One bug."""

    name: str
    file: str
    old: str
    new: str
    seen_by: str


PLANTED = (
    # Counts and the pool.
    Planted(
        "a copied block is not given back",
        MEMORY,
        "        self.pool.free(np.array([shared], np.int32))\n",
        "",
        UNIT_CACHE,
    ),
    Planted(
        "a released row keeps its holds",
        MEMORY,
        "        self.pool.free(self.table.blocks_of(rows)[::-1])\n",
        "",
        UNIT_CACHE,
    ),
    Planted(
        "a sequence is freed from its beginning",
        MEMORY,
        "self.pool.free(self.table.blocks_of(rows)[::-1])",
        "self.pool.free(self.table.blocks_of(rows))",
        UNIT_CACHE,
    ),
    Planted(
        "blocks are shared without being held",
        MEMORY,
        "        self.pool.share(ids)\n        self.table",
        "        self.table",
        UNIT_CACHE,
    ),
    Planted(
        "a shared block's own is kept too",
        MEMORY,
        "        self.pool.free(np.array([own[col] for col in changed], np.intp))\n",
        "",
        UNIT_CACHE,
    ),
    Planted(
        "evicted blocks stay in the index",
        MEMORY,
        "        if len(evicted):\n            self.index.forget(evicted)\n",
        "",
        UNIT_CACHE,
    ),
    Planted(
        "the generation is not raised", BLOCKS, "        self.generation[ids] = self._clock", "        self", UNIT_CACHE
    ),
    Planted(
        "after a lost device blocks are thought good",
        BLOCKS,
        "        self.generation[:] = self._clock\n",
        "",
        UNIT_CACHE,
    ),
    Planted("evicted blocks are still kept", BLOCKS, "            self.is_kept[evicted] = False\n", "", UNIT_CACHE),
    Planted(
        "the null block is handed out",
        BLOCKS,
        "np.arange(1, num_blocks, dtype=np.intp)",
        "np.arange(num_blocks - 1, dtype=np.intp)",
        UNIT_CACHE,
    ),
    Planted(
        "blocks are rounded down",
        BLOCKS,
        "(num_tokens + (block_size - 1)) // block_size",
        "num_tokens // block_size",
        UNIT_CACHE,
    ),
    Planted(
        "the ring loses what wraps", BLOCKS, "        self._ring[: len(ids) - first] = ids[first:]\n", "", UNIT_CACHE
    ),
    Planted(
        "the newest content is evicted",
        ORDER,
        "(self._stamp_of[window] == self._stamps[self._head : end]).nonzero()[0][:missing]",
        "(self._stamp_of[window] == self._stamps[self._head : end]).nonzero()[0][-missing:]",
        UNIT_CACHE,
    ),
    Planted(
        "a table's end is padded with -1",
        TABLE,
        "            self.ids[row, : self.num_blocks[row]] = NULL_BLOCK\n",
        "            self.ids[row, : self.num_blocks[row]] = -1\n",
        UNIT_CACHE,
    ),
    # The prefix cache.
    Planted(
        "a salt's length stands for it",
        PREFIX,
        "_ROOT.pack(_NO_NODE, len(salt)) + salt",
        "_ROOT.pack(_NO_NODE, len(salt))",
        UNIT_CACHE,
    ),
    Planted(
        "model and salt are not framed",
        PREFIX,
        'struct.pack("<II", len(version), len(salt)) + version + salt',
        "version + salt",
        UNIT_CACHE,
    ),
    Planted(
        "all salts are one",
        SCHEDULER,
        "namespace(limits.model_version, request.cache_salt)",
        'namespace(limits.model_version, b"")',
        UNIT_ADMISSION,
    ),
    Planted(
        "a block is named by its tokens alone", PREFIX, "            prefix = prefix_of_block[found]\n", "", UNIT_CACHE
    ),
    Planted(
        "the last full block is not looked up",
        PREFIX,
        "range(size, len(data) + 1, size)",
        "range(size, len(data), size)",
        UNIT_CACHE,
    ),
    Planted(
        "a fault's descendants stay cached",
        PREFIX,
        "            found += children.pop(self._prefix_of_block[block], ())\n",
        "            pass\n",
        UNIT_CACHE,
    ),
    Planted(
        "blocks are published before the answer",
        SCHEDULER,
        "        self._num_steps += 1\n",
        "        self._num_steps += 1\n        for row in plan.prefill_rows.tolist():\n            publishing.publish(self.sequences, self.memory, row, int(self.sequences.num_computed[row]))\n",
        UNIT_ADMISSION,
    ),
    Planted(
        "a failed row's blocks stay cached", SCHEDULER, "        if is_worthless:\n", "        if False:\n", PARALLEL
    ),
    Planted(
        "a token in flight is published as written",
        SEQUENCES,
        "int(self.num_known[row]) - 1)",
        "int(self.num_known[row]))",
        SIMULATION,
    ),
    Planted(
        "after a reset rows go on publishing",
        SCHEDULER,
        "                sequence.caches = False\n",
        "                pass\n",
        UNIT_ADMISSION,
    ),
    Planted(
        "prompt logprobs read the cache",
        ADMISSION,
        "if not request.reads_cache and not",
        "if False and not",
        UNIT_ADMISSION,
    ),
    Planted(
        "a hit counts tokens that were computed",
        COUNTERS,
        "min(num_stored, num_prompt - 1)",
        "num_stored",
        UNIT_ADMISSION,
    ),
    # Copy-on-write and forks.
    Planted(
        "a shared block is written in place",
        MEMORY,
        "if self.pool.ref_count[shared] == 1 and not self.pool.is_kept[shared]:",
        "if not self.pool.is_kept[shared]:",
        UNIT_CACHE,
    ),
    Planted(
        "a cached block is written in place",
        MEMORY,
        "if self.pool.ref_count[shared] == 1 and not self.pool.is_kept[shared]:",
        "if self.pool.ref_count[shared] == 1:",
        UNIT_CACHE,
    ),
    Planted(
        "a sibling writes to what an ended one has cached",
        PLANNER,
        "(pool.ref_count[ids] > 1) | pool.is_kept[ids]",
        "(pool.ref_count[ids] > 1)",
        REGRESSIONS,
    ),
    Planted(
        "only the fork knows that it shares",
        COMMITTING,
        "sequences.share_tails([s.row for s in sequence.request.sequences if s.row >= 0])",
        "sequences.share_tails([row, entry.fork_of])",
        REGRESSIONS,
    ),
    Planted(
        "a fork thinks more is published than it has",
        COMMITTING,
        "min(int(sequences.num_published[entry.fork_of]), num_full)",
        "int(sequences.num_published[entry.fork_of])",
        REGRESSIONS,
    ),
    Planted(
        "a fork takes a sibling that is not done",
        ADMISSION,
        "self._sequences.num_computed[row] >= num_prompt",
        "self._sequences.num_computed[row] > 0",
        PARALLEL,
    ),
    Planted(
        "a fork leaves the partial block out",
        ADMISSION,
        "num_blocks = blocks_for(num_prompt, self._limits.block_size)\n",
        "num_blocks = num_prompt // self._limits.block_size\n",
        PARALLEL,
    ),
    Planted(
        "a stored token is written again", PLANNER, "stored=entry.num_stored == known", "stored=False", UNIT_ADMISSION
    ),
    Planted(
        "a copy is not told to the device",
        MEMORY,
        "        self.table.replace(row, [col], [own])\n",
        "        self.table.ids[row, col] = own\n",
        UNIT_CACHE,
    ),
    Planted(
        "a copy too few is counted",
        PLANNER,
        "num_others = int(pool.ref_count[block]) - 1",
        "num_others = int(pool.ref_count[block]) - 2",
        PARALLEL,
    ),
    Planted(
        "heirs do not hold what they inherit", MEMORY, "        self.pool.share(new[old != new])\n", "", UNIT_CACHE
    ),
    # Preemption and swap.
    Planted(
        "swap takes the block after the last",
        COMMITTING,
        "[: blocks_for(num_stored, memory.block_size)]",
        "[: num_stored // memory.block_size]",
        SIMULATION,
    ),
    Planted("a partial block's copy is used again", SWAP, "        slots[num_full:] = _NOWHERE\n", "", UNIT_CACHE),
    Planted(
        "a copy of an older content is used",
        SWAP,
        "(slots != _NOWHERE) & (self._home_generation[slots] == pool.generation[blocks])",
        "(slots != _NOWHERE)",
        UNIT_CACHE,
    ),
    Planted(
        "a slot is released twice",
        SCHEDULER,
        "                self.memory.host.release(sequence.swapped)\n                sequence.swapped = None\n",
        "                self.memory.host.release(sequence.swapped)\n                self.memory.host.release(sequence.swapped)\n                sequence.swapped = None\n",
        SIMULATION,
    ),
    Planted("a slot is never released", MEMORY, "        self.host.release(slots)\n", "", UNIT_CACHE),
    Planted(
        "lost copies are relied on",
        SCHEDULER,
        "if sequence.swapped is not None and not lost.isdisjoint(sequence.swapped.tolist())",
        "if False",
        PREEMPTION,
    ),
    Planted(
        "what a returning row shares is not pinned",
        COMMITTING,
        "    memory.hold(idle)\n    return idle\n",
        "    return NO_IDS\n",
        SIMULATION,
    ),
    Planted(
        "a gap of what is alive is shared",
        SWAP,
        "np.where(np.logical_and.accumulate(here), homes, _NOWHERE)",
        "np.where(here, homes, _NOWHERE)",
        UNIT_CACHE,
    ),
    Planted(
        "nobody is ever protected",
        ADMISSION,
        "sequence.num_preemptions >= MAX_PREEMPTIONS",
        "sequence.num_preemptions > 10**6",
        PREEMPTION,
    ),
    Planted(
        "the protected give way",
        POLICY,
        "sequences.active & ~sequences.is_protected)",
        "sequences.active)",
        UNIT_VICTIMS,
    ),
    Planted(
        "what is reserved is not added up",
        ADMISSION,
        "self._num_reserved + num_reserved > self._limits.num_blocks - 1",
        "num_reserved > self._limits.num_blocks - 1",
        PREEMPTION,
    ),
    Planted(
        "the preempted go to the end of the queue",
        WAITING,
        "self._sequences.insert(self._place(sequence), sequence)",
        "self._sequences.append(sequence)",
        PREEMPTION,
    ),
    Planted(
        "the price ignores what others hold",
        POLICY,
        "freed = int(np.count_nonzero(counts == 1))",
        "freed = len(ids)",
        UNIT_VICTIMS,
    ),
    Planted(
        "slots are promised twice",
        POLICY,
        "            self._num_slots -= len(ids)  # at most\n",
        "            pass\n",
        UNIT_VICTIMS,
    ),
    # The roster.
    Planted(
        "the roster outlives an end",
        SEQUENCES,
        "        self._decoding = None\n        self.num_prefilling -= len(rows) - int",
        "        self.num_prefilling -= len(rows) - int",
        UNIT_SCHEDULER,
    ),
    Planted(
        "the roster misses who begins to decode",
        SEQUENCES,
        "        self.num_prefilling -= len(rows)\n        self._decoding = None\n",
        "        self.num_prefilling -= len(rows)\n",
        UNIT_SCHEDULER,
    ),
    Planted(
        "the roster keeps who is at the longest",
        SEQUENCES,
        "if self._decoding is None or self._decoding.num_steps_left <= 0:\n            rows =",
        "if self._decoding is None:\n            rows =",
        UNIT_SCHEDULER,
    ),
    Planted(
        "nobody is looked at for being at the longest",
        SEQUENCES,
        "        return self._decoding.num_steps_left <= 0\n",
        "        return False\n",
        UNIT_SCHEDULER,
    ),
    Planted(
        "a loop is one step to the rows that open a block",
        ROSTER,
        "        self._num_steps += num_steps\n",
        "        self._num_steps += 1\n",
        SIMULATION,
    ),
    Planted(
        "the rows stay where they were",
        ROSTER,
        "        self.positions = positions\n        self.num_steps_left -=",
        "        self.num_steps_left -=",
        UNIT_SCHEDULER,
    ),
    Planted("a release goes uncounted", SEQUENCES, "        self.num_releases += 1\n", "", UNIT_SCHEDULER),
    # Steps ahead, lifetimes.
    Planted("the row's generation stays", SEQUENCES, "        self.generation[rows] += 1\n", "", UNIT_SCHEDULER),
    Planted(
        "an answer for an older tenant is taken",
        SCHEDULER,
        "live = sequences.generation[roster.rows] == roster.generations",
        "live = sequences.active[roster.rows]",
        UNIT_SCHEDULER,
    ),
    Planted(
        "a token in flight is kept",
        COMMITTING,
        "known = sequences.known_token_ids(sequence.row)",
        "known = sequences.token_ids[sequence.row, : sequences.num_tokens[sequence.row]].copy()",
        SIMULATION,
    ),
    Planted(
        "a block begins a token late",
        ROSTER,
        "(self.positions & (block_size - 1)) == 0",
        "(self.positions & (block_size - 1)) == 1",
        UNIT_SCHEDULER,
    ),
    Planted(
        "a loop's rows open no block but their first",
        PLANNER,
        "            decodes.opening_rows = frozen(decodes.roster.rows[opens_block], np.intp)\n",
        "            pass\n",
        SIMULATION,
    ),
    Planted(
        "a loop takes blocks that are not there",
        PLANNER,
        "+ decodes.num_copies <= view.memory.pool.num_free:",
        "<= view.memory.pool.num_free + 1:",
        SIMULATION,
    ),
    Planted(
        "a loop's block begins a token late",
        PLANNER,
        "to_border = -decodes.positions % block_size",
        "to_border = (1 - decodes.positions) % block_size",
        SIMULATION,
    ),
    Planted(
        "a loop goes past a sequence's end",
        SCHEDULER,
        "ends = np.minimum(plan.decode_positions + plan.num_steps, decodes.max_total_len - 1)",
        "ends = plan.decode_positions + plan.num_steps",
        SIMULATION,
    ),
    Planted(
        "a loop's tokens all have the first one's place",
        SCHEDULER,
        "positions=flight.positions + index",
        "positions=flight.positions",
        SIMULATION,
    ),
    Planted(
        "the step's budget is overdrawn",
        PLANNER,
        "view.limits.max_num_batched_tokens - len(decodes.roster)",
        "view.limits.max_num_batched_tokens",
        UNIT_SCHEDULER,
    ),
    Planted(
        "admission forgets the running",
        ADMISSION,
        "headroom = 1 + self._num_running if self._num_running else 0",
        "headroom = 0",
        UNIT_ADMISSION,
    ),
    Planted(
        "idle blocks are counted twice",
        ADMISSION,
        "        num_taken = self._num_idle(shared)\n",
        "        num_taken = 0\n",
        UNIT_ADMISSION,
    ),
    Planted(
        "nobody waits for a prefix",
        ADMISSION,
        "            return None\n        return hits",
        "            pass\n        return hits",
        UNIT_ADMISSION,
    ),
    Planted(
        "an abort leaves the waiting siblings",
        SCHEDULER,
        "self._end(list(request.sequences))\n        return request",
        "self._end([s for s in request.sequences if s.row >= 0] or list(request.sequences))\n        return request",
        SIMULATION,
    ),
    Planted(
        "a sequence ends a token late",
        FINISH,
        "at_end = lengths >= roster",
        "at_end = lengths > roster",
        UNIT_SCHEDULER,
    ),
    Planted(
        "a stop before min_tokens ends",
        FINISH,
        "stops.any(axis=0) & (lengths >= roster.min_stop_len)",
        "stops.any(axis=0)",
        UNIT_SCHEDULER,
    ),
)
