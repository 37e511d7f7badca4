"""The device's half of the engine: owns parameters, cache and state, and is the only caller of jax.

It runs plans and returns answers; what they mean is `engine.EngineCore`'s business.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine import moves
from jaxserve.engine.admission import TABLE_FEATURES, AdmittedParams, pack_row, pack_stored, pack_tables
from jaxserve.engine.beams import pack_followers, pack_group, unpack_answer
from jaxserve.engine.compiled import CompiledSteps, OnProgress, compile_steps
from jaxserve.engine.exactness import differing_buckets
from jaxserve.engine.pack import StepPacker, measured_step
from jaxserve.engine.swap_store import SwapStore, staging_memory
from jaxserve.scheduler.finish import BeamAnswer
from jaxserve.scheduler.plan import Admitted, StepPlan
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.scheduler.sequences import SequenceTable
from jaxserve.state import (
    BEAM,
    LOGPROBS,
    PENALTIES,
    PROMPT_LOGPROBS,
    StepOutput,
    tree_device_bytes,
)
from jaxserve.steps import count_fields, row_fields, table_fields
from jaxserve.types import MAX_BEAM_WIDTH

_MEASURED_TOKENS = 64  # enough for products to be as fast as they get, nearly; of a large model more would take long

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A dispatched step. `fetch` waits for it.

    Attributes:
        features: OR of the feature bits that the step was packed with.
        output: None where nothing is fed and the plan only moves blocks.
        dispatched_s: `time.monotonic` when it was handed to the device.
    """

    plan: StepPlan
    features: int
    output: StepOutput | None
    dispatched_s: float


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """A step's output on the host.

    Attributes:
        tokens: int32 [num_steps, S] in the order of `plan.sampled_rows`; what follows a sequence's end is nobody's.
        failed: bool [num_steps, S] where the logits were not finite.
        logprobs: int32 [num_steps, S, 42] (`ops.logprobs`), or None if no row asked.
        prompt_logprobs: int32 [T, 42] in stream order, or None if no row asked.
        beams: what it says of beams, or None if no row is one.
    """

    tokens: np.ndarray
    failed: np.ndarray
    logprobs: np.ndarray | None
    prompt_logprobs: np.ndarray | None
    beams: BeamAnswer | None


class Runner:
    """One model on one device.

    Attributes:
        model, limits: what it was made for.
        compiled: its programs.
        store: the bytes of swapped blocks.
        costs: of swapping and of computing, measured when it was made.
    """

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        limits: EngineLimits,
        *,
        verify_swaps: bool = False,
        on_progress: OnProgress | None = None,
        cache: Path | None = None,
    ) -> None:
        self.model, self.limits = model, limits
        self._params = params
        self._features = np.zeros(limits.max_num_seqs, np.int32)
        self._packer = StepPacker(self._features)
        prepare = partial(compile_steps, params, model, limits, on_progress, cache)
        self.compiled: CompiledSteps = prepare()
        self.reset()
        layer, block_shape = self._kv.layers[0], self._kv.block_shape
        staging = staging_memory(next(iter(layer.devices())))
        self.store = SwapStore(limits.num_swap_blocks, block_shape, layer.dtype, verify=verify_swaps, staging=staging)
        try:
            self.costs = self._warm_up()
        except jax.errors.JaxRuntimeError as error:
            if not self.compiled.num_loaded:
                raise
            logger.warning("a kept program does not run, compiling all of them: %s", error)
            self.compiled = prepare(reuse=False)
            self.reset()
            self.costs = self._warm_up()
        if limits.exact:
            self._keep_equal()

    def reset(self) -> None:
        """Cache and state anew: at start, and after a step that failed and took the donated ones with it."""
        self._kv, self._state = self.compiled.empty()

    @property
    def kv_bytes(self) -> int:
        return tree_device_bytes(self._kv)

    def _warm_up(self) -> MemoryCosts:
        """Runs every program once, so that the first request finds all buffers and pages made.

        Returns: what swapping and computing cost, by a second run.
        """
        step_s, num_fed = 0.0, 1
        for shape, executable in self.compiled.steps:
            # Padding alone would be left out by the CPU's kernels, and look as if tokens cost nothing.
            num_fed = min(shape.num_tokens, self.limits.max_model_len, _MEASURED_TOKENS)
            packed = measured_step(shape, num_fed)
            for _ in range(2 if shape is self.compiled.steps[-1][0] else 1):
                begin = time.perf_counter()
                self._kv, self._state, output = executable(self._params, self._kv, self._state, packed)
                jax.block_until_ready(output)
                step_s = time.perf_counter() - begin
        no_row = self.limits.max_num_seqs  # past the last: what is written there is dropped
        for program, fields in (
            (self.compiled.admit, row_fields(self.limits.max_blocks_per_row)),
            (self.compiled.set_tables, table_fields(self.model.vocab_size)),
        ):
            packed = np.zeros(sum(fields.values()), np.int32)
            packed[0] = no_row
            self._state = program(self._state, packed)
        nobody = np.full(MAX_BEAM_WIDTH, -1, np.int32)
        self._state = self.compiled.start_beams(self._state, nobody)
        for size, follow in self.compiled.follow_beams.items():
            packed = np.zeros((2, size), np.int32)
            packed[0] = no_row
            self._kv, self._state = follow(self._kv, self._state, packed.reshape(-1))
        for size, copy in self.compiled.copy.items():
            self._kv = copy(self._kv, np.zeros(2 * size, np.int32))
        counted = np.zeros(sum(count_fields(self.limits.max_model_len).values()), np.int32)
        self._state = self.compiled.count_stored(self._state, counted)
        jax.block_until_ready((self._kv, self._state))
        fixed_s, block_s = self._time_swaps()
        num_computed = num_fed if self.limits.skips_padding else self.limits.token_buckets[-1]
        return MemoryCosts(fixed_s, block_s, step_s / num_computed)

    def _keep_equal(self) -> None:
        """Drops the buckets whose bits differ from the largest one's."""
        differing, self._kv, self._state = differing_buckets(
            self.compiled, self._params, self._kv, self._state, self.limits.max_model_len
        )
        if differing:
            steps = tuple((shape, step) for shape, step in self.compiled.steps if shape.num_tokens not in differing)
            self.compiled = replace(self.compiled, steps=steps)
            logger.warning(
                "exact: steps of %s tokens round otherwise than those of %d and are not used; small steps cost as much "
                "as large ones then",
                ", ".join(map(str, sorted(differing))),
                steps[-1][0].num_tokens,
            )

    def _time_swaps(self) -> tuple[float, float]:
        """Seconds of a swap out and in: whatever its size, and for each block."""
        seconds: dict[int, float] = {}
        for size in self.compiled.gather:
            blocks = np.arange(size, dtype=np.int32) % self.limits.num_blocks  # zeros yet, and written back as they are
            for _ in range(3):
                begin = time.perf_counter()
                payload = np.array(self.compiled.gather[size](self._kv, blocks))
                self._kv = self.compiled.scatter[size](self._kv, payload, blocks)
                jax.block_until_ready(self._kv)
                seconds[size] = min(seconds.get(size, math.inf), time.perf_counter() - begin)
        return line_through(seconds)

    def admit(
        self, admitted: Admitted, params: AdmittedParams, known: np.ndarray, *, index: int, features: int
    ) -> None:
        """Tells the device whose row this is now, before the step that first feeds it.

        Args:
            known: every token of the sequence that the host knows.
            index: which of the request's sequences.
            features: bits that its row needs.
        """
        row, vocab_size = admitted.row, self.model.vocab_size
        self._features[row] = features
        packed = pack_row(admitted, params, known, index, features, vocab_size, self.limits.max_blocks_per_row)
        self._state = self.compiled.admit(self._state, packed)
        if features & TABLE_FEATURES:
            self._state = self.compiled.set_tables(self._state, pack_tables(row, params.sampling, vocab_size))
        if features & PENALTIES:
            stored = known[: min(admitted.num_stored, len(known) - 1)]
            for packed in pack_stored(row, params.num_prompt, stored, self.limits.max_model_len):
                self._state = self.compiled.count_stored(self._state, packed)

    def run(self, plan: StepPlan, sequences: SequenceTable) -> RunningStep:
        """Dispatches a committed plan, whose rows have been admitted; returns at once.

        Copies go before what is swapped in: a block that a sequence has just given up by copying it may be the one
        that another's content comes back to.

        Cost: 10-40 us of numpy and one dispatch.
        """
        self.store.drain()
        moves.swap_out(plan, self._kv, self.compiled, self.store)
        self._kv = moves.copy_on_write(plan, self._kv, self.compiled)
        self._kv = moves.swap_in(plan, self._kv, self.compiled, self.store)
        num_updates = len(plan.block_ids)
        if plan.is_empty and not num_updates:
            return RunningStep(plan, 0, None, time.monotonic())
        shape, executable = self.compiled.for_plan(plan.num_tokens, num_updates)
        packed = self._packer.pack(plan, shape, sequences.token_ids, sequences.num_prompt)
        dispatched_s = time.monotonic()
        self._prepare_beams(plan)
        self._kv, self._state, output = executable(self._params, self._kv, self._state, packed)
        output.sampled.copy_to_host_async()
        if packed[2] & BEAM:
            output.beams.copy_to_host_async()
        return RunningStep(plan, int(packed[2]), output, dispatched_s)

    def _prepare_beams(self, plan: StepPlan) -> None:
        """Starts the plan's searches; lets the beams of the others follow their parents, before a token is written."""
        for group in plan.beam_groups:
            self._state = self.compiled.start_beams(self._state, pack_group(group))
        packed = pack_followers(plan, self._features)
        if packed is not None:
            follow = self.compiled.follow_beams[len(packed) // 2]
            self._kv, self._state = follow(self._kv, self._state, packed)

    def fetch(self, running: RunningStep) -> StepAnswer:
        """Waits for a step and brings its answer to the host."""
        output, wants, num_steps = running.output, running.features, running.plan.num_steps
        if output is None:
            return StepAnswer(np.empty((1, 0), np.int32), np.empty((1, 0), bool), None, None, None)
        num_sampled = len(running.plan.sampled_rows)
        sampled = np.asarray(output.sampled)[:num_steps, :num_sampled]
        return StepAnswer(
            tokens=sampled[:, :, 0],
            failed=sampled[:, :, 1] != 0,
            logprobs=np.asarray(output.logprobs)[:num_steps] if wants & LOGPROBS else None,
            prompt_logprobs=np.asarray(output.prompt_logprobs) if wants & PROMPT_LOGPROBS else None,
            beams=unpack_answer(np.asarray(output.beams)[:num_sampled]) if wants & BEAM else None,
        )

    def wait(self, running: RunningStep) -> None:
        """Returns when the step has ended, well or not: `fetch` says which."""
        if running.output is not None:
            with contextlib.suppress(Exception):
                jax.block_until_ready(running.output.sampled)


def line_through(seconds: Mapping[int, float]) -> tuple[float, float]:
    """What is fixed and what each block adds, by the fewest and the most blocks that were timed; zeros if none were."""
    if not seconds:
        return 0.0, 0.0
    few, many = min(seconds), max(seconds)
    if few == many:
        return 0.0, seconds[many] / many
    block_s = max(seconds[many] - seconds[few], 0.0) / (many - few)
    return max(seconds[few] - few * block_s, 0.0), block_s
