"""Runs a request's prompts through the engine and makes text of what comes back.

Owns the life of the engine's requests behind one HTTP request: whoever stops reading, for whatever reason,
ends them. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.errors import EngineError
from jaxserve.text.assembler import Continuations, TextPart
from jaxserve.types import BeamSearchParams, SamplingParams, TokenLogprobs
from jaxserve_server.errors import from_exception
from jaxserve_server.prompts import Prompt
from jaxserve_server.serving import Serving

T = TypeVar("T")
MERGE_BUFFER = 2  # deltas a prompt held for a slow reader; past it the engine joins them


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to run.

    Attributes:
        index: the prompt's, among the request's.
        num_choices: of its continuations, those that are answered; their choices are `index * num_choices` and on.
    """

    index: int
    prompt: Prompt
    params: SamplingParams | BeamSearchParams
    num_choices: int = 1
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class Gain:
    """What one job gained: one part a token, so that a chunk can be one token.

    Attributes:
        job: its index.
        prompt_logprobs: one entry a prompt token, in the first gain only.
    """

    job: int
    parts: tuple[TextPart, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


def new_response_id(prefix: str, given: str | None) -> str:
    """The id that the answer carries; the engine's own ids are never the client's (S-32)."""
    return f"{prefix}-{given or uuid.uuid4().hex}"


def run(serving: Serving, jobs: Sequence[Job]) -> AsyncGenerator[Gain, None]:
    """What the jobs gain, as it comes. Closing it aborts the jobs that still run."""
    return merge([run_job(serving, job) for job in jobs])


async def run_job(serving: Serving, job: Job) -> AsyncGenerator[Gain, None]:
    """Yields one job's gains until all its continuations have ended, by themselves or at a stop string.

    Raises:
        ApiError: the engine refused it, or one of its continuations failed.
    """
    texts = Continuations(serving.tokenizer, job.params, job.prompt.token_ids)
    request_id = f"gen-{uuid.uuid4().hex}"
    deltas = serving.engine.generate(job.prompt.token_ids, job.params, request_id=request_id, cache_salt=job.cache_salt)
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.finish_reason == "error" or delta.error is not None:
                raise from_exception(delta.error or EngineError("The request failed."))
            parts = texts.push(delta)
            for part in parts:
                if part.cut:  # a stop string, which the engine cannot see
                    serving.engine.abort(request_id, "stop", part.index)
            yield Gain(job.index, tuple(parts), delta.num_cached_tokens, delta.prompt_logprobs)
            if texts.finished:
                return
    raise EngineError("The engine's answer ended without a reason.")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they come; the first exception of any ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[tuple[T | None, Exception | None]] = asyncio.Queue(MERGE_BUFFER * len(streams))
    tasks = [asyncio.create_task(_feed(stream, queue)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item, exc = await queue.get()
            if exc is not None:
                raise exc
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(stream: AsyncGenerator[T, None], queue: asyncio.Queue[tuple[T | None, Exception | None]]) -> None:
    """Puts the stream's items into the queue, then (None, None), or (None, its exception)."""
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put((item, None))
    except Exception as exc:  # travels to the reader
        await queue.put((None, exc))
    else:
        await queue.put((None, None))
