"""Requests as the scheduler sees them, and columns of the running ones.

Owns token ids and counts of every sequence. It knows no blocks, no plans and no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.scheduler.roster import DecodeFront, Roster
from jaxserve.types import MAX_N, MAX_STOP_TOKEN_IDS, BeamSearchParams

NO_TOKEN = -1  # pads stop_ids; no device samples it
NO_BOUND = np.iinfo(np.int32).max
PLACE_BITS = 7
assert MAX_N <= 1 << PLACE_BITS


@dataclass(slots=True, eq=False)
class Request:
    """What one client asked, in the scheduler's terms. Compared by identity.

    Attributes:
        request_id: unique among the requests in the scheduler.
        prompt_token_ids: int32[n], n >= 1.
        max_total_len: prompt + max_tokens, at most the model's length; each sequence ends there.
        stop_token_ids: ids that end a sequence, end-of-sequence ids included unless ignore_eos; at most 64.
        min_tokens: output tokens before which no stop id ends it.
        num_sequences: continuations of the prompt, at most 128; for a beam search, its width.
        beam: how to search, or None to sample each sequence for itself.
        cache_salt: the prefix cache shows the request only blocks of the same salt.
        reads_cache: false where every prompt token must be computed (prompt logprobs). Its blocks are cached.
        payload: the caller's own; carried, never read.
        arrival: the place in line, given by `Scheduler.add` and kept for life.
        namespace: model version and salt, by which the prefix cache tells requests apart; the scheduler's.
        sequences: those that have not ended, in order of index; the scheduler's.
    """

    request_id: str
    prompt_token_ids: np.ndarray
    max_total_len: int
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    payload: Any = None
    num_sequences: int = 1
    beam: BeamSearchParams | None = None
    cache_salt: bytes = b""
    reads_cache: bool = True
    arrival: int = field(default=-1, init=False)
    namespace: bytes = field(default=b"", init=False)
    sequences: list[Sequence] = field(default_factory=list, init=False)


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request, from arrival to end.

    Attributes:
        request: whose it is.
        index: which of the request's.
        known_token_ids: int32[n] prompt and outputs, while it waits; a running row has them in the table.
        row: its row, -1 while it waits.
        num_preemptions: how often it lost its row.
        swapped: int32[m] slots of host memory that hold the KV of its blocks, while it waits; or None.
        num_swapped: tokens whose KV is there.
        caches: its blocks may be entered into the prefix cache; false once the cache was reset under it.
        num_cached_tokens: prompt tokens that it did not have to compute when it first got a row; -1 before.
    """

    request: Request
    index: int
    known_token_ids: np.ndarray
    row: int = -1
    num_preemptions: int = 0
    swapped: np.ndarray | None = None
    num_swapped: int = 0
    caches: bool = True
    num_cached_tokens: int = -1

    @property
    def place(self) -> int:
        """Its place in line: by arrival, then by index."""
        return self.request.arrival << PLACE_BITS | self.index

    @property
    def has_output(self) -> bool:
        """Whether a token of its own is known, while it waits."""
        return len(self.known_token_ids) > len(self.request.prompt_token_ids)


class SequenceTable:
    """The running sequences, one row each, as columns. Inactive rows are zero, but for `generation`.

    A row is in prefill until its last known token has been fed (`on_device` false), then it decodes: its last
    token lives on the device and the host learns it later, so that num_tokens runs ahead of num_known.

    Attributes:
        active: bool[R] the row has a sequence.
        on_device: bool[R] it has sampled since admission.
        shares_tail: bool[R] the block that its next token goes to may be another's too.
        is_beam: bool[R] it is, or will be, one of the beams of a search.
        is_protected: bool[R] it never gives way.
        num_tokens: int32[R] tokens, those in flight included.
        num_known: int32[R] tokens whose ids the host has.
        num_computed: int32[R] tokens whose KV has been dispatched, or was there when the row was given.
        num_answered: int32[R] tokens whose chunks have been answered; NO_BOUND when the last chunk has.
        num_published: int32[R] its first blocks that are in the prefix cache.
        num_reserved: int32[R] of protected rows, blocks that it (of a beam search: the search) may come to hold.
        num_prompt, max_total_len: int32[R] of its request.
        min_stop_len: int32[R] tokens, the prompt included, before which no stop id ends it.
        place: int64[R] place in line.
        generation: int32[R] raised whenever the row is taken away: answers for an older one are nobody's.
        token_ids: int32[R, max_model_len]; valid before num_known. Pages are touched when first written.
        stop_ids: int32[64, R] one column a row, padded with -1; `stop_width` of its lines are in use.
        sequences: object[R] the row's Sequence, None where inactive.
        has_beams, has_shared_tails: whether any row is_beam, and any shares_tail.
        num_prefilling: active rows that are not on_device.
        num_releases: how often rows have been taken away.
    """

    def __init__(self, num_rows: int, max_model_len: int):
        self.active = np.zeros(num_rows, bool)
        self.on_device = np.zeros(num_rows, bool)
        self.shares_tail = np.zeros(num_rows, bool)
        self.is_beam = np.zeros(num_rows, bool)
        self.is_protected = np.zeros(num_rows, bool)
        self.num_tokens = np.zeros(num_rows, np.int32)
        self.num_known = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.num_answered = np.zeros(num_rows, np.int32)
        self.num_published = np.zeros(num_rows, np.int32)
        self.num_reserved = np.zeros(num_rows, np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.max_total_len = np.zeros(num_rows, np.int32)
        self.min_stop_len = np.zeros(num_rows, np.int32)
        self.place = np.zeros(num_rows, np.int64)
        self.generation = np.zeros(num_rows, np.int32)
        # Rows lie an odd number of cache lines apart: a step's tokens go to similar columns of all rows, and with
        # a power of two between them the writes share a few cache sets (1,024 rows: 10 us a step more).
        self._stride = (max_model_len // 16 | 1) * 16 + 32
        self._flat_token_ids = np.zeros(num_rows * self._stride, np.int32)
        self._offsets = np.arange(num_rows) * self._stride
        self.token_ids = self._flat_token_ids.reshape(num_rows, self._stride)[:, :max_model_len]
        self.stop_ids = np.full((MAX_STOP_TOKEN_IDS, num_rows), NO_TOKEN, np.int32)
        self.sequences = np.full(num_rows, None, object)
        self._num_stop_ids = np.zeros(num_rows, np.int32)
        self.stop_width = 0
        self.has_beams = False
        self.has_shared_tails = False
        self.num_prefilling = 0
        self.num_releases = 0
        self._decoding: DecodeFront | None = None  # what `decoding` gave last, while it stands

    @property
    def num_rows(self) -> int:
        return len(self.active)

    @property
    def num_active(self) -> int:
        return int(np.count_nonzero(self.active))

    def at(self, row: int) -> Sequence:
        """The sequence of an active row."""
        return self.sequences[row]  # type: ignore[return-value]

    def free_rows(self) -> list[int]:
        """Rows without a sequence, ascending."""
        return np.flatnonzero(~self.active).tolist()

    def decode_rows(self) -> np.ndarray:
        """int64[D], ascending: rows that can feed the token they sampled last.

        A row whose last allowed token is in flight waits for its answer and is not among them.
        """
        return (self.on_device & (self.num_tokens < self.max_total_len)).nonzero()[0]

    def prefill_rows(self) -> np.ndarray:
        """int64[N], ascending: rows with known tokens to feed."""
        rows = (self.active > self.on_device).nonzero()[0]
        if not len(rows):
            return rows
        return rows[self.num_computed[rows] < self.num_known[rows]]

    def decoding(self) -> DecodeFront:
        """The `decode_rows`, and where they stand.

        Cost: 0.2 us as long as no sequence ends, gives way or samples its first token; then 10 to 25 us.
        """
        if self._decoding is None or self._decoding.num_steps_left <= 0:
            rows = self.decode_rows()
            is_stretch = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1  # they ascend
            roster = self.roster_of(rows, slice(rows[0], rows[-1] + 1) if is_stretch else None)
            num_tokens = self.num_tokens[rows]
            num_steps_left = int((roster.max_total_len - num_tokens).min(initial=NO_BOUND))
            self._decoding = DecodeFront(roster, num_tokens - 1, num_steps_left)
        return self._decoding

    def roster_of(self, rows: np.ndarray, at: slice | None = None) -> Roster:
        """What stays of active rows, intp[n], while they keep their sequences.

        Args:
            at: the same rows, where they are a stretch: a slice takes a fifth of the time of 1,024 indices.
        """
        return Roster(
            num_releases=self.num_releases,
            rows=rows,
            generations=self.generation[rows],
            sequences=self.sequences[rows],
            offsets=self._offsets[rows],
            max_total_len=self.max_total_len[rows],
            min_stop_len=self.min_stop_len[rows],
            stop_ids=self.stop_ids[: self.stop_width].take(rows, axis=1),
            everyone=np.ones(len(rows), bool),
            all_continue=np.zeros(len(rows), np.int8),
            at=rows if at is None else at,
        )

    def advance(self, roster: Roster, num_computed: np.ndarray, num_steps: int = 1) -> bool:
        """Decode rows feed all that they have up to there, in so many steps, and sample one token more.

        Args:
            roster: what `decoding` gave last, or some of its rows where others have given way since.

        Returns: whether one of them may get to its longest with that.
        """
        self.num_computed[roster.at] = num_computed
        self.num_tokens[roster.at] = num_computed + 1
        if self._decoding is None:
            return True
        assert self._decoding.roster is roster, "these are not the rows that decode"
        self._decoding.advance(num_computed, num_steps)
        return self._decoding.num_steps_left <= 0

    def begin_decoding(self, rows: np.ndarray) -> None:
        """Rows in prefill have been fed all that is known of them and sample their first token."""
        self.num_tokens[rows] += 1
        self.on_device[rows] = True
        self.num_prefilling -= len(rows)
        self._decoding = None

    def is_ending(self) -> np.ndarray:
        """bool[R]: rows whose last allowed token is in flight; its answer ends them."""
        return self.active & (self.num_tokens == self.max_total_len)

    def admit(self, row: int, sequence: Sequence, num_stored: int) -> None:
        """Gives a free row to a waiting sequence.

        Args:
            num_stored: its first tokens whose KV is in the row's blocks.
        """
        assert not self.active[row], f"row {row} is taken"
        request, known = sequence.request, sequence.known_token_ids
        num_prompt = len(request.prompt_token_ids)
        sequence.row = row
        self.active[row] = True
        self.is_beam[row] = request.beam is not None
        self.has_beams = self.has_beams or request.beam is not None
        self.num_tokens[row] = self.num_known[row] = len(known)
        self.num_computed[row] = num_stored
        self.num_prompt[row] = num_prompt
        self.max_total_len[row] = request.max_total_len
        self.min_stop_len[row] = num_prompt + request.min_tokens
        self.place[row] = sequence.place
        self.token_ids[row, : len(known)] = known
        num_stop = len(request.stop_token_ids)
        self.stop_ids[:num_stop, row] = request.stop_token_ids
        self._num_stop_ids[row] = num_stop
        self.stop_width = max(self.stop_width, num_stop)
        self.sequences[row] = sequence
        self.num_prefilling += 1

    def protect(self, row: int, num_reserved: int) -> None:
        """The row never gives way from now on."""
        self.is_protected[row] = True
        self.num_reserved[row] = num_reserved

    def share_tails(self, rows: list[int]) -> None:
        """The block that each row's next token goes to may be another's too."""
        self.shares_tail[rows] = True
        self.has_shared_tails = True

    def own_tails(self, rows: np.ndarray) -> None:
        """The block that each row's next token goes to is its own."""
        self.shares_tail[rows] = False
        self.has_shared_tails = bool(self.shares_tail.any())

    def release(self, rows: np.ndarray) -> None:
        """Takes the rows away from their sequences and moves their generation on.

        Args:
            rows: [n] distinct active rows.
        """
        assert self.active[rows].all(), f"rows {rows} are not all active"
        self.generation[rows] += 1
        self.num_releases += 1
        self._decoding = None
        self.num_prefilling -= len(rows) - int(np.count_nonzero(self.on_device[rows]))
        for sequence in self.sequences[rows]:
            sequence.row = -1
        self.sequences[rows] = None
        self.stop_ids[: self.stop_width, rows] = NO_TOKEN
        for column in self._zero_when_inactive():
            column[rows] = 0
        self.stop_width = int(self._num_stop_ids.max())
        self.has_beams = self.has_beams and bool(self.is_beam.any())
        self.has_shared_tails = self.has_shared_tails and bool(self.shares_tail.any())

    def _zero_when_inactive(self) -> tuple[np.ndarray, ...]:
        flags = (self.active, self.on_device, self.shares_tail, self.is_beam, self.is_protected)
        counts = (self.num_tokens, self.num_known, self.num_computed, self.num_answered, self.num_published)
        rest = (self.num_reserved, self.num_prompt, self.max_total_len, self.min_stop_len, self.place)
        return (*flags, *counts, *rest, self._num_stop_ids)

    def known_token_ids(self, row: int) -> np.ndarray:
        """int32[num_known]: a copy of the row's known tokens."""
        return self.token_ids[row, : self.num_known[row]].copy()

    def num_committed(self, row: int) -> int:
        """The row's first tokens whose KV was written by steps that have been answered."""
        return min(int(self.num_answered[row]), int(self.num_known[row]) - 1)

    def append_known(self, roster: Roster, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Writes the ids of tokens that were in flight; returns the rows' num_known, [n].

        Args:
            positions: [n] the rows' num_known so far.
            tokens: int32[n].
        """
        self._flat_token_ids[roster.offsets + positions] = tokens
        lengths = positions + 1
        self.num_known[roster.at] = lengths
        return lengths

    def check_integrity(self, num_in_flight: int, block_size: int) -> None:
        """Asserts what must hold between the columns, a row being at most `num_in_flight` tokens ahead of the host."""
        idle, row_of = ~self.active, np.flatnonzero
        for column in self._zero_when_inactive():
            assert not column[idle].any(), f"inactive rows {row_of(idle & (column != 0))} are not cleared"
        assert (self.stop_ids[:, idle] == NO_TOKEN).all()
        assert ((self.stop_ids != NO_TOKEN).sum(axis=0) == self._num_stop_ids).all()
        assert self.stop_width == self._num_stop_ids.max()
        assert self.has_beams == self.is_beam.any()
        assert self.has_shared_tails == self.shares_tail.any()
        decoding, prefilling = self.on_device, self.active & ~self.on_device
        assert self.num_prefilling == np.count_nonzero(prefilling)
        self._check_roster(block_size)
        ahead = self.num_tokens - self.num_known
        assert ((ahead >= 0) & (ahead <= np.where(decoding, num_in_flight, 0))).all(), f"tokens ahead: {ahead}"
        assert (self.num_tokens <= self.max_total_len).all()
        assert (self.num_computed[decoding] == self.num_tokens[decoding] - 1).all()
        fed = prefilling & self.is_beam
        assert (self.num_computed[prefilling] < self.num_known[prefilling] + fed[prefilling]).all()
        unanswered = prefilling & ~self.is_beam  # the prompt of a search is answered before its beams start
        assert (self.num_answered[unanswered] <= self.num_computed[unanswered]).all()
        assert len(set(self.place[self.active].tolist())) == self.num_active
        for row in row_of(self.active).tolist():
            self._check_row(row)

    def _check_roster(self, block_size: int) -> None:
        """Asserts that the roster, where it would be used again, is what would be gathered now."""
        front = self._decoding
        if front is None or front.num_steps_left <= 0:
            return
        fresh = self.roster_of(self.decode_rows())
        assert front.roster.num_releases == self.num_releases
        assert np.array_equal(np.arange(self.num_rows)[front.roster.at], fresh.rows)
        for name in ("rows", "generations", "sequences", "offsets", "max_total_len", "min_stop_len"):
            assert np.array_equal(getattr(fresh, name), getattr(front.roster, name)), f"stale {name}"
        width = len(front.roster.stop_ids)  # requests with more of them may have entered since
        assert np.array_equal(fresh.stop_ids[:width], front.roster.stop_ids)
        assert (fresh.stop_ids[width:] == NO_TOKEN).all()
        positions = self.num_tokens[fresh.rows] - 1
        assert np.array_equal(positions, front.positions)
        assert (positions + 1 + front.num_steps_left <= fresh.max_total_len).all()
        front.check_integrity(block_size)

    def _check_row(self, row: int) -> None:
        """Asserts that the row says what its request says."""
        sequence = self.sequences[row]
        request = sequence.request
        assert sequence.row == row
        assert sequence.swapped is None
        assert self.place[row] == sequence.place
        assert self.max_total_len[row] == request.max_total_len
        assert self.num_prompt[row] == len(request.prompt_token_ids)
        assert self.min_stop_len[row] == self.num_prompt[row] + request.min_tokens
        assert np.array_equal(self.token_ids[row, : self.num_prompt[row]], request.prompt_token_ids)
        assert tuple(self.stop_ids[: self._num_stop_ids[row], row]) == tuple(request.stop_token_ids)
