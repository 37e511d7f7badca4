"""`POST /v1/chat/completions`: a conversation in, the next message out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from jaxserve_server.body import read_request
from jaxserve_server.choices import Choice, Style, chat_choice_logprobs, choice_prompt_logprobs
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
    return Job(0, prompt, chat_params(request, serving, max_tokens=wanted))


def _style(request: ChatRequest) -> Style:
    return Style(
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        num_prompt_logprobs=request.prompt_logprobs,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        token_ids=bool(request.return_token_ids),
        interval=request.stream_interval or 1,
    )


async def _states(call: _Call, choice: Choice) -> AsyncGenerator[Choice, None]:
    """The choice after each token."""
    async with aclosing(run(call.serving, [call.job])) as gains:
        async for gain in gains:
            choice.num_cached_tokens = max(choice.num_cached_tokens, gain.num_cached_tokens)
            if gain.prompt_logprobs is not None:
                choice.prompt_logprobs = gain.prompt_logprobs
            for part in gain.parts:
                choice.add(part)
                yield choice


async def _whole(call: _Call) -> ChatCompletion:
    tokenizer = call.serving.tokenizer
    choice = Choice(0, call.job.prompt, call.style)
    async with aclosing(_states(call, choice)) as states:
        async for _ in states:
            pass
    written = ChatChoice(
        index=0,
        message=ChatMessage("assistant", choice.text),
        logprobs=chat_choice_logprobs(choice, tokenizer),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids if call.style.token_ids else UNSET,
    )
    return ChatCompletion(
        id=call.id,
        created=call.created,
        model=call.serving.model_name,
        choices=[written],
        usage=choice.usage(),
        system_fingerprint=call.serving.system_fingerprint,
        prompt_token_ids=list(call.job.prompt.token_ids) if call.style.token_ids else UNSET,
        prompt_logprobs=choice_prompt_logprobs(choice, tokenizer),
    )


async def _events(call: _Call) -> AsyncGenerator[bytes, None]:
    """The role with the first token, then a chunk a token; the last one says why it ended."""
    choice = Choice(0, call.job.prompt, call.style)
    options = call.request.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    role_sent = False
    async with aclosing(_states(call, choice)) as states:
        async for _ in states:
            events = b"" if role_sent else _role_event(call, choice, continuous)
            role_sent = True
            if choice.due:
                events += _content_event(call, choice, continuous)
            if events:
                yield events
    last = DONE
    if options and options.include_usage:
        chunk = call.chunk([])
        chunk.usage = choice.usage()
        last = event(chunk) + DONE
    yield last


def _role_event(call: _Call, choice: Choice, continuous: bool) -> bytes:
    """Sent with the first token and not before: clients take the first chunk for the first token."""
    chunk = call.chunk([ChatChunkChoice(0, ChatDelta(role="assistant", content=""))])
    if call.style.token_ids:
        chunk.prompt_token_ids = list(call.job.prompt.token_ids)
    if continuous:
        chunk.usage = usage(len(call.job.prompt.token_ids), 0, choice.num_cached_tokens)
    return event(chunk)


def _content_event(call: _Call, choice: Choice, continuous: bool) -> bytes:
    written = ChatChunkChoice(
        index=0,
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
