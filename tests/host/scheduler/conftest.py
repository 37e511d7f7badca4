"""Makers of schedulers and requests, shared by this folder's tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request


@pytest.fixture(scope="session")
def make_scheduler() -> Callable[..., Scheduler]:
    """A small scheduler: blocks of 4 tokens, 4 rows, sequences up to 64 tokens, 16 tokens a step."""

    def make(num_blocks: int = 17, **changes: object) -> Scheduler:
        values: dict = {
            "block_size": 4,
            "max_num_seqs": 4,
            "max_model_len": 64,
            "max_num_batched_tokens": 16,
            "eos_token_ids": (7,),
        }
        return Scheduler(SchedulerLimits(num_blocks=num_blocks, **(values | changes)))

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """A request whose prompt is a function of its name."""

    def make(name: str, num_prompt: int = 5, max_tokens: int = 10, **fields: object) -> Request:
        rng = np.random.default_rng(list(name.encode()))
        prompt = rng.integers(0, 1000, num_prompt, dtype=np.int32)
        return Request(name, prompt, num_prompt + max_tokens, **fields)  # pyright: ignore[reportArgumentType]

    return make
