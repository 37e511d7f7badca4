"""`POST /v1/chat/completions`: a conversation in, the next message out, `n` times."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from jaxserve_server.body import read_request
from jaxserve_server.choices import Candidates, Choice, Style, chat_choice_logprobs, choice_prompt_logprobs, total_usage
from jaxserve_server.generation import Job, new_response_id, run
from jaxserve_server.prompts import Prompt, chat_prompt, fit
from jaxserve_server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    usage,
)
from jaxserve_server.routes.answer import json_response
from jaxserve_server.sampling import chat_params, check_chat
from jaxserve_server.schemas import ChatRequest
from jaxserve_server.serving import Serving
from jaxserve_server.sse import DONE, event, start_stream, while_connected


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, ready to run."""

    request: ChatRequest
    serving: Serving
    job: Job
    style: Style
    id: str
    created: int

    def chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self.created,
            model=self.serving.model_name,
            choices=choices,
            system_fingerprint=self.serving.system_fingerprint,
        )


async def chat_completions(request: Request, serving: Serving) -> Response:
    body = await read_request(request, ChatRequest, max_depth=serving.limits.max_json_depth)
    check_chat(body, serving)
    call = _Call(
        request=body,
        serving=serving,
        job=_job(await chat_prompt(body, serving), body, serving),
        style=_style(body),
        id=new_response_id("chatcmpl", body.request_id),
        created=int(time.time()),
    )
    if body.stream:
        return await start_stream(request.receive, _events(call))
    return json_response(await while_connected(request.receive, _whole(call)))


def _job(prompt: Prompt, request: ChatRequest, serving: Serving) -> Job:
    """The engine's request; without a bound of its own the answer may fill the context."""
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    prompt = fit(prompt, request, serving, asked, what="messages")
    room = serving.max_model_len - len(prompt.token_ids)
    wanted = room if asked is None else asked
    if asked is None and (default := serving.default_sampling.get("max_tokens")):
        wanted = min(room, int(default))
    params = chat_params(request, serving, max_tokens=wanted)
    return Job(0, prompt, params, request.n or 1, request.cache_salt)


def _style(request: ChatRequest) -> Style:
    return Style(
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        num_prompt_logprobs=request.prompt_logprobs,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        token_ids=bool(request.return_token_ids),
        interval=request.stream_interval or 1,
    )


async def _states(call: _Call, candidates: Candidates) -> AsyncGenerator[Choice | None, None]:
    """The choices, each after each of its tokens; None after those that came together."""
    async with aclosing(run(call.serving, [call.job])) as gains:
        async for gain in gains:
            candidates.note(gain)
            for part in gain.parts:
                choice = candidates.choices[part.index]
                choice.add(part.gain)
                yield choice
            yield None


async def _whole(call: _Call) -> ChatCompletion:
    candidates = Candidates(call.job, call.style)
    async with aclosing(_states(call, candidates)) as states:
        async for _ in states:
            pass
    best = candidates.best()
    return ChatCompletion(
        id=call.id,
        created=call.created,
        model=call.serving.model_name,
        choices=[_chat_choice(call, choice) for choice in best],
        usage=total_usage([candidates]),
        system_fingerprint=call.serving.system_fingerprint,
        prompt_token_ids=list(call.job.prompt.token_ids) if call.style.token_ids else UNSET,
        prompt_logprobs=choice_prompt_logprobs(best[0], call.serving.tokenizer),
    )


def _chat_choice(call: _Call, choice: Choice) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=ChatMessage("assistant", choice.text),
        logprobs=chat_choice_logprobs(choice, call.serving.tokenizer),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids if call.style.token_ids else UNSET,
    )


async def _events(call: _Call) -> AsyncGenerator[bytes, None]:
    """For each choice the role with its first token, then a chunk a token; its last one says why it ended.

    The chunks of tokens that came together leave in one piece: a write costs several times a chunk.
    """
    candidates = Candidates(call.job, call.style)
    options = call.request.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    with_role: set[int] = set()
    events = b""
    async with aclosing(_states(call, candidates)) as states:
        async for choice in states:
            if choice is None:
                if events:
                    yield events
                    events = b""
                continue
            if choice.index not in with_role:
                events += _role_event(call, choice, continuous, is_first=not with_role)
                with_role.add(choice.index)
            if choice.due:
                events += _content_event(call, choice, continuous)
    last = DONE
    if options and options.include_usage:
        chunk = call.chunk([])
        chunk.usage = total_usage([candidates])
        last = event(chunk) + DONE
    yield last


def _role_event(call: _Call, choice: Choice, continuous: bool, *, is_first: bool) -> bytes:
    """Sent with the first token and not before: clients take the first chunk for the first token."""
    chunk = call.chunk([ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))])
    if call.style.token_ids and is_first:
        chunk.prompt_token_ids = list(call.job.prompt.token_ids)
    if continuous:
        chunk.usage = usage(len(call.job.prompt.token_ids), 0, choice.source.num_cached_tokens)
    return event(chunk)


def _content_event(call: _Call, choice: Choice, continuous: bool) -> bytes:
    written = ChatChunkChoice(
        index=choice.index,
        delta=ChatDelta(content=choice.text),
        logprobs=chat_choice_logprobs(choice, call.serving.tokenizer),
        finish_reason=choice.finish_reason,
        stop_reason=UNSET if choice.finish_reason is None else choice.stop_reason,
        token_ids=choice.token_ids if call.style.token_ids else UNSET,
    )
    chunk = call.chunk([written])
    if continuous:
        chunk.usage = choice.usage()
    choice.clear()
    return event(chunk)
