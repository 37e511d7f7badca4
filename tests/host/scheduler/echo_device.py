"""`EchoDevice`: a device that answers with a hash of what its block tables really point to.

Its blocks hold token ids. It keeps its own block tables, fed by the plans' deltas alone, and its own last token of
each row. The next token is a hash of every token read back through the table, so that any wrong, stale, missing or
foreign block changes the output; `reference_output` is the same chain from the prompt alone.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jaxserve.scheduler.finish import ERROR
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

VOCAB_SIZE = 1000
POISON = 2**31 - 1
MAX_STEPS = 20_000  # of a simulation: past it, it is a livelock


def next_token(token_ids: np.ndarray) -> int:
    return zlib.crc32(token_ids.astype(np.int32).tobytes()) % VOCAB_SIZE


def reference_output(request: Request, eos_token_ids: tuple[int, ...] = ()) -> tuple[list[int], str, int | None]:
    """(output token ids, finish reason, stop reason) of the request alone, by the definition."""
    tokens = list(map(int, request.prompt_token_ids))
    num_prompt = len(tokens)
    while True:
        tokens.append(next_token(np.array(tokens)))
        num_output, last = len(tokens) - num_prompt, tokens[-1]
        if last in request.stop_token_ids and num_output >= request.min_tokens:
            return tokens[num_prompt:], "stop", None if last in eos_token_ids else last
        if len(tokens) == request.max_total_len:
            return tokens[num_prompt:], "length", None


class EchoDevice:
    """Runs plans as a device would: all writes of a step, then its reads."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int, max_blocks: int):
        self.block_size = block_size
        self.blocks = np.full((num_blocks, block_size), POISON, np.int64)
        self.tables = np.zeros((num_rows, max_blocks), np.int64)
        self.last_token = np.full(num_rows, POISON, np.int64)

    def poison(self, block_ids: np.ndarray) -> None:
        self.blocks[block_ids] = POISON

    def run(self, plan: StepPlan, prefill_tokens: list[np.ndarray]) -> np.ndarray:
        """int32[S] sampled tokens; `prefill_tokens` are the chunks' ids in the plan's order."""
        self._check_ids(plan)
        self.poison(plan.block_ids)
        self.tables[plan.block_rows, plan.block_cols] = plan.block_ids
        for row, position in zip(plan.decode_rows, plan.decode_positions, strict=True):
            self._write(row, position, np.array([self.last_token[row]]))
        for row, start, length, tokens in zip(
            plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, prefill_tokens, strict=True
        ):
            assert len(tokens) == length
            self._write(row, start, tokens)
        context_lens = dict(zip(plan.decode_rows.tolist(), (plan.decode_positions + 1).tolist(), strict=True))
        ends = (plan.prefill_starts + plan.prefill_lens).tolist()
        context_lens |= dict(zip(plan.prefill_rows.tolist(), ends, strict=True))
        sampled = [next_token(self._read(row, context_lens[row])) for row in plan.sampled_rows.tolist()]
        self.last_token[plan.sampled_rows] = sampled
        return np.array(sampled, np.int32)

    def _check_ids(self, plan: StepPlan) -> None:
        """What a real device would clamp in silence is an error here."""
        rows = np.concatenate([plan.decode_rows, plan.prefill_rows])
        assert len(set(rows.tolist())) == len(rows), "a row occurs twice in a step"
        for row in (rows, plan.block_rows):
            assert ((row >= 0) & (row < len(self.tables))).all()
        assert ((plan.block_cols >= 0) & (plan.block_cols < self.tables.shape[1])).all()
        assert ((plan.block_ids > 0) & (plan.block_ids < len(self.blocks))).all(), "null block or none"
        assert len(set(plan.block_ids.tolist())) == len(plan.block_ids), "a block was given out twice"
        assert set(plan.block_rows.tolist()) <= set(rows.tolist()), "blocks for a row that is not in the step"

    def _write(self, row: int, start: int, tokens: np.ndarray) -> None:
        positions = np.arange(start, start + len(tokens))
        blocks = self.tables[row, positions // self.block_size]
        assert (blocks > 0).all(), "KV written to the null block"
        self.blocks[blocks, positions % self.block_size] = tokens

    def _read(self, row: int, length: int) -> np.ndarray:
        positions = np.arange(length)
        return self.blocks[self.tables[row, positions // self.block_size], positions % self.block_size]


@dataclass
class Result:
    """What a client saw of one request."""

    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    stop_reason: int | None = None


class Simulation:
    """A scheduler on an EchoDevice, with every client's view of its request and the invariants after each operation.

    Args:
        depth: plans dispatched before the oldest is digested: 0 in step, 1 one step ahead.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1, check: bool = True):
        limits = scheduler.limits
        self.scheduler, self.depth, self.check = scheduler, depth, check
        self.device = EchoDevice(limits.num_blocks, limits.block_size, limits.max_num_seqs, limits.max_blocks_per_row)
        self.undigested: deque[tuple[StepPlan, np.ndarray]] = deque()
        self.requests: dict[str, Request] = {}
        self.results: dict[str, Result] = {}
        self.aborted: set[str] = set()
        self.preemptions: dict[str, int] = {}
        self.admitted: list[str] = []
        self.num_steps = self.num_delivered = 0

    @property
    def has_requests(self) -> bool:
        return self.scheduler.num_running + self.scheduler.num_waiting > 0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.results[request.request_id] = Result()
        self._check()

    def abort(self, request_id: str) -> None:
        ended = request_id in self.aborted or self.results[request_id].reason is not None
        request = self.scheduler.abort(request_id)
        assert request is (None if ended else self.requests[request_id])
        if not ended:
            self.aborted.add(request_id)
        self._check()

    def step(self) -> StepPlan:
        """plan, commit, dispatch, and digest what is due."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        in_line = scheduler.num_running, scheduler.num_waiting
        self.num_steps += 1
        assert self.num_steps <= MAX_STEPS, f"livelock: {in_line} running and waiting after {MAX_STEPS} steps"
        plan = scheduler.plan()
        assert (scheduler.num_running, scheduler.num_waiting) == in_line
        assert plan.num_tokens <= limits.max_num_batched_tokens
        if not self.undigested:
            assert plan.is_empty == (not any(in_line)), "somebody is here and nobody is served"
        scheduler.commit(plan)
        self.admitted += [scheduler.sequences.requests[row].request_id for row in plan.admitted]
        for request_id in plan.preempted:
            self.preemptions[request_id] = self.preemptions.get(request_id, 0) + 1
        self._check()
        self.device.poison(np.flatnonzero(scheduler.pool.ref_count == 0))
        self.device.poison(np.zeros(1, int))
        chunks = zip(plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, strict=True)
        prefill_tokens = [scheduler.sequences.token_ids[row, start : start + n].copy() for row, start, n in chunks]
        self.undigested.append((plan, self.device.run(plan, prefill_tokens)))
        while len(self.undigested) > self.depth:
            self.digest()
        return plan

    def digest(self, failed: np.ndarray | None = None) -> None:
        """Takes the oldest answer and hands its tokens to their clients."""
        plan, tokens = self.undigested.popleft()
        events = self.scheduler.digest(plan, tokens, failed)
        assert np.array_equal(events.rows, plan.sampled_rows)
        expected_errors = events.live & (False if failed is None else failed)
        assert np.array_equal(events.finish_codes == ERROR, expected_errors), "the wrong row failed"
        for index in np.flatnonzero(events.live).tolist():
            request_id = events.requests[index].request_id
            result = self.results[request_id]
            assert request_id not in self.aborted, "a token for a request that was aborted"
            assert result.reason is None, "a token after the end"
            num_prompt = len(self.requests[request_id].prompt_token_ids)
            assert events.positions[index] == num_prompt + len(result.token_ids), "a token lost or repeated"
            if failed is None or not failed[index]:
                result.token_ids.append(int(tokens[index]))
                self.num_delivered += 1
        for item in events.finished:
            assert events.live[item.index]
            assert events.finish_codes[item.index] > 0
            result = self.results[item.request.request_id]
            result.reason, result.stop_reason = item.reason, item.stop_reason
        assert len(events.finished) == np.count_nonzero(events.finish_codes)
        self._check()

    def lose_device(self) -> None:
        """The device's memory is gone, and with it every answer that is due."""
        limits = self.scheduler.limits
        self.undigested.clear()
        self.device = EchoDevice(limits.num_blocks, limits.block_size, limits.max_num_seqs, limits.max_blocks_per_row)
        self.scheduler.requeue_running()
        assert self.scheduler.num_running == 0
        self._check()

    def drain(self) -> None:
        """Steps until nothing is left, then looks for leaks."""
        while self.has_requests:
            self.step()
        while self.undigested:
            self.digest()
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_blocks == self.scheduler.limits.num_blocks - 1, "blocks leaked"

    def check_outputs(self) -> None:
        """Every client got what its request gives alone; who aborted got a prefix of it."""
        for request_id, request in self.requests.items():
            result = self.results[request_id]
            tokens, reason, stop_reason = reference_output(request, self.scheduler.limits.eos_token_ids)
            if request_id in self.aborted:
                assert result.token_ids == tokens[: len(result.token_ids)], request_id
                assert result.reason is None
            elif result.reason == "error":
                assert result.token_ids == tokens[: len(result.token_ids)], request_id
            else:
                assert (result.token_ids, result.reason, result.stop_reason) == (tokens, reason, stop_reason), (
                    request_id
                )

    def _check(self) -> None:
        if self.check:
            self.scheduler.check_integrity()
