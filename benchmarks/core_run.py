"""An engine without text and threads, and batches of requests run through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.types import BeamSearchParams, Delta, SamplingParams
from jaxserve_checkpoints.load import load_for_engine


def make_core(model: str, dtype: str, **config: Any) -> EngineCore:
    """The model's engine, compiled and run once.

    Args:
        config: fields of `EngineConfig`.
    """
    engine_config = EngineConfig(**config)
    loaded = load_for_engine(model, engine_config, dtype=dtype)
    return EngineCore(loaded.config, loaded.params, engine_config)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch of requests took.

    Attributes:
        wall_s, cpu_s: from the first `add` to the last token; processor seconds of all threads.
        first_s: of each request, from the first `add` to its first token.
        num_output, num_cached: tokens made, and prompt tokens that the prefix cache had.
    """

    wall_s: float
    cpu_s: float
    first_s: tuple[float, ...]
    num_output: int
    num_cached: int


def run_batch(core: EngineCore, prompts: Sequence[np.ndarray], params: SamplingParams | BeamSearchParams) -> Batch:
    """Adds all prompts at once and steps until all have ended."""
    admitted = [core.check(prompt.tolist(), params) for prompt in prompts]
    first_s: dict[int, float] = {}
    num_output = num_cached = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for index, request in enumerate(admitted):
        core.add(f"batch-{index}", request, index)
    while core.has_work:
        deltas: list[tuple[int, Delta]] = core.step()
        now = time.perf_counter() - wall
        for index, delta in deltas:
            assert delta.finish_reason in (None, "length"), delta
            first_s.setdefault(index, now)
            num_output += len(delta.token_ids)
            num_cached += delta.num_cached_tokens
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    assert num_output == len(prompts) * params.num_sequences * (params.max_tokens or 0), "an answer is too short"
    return Batch(wall_s, cpu_s, tuple(first_s[index] for index in range(len(prompts))), num_output, num_cached)
