"""Any order of moves on `KVMemory`, against a model: what each row should read, and what each block really holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory

NUM_ROWS, MAX_BLOCKS = 4, 8
Content = tuple[bytes, tuple[int, ...]]  # KV of a block: salt, and all tokens up to its last one


@dataclass(eq=False)
class _Sequence:
    """A sequence of the model: its tokens, which of its blocks it thinks are cached, or where it was saved."""

    salt: bytes
    tokens: list[int]
    num_published: int = 0
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


class KVMachine(RuleBasedStateMachine):
    """Rows are sequences; `device` and `host` are dictionaries of what was written where."""

    num_compared = 0  # blocks, over all histories of a run

    @initialize(
        size=st.sampled_from([1, 2, 3]),
        num_blocks=st.integers(4, 14),
        num_slots=st.integers(0, 8),
        caches=st.booleans(),
    )
    def start(self, size: int, num_blocks: int, num_slots: int, caches: bool) -> None:
        self.size, self.memory = size, KVMemory(num_blocks, size, NUM_ROWS, MAX_BLOCKS, num_slots, caches)
        self.rows: dict[int, _Sequence] = {}
        self.saved: list[_Sequence] = []
        self.device: dict[int, Content] = {}
        self.host: dict[int, Content] = {}
        self.wanted: set[tuple[int, int]] = set()  # entries that were replaced, and the device has not heard of

    def _contents(self, sequence: _Sequence) -> list[Content]:
        size, tokens = self.size, tuple(sequence.tokens)
        return [(sequence.salt, tokens[: (i + 1) * size]) for i in range(blocks_for(len(tokens), size))]

    def _write_new(self, row: int, ids: np.ndarray) -> None:
        """The row's last blocks get what its tokens are."""
        contents = self._contents(self.rows[row])
        for block, content in zip(ids.tolist(), contents[len(contents) - len(ids) :], strict=True):
            self.device[block] = content

    def _num_full(self, sequence: _Sequence) -> int:
        return len(sequence.tokens) // self.size

    @rule(data=st.data(), word=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([b"", b"s"]))
    def enter(self, data: st.DataObject, word: list[int], salt: bytes) -> None:
        """A prompt: its cached prefix is shared, the rest is computed."""
        row = next((row for row in range(NUM_ROWS) if row not in self.rows), None)
        if row is None or len(word) > MAX_BLOCKS * self.size:
            return
        memory, tokens = self.memory, np.array(word, np.int32)
        hits = memory.match(tokens, salt)
        known = {content for content in (self.device.get(b) for b in memory.index.all_blocks().tolist()) if content}
        sequence = _Sequence(salt, word, len(hits))
        full = self._contents(sequence)[: self._num_full(sequence)]
        expected = 0
        while expected < len(full) and full[expected] in known:
            expected += 1
        assert len(hits) == (expected if memory.caches else 0), "the longest prefix of what is cached"
        num_new = blocks_for(len(word), self.size) - len(hits)
        if num_new > memory.pool.num_free - memory.num_idle(hits):
            return
        self.rows[row] = sequence
        memory.share(row, hits)
        self._write_new(row, memory.extend(np.full(num_new, row), np.arange(len(hits), len(hits) + num_new)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        """One token: in a new block, or in the last one, copied first if it is not the row's own."""
        row = data.draw(st.sampled_from(sorted(self.rows)))
        sequence, memory = self.rows[row], self.memory
        if len(sequence.tokens) == MAX_BLOCKS * self.size or not memory.pool.num_free:
            return
        col, inside = divmod(len(sequence.tokens), self.size)
        if inside:
            before = int(memory.table.ids[row, col])
            is_foreign = memory.pool.ref_count[before] > 1 or bool(memory.pool.is_kept[before])
            copied = memory.copy_on_write(row, col)
            assert (copied is not None) == is_foreign
            if copied is not None:
                assert copied[0] == before
                self.device[copied[1]] = self.device[before]
                self.wanted.add((row, col))
        else:
            memory.extend(np.array([row]), np.array([col]))
        sequence.tokens.append(token)
        self.device[int(memory.table.ids[row, col])] = self._contents(sequence)[-1]

    @precondition(lambda self: 0 < len(self.rows) < NUM_ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A sibling shares every block, the partial last one too."""
        parent = self.rows[data.draw(st.sampled_from(sorted(self.rows)), label="parent")]
        source = next(row for row, sequence in self.rows.items() if sequence is parent)
        row = next(row for row in range(NUM_ROWS) if row not in self.rows)
        self.memory.share(row, self.memory.table.row(source).copy())
        num_published = data.draw(st.integers(0, parent.num_published))
        self.rows[row] = _Sequence(parent.salt, list(parent.tokens), num_published)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        sequence = self.rows[row]
        num_full = data.draw(st.integers(0, self._num_full(sequence)))
        before = self.memory.table.row(row).tolist()
        tokens = np.array(sequence.tokens, np.int32)
        sequence.num_published = self.memory.publish(row, tokens, sequence.num_published, num_full, sequence.salt)
        after = self.memory.table.row(row).tolist()
        self.wanted |= {(row, col) for col, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Some rows end together."""
        gone = sorted(data.draw(st.sets(st.sampled_from(sorted(self.rows)), min_size=1)))
        self.memory.release(np.array(gone))
        for row in gone:
            del self.rows[row]
        self.wanted = {(row, col) for row, col in self.wanted if row in self.rows}

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        """A row's blocks go to host memory."""
        row = data.draw(st.sampled_from(sorted(self.rows)))
        sequence, memory = self.rows[row], self.memory
        ids, num_full = memory.table.row(row).copy(), self._num_full(sequence)
        num_new = memory.num_to_copy(ids, num_full)
        if num_new > memory.host.num_free:
            return
        sequence.slots, slots, blocks = memory.save(ids, num_full)
        assert len(slots) == num_new
        self.host |= {slot: self.device[block] for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True)}
        memory.release(np.array([row]))
        del self.rows[row]
        self.wanted = {entry for entry in self.wanted if entry[0] != row}
        sequence.num_published = 0
        self.saved.append(sequence)

    @precondition(lambda self: self.saved and len(self.rows) < NUM_ROWS)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """It comes back: what is alive is shared, the rest is read from host memory."""
        sequence, memory = data.draw(st.sampled_from(self.saved)), self.memory
        alive = memory.host.on_device(sequence.slots, memory.pool)
        alive = alive[alive >= 0]
        num_needed = len(sequence.slots) - len(alive)
        if num_needed + memory.num_idle(np.unique(alive)) > memory.pool.num_free:
            return
        row = next(row for row in range(NUM_ROWS) if row not in self.rows)
        self.saved.remove(sequence)
        idle = alive[memory.pool.ref_count[alive] == 0]
        memory.hold(idle)
        slots, blocks = memory.restore(row, sequence.slots, self._num_full(sequence))
        memory.let_go(idle)
        assert len(slots) == num_needed
        self.device |= {block: self.host[slot] for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True)}
        self.rows[row] = sequence

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A saved sequence is aborted."""
        sequence = data.draw(st.sampled_from(self.saved))
        self.saved.remove(sequence)
        self.memory.host.release(sequence.slots)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def inherit(self, data: st.DataObject) -> None:
        """Siblings of one length swap their full blocks, as beams do; tails are equal in content, so none is copied."""
        first = data.draw(st.sampled_from(sorted(self.rows)))
        kin = [
            row
            for row, s in self.rows.items()
            if (s.salt, s.tokens) == (self.rows[first].salt, self.rows[first].tokens)
        ]
        parents = [data.draw(st.sampled_from(kin)) for _ in kin]
        self.memory.inherit(np.array(kin), np.array(parents), self._num_full(self.rows[first]))

    @rule()
    def reset(self) -> None:
        num_cached = len(self.memory.index)
        assert self.memory.reset_cache() == num_cached
        for sequence in self.rows.values():
            sequence.num_published = min(sequence.num_published, self._num_full(sequence))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        """A row's blocks leave the cache, with all that continues them."""
        row = data.draw(st.sampled_from(sorted(self.rows)))
        ids = self.memory.table.row(row).copy()
        self.memory.forget(ids)
        assert not self.memory.pool.is_kept[ids].any()

    @rule()
    def lose_device(self) -> None:
        if self.rows:
            self.memory.release(np.array(sorted(self.rows)))
        self.rows.clear()
        self.wanted.clear()
        self.device.clear()
        self.memory.lose_device()

    @rule()
    def tell_device(self) -> None:
        rows, cols = self.memory.table.take_replaced()
        assert self.wanted <= set(zip(rows.tolist(), cols.tolist(), strict=True))
        self.wanted.clear()

    @invariant()
    def everybody_reads_what_is_theirs(self) -> None:
        if not hasattr(self, "memory"):
            return
        memory = self.memory
        memory.check_integrity([sequence.slots for sequence in self.saved])
        assert memory.pool.num_free == memory.pool.num_blocks - 1 - len(
            {block for row in self.rows for block in memory.table.row(row).tolist()}
        )
        for row, sequence in self.rows.items():
            held = [self.device[block] for block in memory.table.row(row).tolist()]
            for (salt, tokens), (_, own) in zip(held, self._contents(sequence), strict=True):
                assert (salt, tokens[: len(own)]) == (sequence.salt, own), f"row {row} reads another's block"
                KVMachine.num_compared += 1
        for sequence in self.saved:
            stored = [self.host[slot] for slot in sequence.slots.tolist()]
            for (salt, tokens), (_, own) in zip(stored, self._contents(sequence), strict=True):
                assert (salt, tokens[: len(own)]) == (sequence.salt, own), "a slot holds another's content"


def test_any_order_of_moves() -> None:
    budget = settings(max_examples=120, stateful_step_count=40, deadline=None)
    KVMachine.num_compared = 0
    run_state_machine_as_test(KVMachine, settings=budget)
    assert KVMachine.num_compared > 1000, "blocks compared with what their rows wrote, in all histories"
