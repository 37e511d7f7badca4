"""The device's half of the engine: owns parameters, cache and state, and is the only caller of jax.

It runs plans and returns answers; what they mean is `engine.EngineCore`'s business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine.admission import TABLE_FEATURES, AdmittedParams, pack_row, pack_tables
from jaxserve.engine.compiled import CompiledSteps, OnProgress, compile_steps
from jaxserve.engine.pack import pack_step
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.sequences import SequenceTable
from jaxserve.state import LOGPROBS, PROMPT_LOGPROBS, StepOutput, init_decode_state, init_kv_cache, tree_device_bytes


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A dispatched step. `fetch` waits for it.

    Attributes:
        features: OR of the feature bits that the step was packed with.
        dispatched_s: `time.monotonic` when it was handed to the device.
    """

    plan: StepPlan
    features: int
    output: StepOutput
    dispatched_s: float


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """A step's output on the host.

    Attributes:
        tokens: int32 [S] in the order of `plan.sampled_rows`.
        failed: bool [S] where the logits were not finite.
        logprobs: int32 [S, 42] (`ops.logprobs`), or None if no row asked.
        prompt_logprobs: int32 [T, 42] in stream order, or None if no row asked.
    """

    tokens: np.ndarray
    failed: np.ndarray
    logprobs: np.ndarray | None
    prompt_logprobs: np.ndarray | None


class Runner:
    """One model on one device.

    Attributes:
        model, limits: what it was made for.
        compiled: its programs.
    """

    def __init__(
        self, params: Any, model: ModelConfig, limits: EngineLimits, *, on_progress: OnProgress | None = None
    ) -> None:
        self.model, self.limits = model, limits
        self._params = params
        self._features = np.zeros(limits.max_num_seqs, np.int32)
        self.reset()
        self.compiled: CompiledSteps = compile_steps(params, self._kv, self._state, model, limits, on_progress)
        self._warm_up()

    def reset(self) -> None:
        """Cache and state anew: at start, and after a step that failed and took the donated ones with it."""
        limits, model = self.limits, self.model
        as_bits = jax.default_backend() == "cpu"
        self._kv = init_kv_cache(model, limits.num_blocks, limits.block_size, limits.kv_dtype, as_bits=as_bits)
        self._state = init_decode_state(limits.max_num_seqs, limits.max_blocks_per_row, model.vocab_size)

    @property
    def kv_bytes(self) -> int:
        return tree_device_bytes(self._kv)

    def _warm_up(self) -> None:
        """Runs every program once on padding, so that the first request finds all buffers and pages made."""
        for shape, executable in self.compiled.steps:
            packed = np.zeros(shape.packed_len, np.int32)
            for name in ("rows", "sample_rows", "update_rows"):
                start, length = shape.fields()[name]
                packed[start : start + length] = shape.max_rows
            self._kv, self._state, output = executable(self._params, self._kv, self._state, packed)
            jax.block_until_ready(output)

    def admit(self, row: int, admitted: AdmittedParams, known: np.ndarray) -> None:
        """Tells the device whose row this is now, before the step that first feeds it.

        Args:
            known: every token of the sequence that the host knows.
        """
        vocab_size = self.model.vocab_size
        self._features[row] = admitted.features
        self._state = self.compiled.admit(self._state, pack_row(row, admitted, known, vocab_size))
        if admitted.features & TABLE_FEATURES:
            tables = pack_tables(row, admitted.params, vocab_size)
            self._state = self.compiled.set_tables(self._state, tables)

    def run(self, plan: StepPlan, sequences: SequenceTable) -> RunningStep:
        """Dispatches a committed plan; returns at once.

        Cost: 10-40 us of numpy and one dispatch.
        """
        shape, executable = self.compiled.for_tokens(plan.num_tokens)
        packed = pack_step(plan, shape, sequences.token_ids, sequences.num_prompt, self._features)
        dispatched_s = time.monotonic()
        self._kv, self._state, output = executable(self._params, self._kv, self._state, packed)
        output.sampled.copy_to_host_async()
        return RunningStep(plan, int(packed[2]), output, dispatched_s)

    def fetch(self, running: RunningStep) -> StepAnswer:
        """Waits for a step and brings its answer to the host."""
        num_sampled = len(running.plan.sampled_rows)
        sampled = np.asarray(running.output.sampled)[:num_sampled]
        wants = running.features
        return StepAnswer(
            tokens=sampled[:, 0],
            failed=sampled[:, 1] != 0,
            logprobs=np.asarray(running.output.logprobs) if wants & LOGPROBS else None,
            prompt_logprobs=np.asarray(running.output.prompt_logprobs) if wants & PROMPT_LOGPROBS else None,
        )
