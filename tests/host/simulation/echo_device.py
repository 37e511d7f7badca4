"""`EchoDevice`: a device that answers with a hash of what its block tables really point to.

Its blocks hold token ids. It keeps its own block tables, fed by the plans' deltas alone, and its own last token of
each row. The next token is a hash of every token read back through the table, so that any wrong, stale, missing or
foreign block changes the output; `reference_output` is the same chain from the prompt alone.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable

import numpy as np

from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.sequences import Request, Sequence

VOCAB_SIZE = 1000
POISON = 2**31 - 1  # in memory that nobody may read
NAN = 2**31 - 2  # KV that is not finite: who reads it has no answer


def next_token(token_ids: np.ndarray, index: int = 0) -> int:
    """A hash of the context and, as its seed, of which sequence of the request it is."""
    return zlib.crc32(np.ascontiguousarray(token_ids, np.int32), index) % VOCAB_SIZE


def reference_output(
    request: Request, eos_token_ids: tuple[int, ...] = (), index: int = 0
) -> tuple[list[int], str, int | None]:
    """(output token ids, finish reason, stop reason) of one of the request's sequences alone, by the definition."""
    crc = zlib.crc32(np.array(request.prompt_token_ids, np.int32), index)
    num_prompt, output = len(request.prompt_token_ids), []
    while True:
        last = crc % VOCAB_SIZE
        output.append(last)
        crc = zlib.crc32(np.int32(last).tobytes(), crc)  # of all tokens so far: crc32 is a running sum
        if last in request.stop_token_ids and len(output) >= request.min_tokens:
            return output, "stop", None if last in eos_token_ids else last
        if num_prompt + len(output) == request.max_total_len:
            return output, "length", None


class TornCopyError(Exception):
    """Slots of host memory do not have the checksum with which their content left the device.

    Attributes:
        slots: int32[n] which.
    """

    def __init__(self, slots: list[int]):
        super().__init__(f"slots {slots} are torn")
        self.slots = np.array(slots, np.int32)


class EchoStore:
    """Host memory as the device sees it: copies arrive later and in order, and who reads a slot waits for it.

    Attributes:
        slots: int32[H, block_size] what has arrived.
        pending: copies on their way: their slots, contents and checksums.
    """

    def __init__(self, num_slots: int, block_size: int):
        self.slots = np.full((num_slots, block_size), POISON, np.int32)
        self.pending: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self._checksums = [0] * num_slots
        self._lost: set[int] = set()  # slots whose copy never arrived

    def save(self, slots: np.ndarray, content: np.ndarray) -> None:
        """Starts a copy of what the blocks hold now."""
        for slot, block in zip(slots.tolist(), content, strict=True):
            self._checksums[slot] = zlib.crc32(block)
        self._lost.difference_update(slots.tolist())
        self.pending.append((slots, content))

    def arrive(self, count: int = 1) -> None:
        """The oldest copies are there."""
        for _ in range(min(count, len(self.pending))):
            slots, content = self.pending.popleft()
            self.slots[slots] = content

    def load(self, slots: np.ndarray) -> np.ndarray:
        """int32[n, block_size]: the slots' content, when all of it is there.

        Raises:
            TornCopyError: a copy was torn on its way.
        """
        wanted = set(slots.tolist())
        assert wanted.isdisjoint(self._lost), f"slots {wanted & self._lost} never got their content"
        while any(not wanted.isdisjoint(on_their_way.tolist()) for on_their_way, _ in self.pending):
            self.arrive()
        content = self.slots[slots]
        pairs = zip(slots.tolist(), content, strict=True)
        torn = [slot for slot, block in pairs if zlib.crc32(block) != self._checksums[slot]]
        if torn:
            raise TornCopyError(torn)
        return content

    def tear(self) -> None:
        """The newest copy that is on its way loses a word."""
        if self.pending:
            self.pending[-1][1][-1, -1] ^= 1

    def lose_pending(self) -> np.ndarray:
        """int32[n]: the slots of the copies that were on their way and will never arrive."""
        lost = np.concatenate([np.empty(0, np.int32), *(slots for slots, _ in self.pending)])
        self.pending.clear()
        self.slots[lost] = POISON
        self._lost.update(lost.tolist())
        return lost


class EchoDevice:
    """Runs plans as a device would: copies, then all writes of a step, then its reads."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int, max_blocks: int):
        self.block_size = block_size
        self.blocks = np.full((num_blocks, block_size), POISON, np.int32)
        self.tables = np.zeros((num_rows, max_blocks), np.int32)
        self.last_token = np.full(num_rows, POISON, np.int32)
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.ended = np.zeros(num_rows, bool)

    def poison(self, block_ids: np.ndarray) -> None:
        self.blocks[block_ids] = POISON

    def run(
        self,
        plan: StepPlan,
        prefill_tokens: list[np.ndarray],
        sequences: dict[int, Sequence],
        fresh: np.ndarray,
        store: EchoStore,
        nan_rows: Iterable[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32[num_steps, S] sampled tokens, poison where a row's sequence has ended before; bool: not finite.

        Like the real one it knows by itself when a sequence has ended, a step or a loop before the host does.

        Args:
            prefill_tokens: the chunks' ids in the plan's order.
            sequences: of each admitted row.
            fresh: blocks that were handed out for this step: whatever is in them is another's.
            nan_rows: rows whose KV of this step is not finite.
        """
        self._check_ids(plan, len(store.slots))
        if len(plan.swap_out_slots):
            store.save(plan.swap_out_slots, self.blocks[plan.swap_out_blocks])
        sources = self.blocks[plan.copy_from]
        self.poison(fresh)
        self.blocks[plan.copy_to] = sources
        if len(plan.swap_in_slots):
            self.blocks[plan.swap_in_blocks] = store.load(plan.swap_in_slots)
        for admitted in plan.admitted:
            self.tables[admitted.row] = 0
            self.tables[admitted.row, : len(admitted.block_ids)] = admitted.block_ids
            self.sequences[admitted.row] = sequences[admitted.row]
            self.ended[admitted.row] = False
        self.tables[plan.block_rows, plan.block_cols] = plan.block_ids
        assert plan.num_steps == 1 or not len(plan.prefill_rows), "a loop feeds chunks"
        lengths = self._write_chunks(plan, prefill_tokens, frozenset(nan_rows))
        answers = []
        for index in range(plan.num_steps):
            lengths |= self._write_decodes(plan, index, frozenset(nan_rows))
            answers.append(self._sample(plan.sampled_rows, lengths))
        return np.stack([tokens for tokens, _ in answers]), np.stack([failed for _, failed in answers])

    def _write_decodes(self, plan: StepPlan, index: int, nan_rows: frozenset[int]) -> dict[int, int]:
        """Writes what the decode rows feed in one step of a loop; returns their lengths then."""
        size, goes_on = self.block_size, ~self.ended[plan.decode_rows]
        rows, positions = plan.decode_rows[goes_on], plan.decode_positions[goes_on] + index
        if not len(rows):
            return {}
        blocks = self.tables[rows, positions // size]
        assert blocks.all(), "KV written to the null block"
        fed = self.last_token[rows]
        if nan_rows:
            fed[[row in nan_rows for row in rows.tolist()]] = NAN
        self.blocks[blocks, positions % size] = fed
        return dict(zip(rows.tolist(), (positions + 1).tolist(), strict=True))

    def _write_chunks(
        self, plan: StepPlan, prefill_tokens: list[np.ndarray], nan_rows: frozenset[int]
    ) -> dict[int, int]:
        """Writes the tokens of the chunks; returns their rows' lengths then."""
        size, lengths = self.block_size, {}
        chunks = zip(
            plan.prefill_rows.tolist(),
            plan.prefill_starts.tolist(),
            plan.prefill_lens.tolist(),
            plan.prefill_stored.tolist(),
            prefill_tokens,
            strict=True,
        )
        for row, start, length, stored, tokens in chunks:
            assert len(tokens) == length
            lengths[row] = start + length
            if not stored:
                positions = np.arange(start, start + length)
                blocks = self.tables[row, positions // size]
                assert blocks.all(), "KV written to the null block"
                self.blocks[blocks, positions % size] = NAN if row in nan_rows else tokens
        return lengths

    def _sample(self, rows: np.ndarray, lengths: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
        tokens, failed = np.full(len(rows), POISON, np.int32), np.zeros(len(rows), bool)
        for place, row in enumerate(rows.tolist()):
            if self.ended[row]:
                continue
            length, sequence = lengths[row], self.sequences[row]
            assert sequence is not None, "a row of nobody"
            request = sequence.request
            context = self.blocks[self.tables[row, : -(-length // self.block_size)]].reshape(-1)[:length]
            tokens[place] = token = zlib.crc32(context, sequence.index) % VOCAB_SIZE
            failed[place] = NAN in context
            self.last_token[row] = token
            stops = token in request.stop_token_ids and length + 1 >= len(request.prompt_token_ids) + request.min_tokens
            self.ended[row] = stops or failed[place] or length + 1 >= request.max_total_len
        return tokens, failed

    def _check_ids(self, plan: StepPlan, num_slots: int) -> None:
        """What a real device would clamp in silence is an error here (I10)."""
        rows = [*plan.decode_rows.tolist(), *plan.prefill_rows.tolist()]
        assert len(set(rows)) == len(rows), "a row occurs twice in a step"
        admitted = {a.row for a in plan.admitted}
        entries = list(zip(plan.block_rows.tolist(), plan.block_cols.tolist(), strict=True))
        num_rows, num_cols = self.tables.shape
        assert all(0 <= row < num_rows for row in rows), "no such row"
        assert all(0 <= row < num_rows and 0 <= col < num_cols for row, col in entries), "no such table entry"
        assert len(set(entries)) == len(entries), "a table entry changes twice"
        assert admitted.isdisjoint(row for row, _ in entries), "an admitted row brings its whole table"
        assert admitted <= set(rows), "a row was admitted and is not fed"
        ids = [plan.block_ids, plan.copy_from, plan.copy_to, plan.swap_in_blocks, plan.swap_out_blocks]
        for block_ids in (*ids, *(a.block_ids for a in plan.admitted)):
            assert not len(block_ids) or 0 < block_ids.min() <= block_ids.max() < len(self.blocks), "null block or none"
        for slots in (plan.swap_in_slots, plan.swap_out_slots):
            assert not len(slots) or 0 <= slots.min() <= slots.max() < num_slots, "no such slot"
        targets = [*plan.copy_to.tolist(), *plan.swap_in_blocks.tolist()]
        assert len(set(targets)) == len(targets), "two copies to one block"
        assert len(set(plan.swap_out_slots.tolist())) == len(plan.swap_out_slots), "two copies to one slot"
