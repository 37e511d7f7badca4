"""`POST /v1/completions`: prompts in, their continuations out, `n` choices a prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.text.assembler import TextDelta, TextPart
from jaxserve_server.body import read_request
from jaxserve_server.choices import Candidates, Choice, Style, completion_choice, echoed, total_usage
from jaxserve_server.generation import Gain, Job, new_response_id, run
from jaxserve_server.prompts import Prompt, completion_prompts, fit, off_loop
from jaxserve_server.responses import Completion, CompletionChoice
from jaxserve_server.routes.answer import json_response
from jaxserve_server.sampling import DEFAULT_COMPLETION_TOKENS, check_completion, completion_params
from jaxserve_server.schemas import CompletionRequest
from jaxserve_server.serving import Serving
from jaxserve_server.sse import DONE, event, start_stream, while_connected


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, ready to run."""

    request: CompletionRequest
    serving: Serving
    jobs: list[Job]
    style: Style
    id: str
    created: int

    @property
    def echo_only(self) -> bool:
        return bool(self.request.echo) and self.request.max_tokens == 0

    def answer(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.serving.model_name,
            choices=choices,
            system_fingerprint=self.serving.system_fingerprint,
        )


async def completions(request: Request, serving: Serving) -> Response:
    body = await read_request(request, CompletionRequest, max_depth=serving.limits.max_json_depth)
    check_completion(body, serving)
    call = _Call(
        request=body,
        serving=serving,
        jobs=[_job(i, prompt, body, serving) for i, prompt in enumerate(await completion_prompts(body, serving))],
        style=_style(body),
        id=new_response_id("cmpl", body.request_id),
        created=int(time.time()),
    )
    if body.stream:
        return await start_stream(request.receive, _events(call))
    return json_response(await while_connected(request.receive, _whole(call)))


def _job(index: int, prompt: Prompt, request: CompletionRequest, serving: Serving) -> Job:
    """The engine's request; a default that does not fit the context is shortened, a bound that was asked is not."""
    prompt = fit(prompt, request, serving, request.max_tokens, what="prompt")
    wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else max(1, request.max_tokens)
    room = max(1, serving.max_model_len - len(prompt.token_ids))
    params = completion_params(request, serving, max_tokens=min(wanted, room))
    return Job(index, prompt, params, request.n or 1, request.cache_salt)


def _style(request: CompletionRequest) -> Style:
    return Style(
        num_logprobs=request.logprobs,
        num_prompt_logprobs=request.prompt_logprobs,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        token_ids=bool(request.return_token_ids),
        interval=request.stream_interval or 1,
    )


async def _gains(call: _Call, prompts: list[Candidates]) -> AsyncGenerator[Choice | None, None]:
    """The choices, each after each of its tokens; None after those that came together.

    An echoed prompt comes with the first of a choice's tokens.
    """
    echoes: list[tuple[str, list[int]]] = []
    if call.request.echo:
        size = sum(len(job.prompt.token_ids) for job in call.jobs)
        tokenizer = call.serving.tokenizer
        echoes = await off_loop(size, call.serving, lambda: [echoed(job.prompt, tokenizer) for job in call.jobs])
    async with aclosing(_run(call)) as gains:
        async for gain in gains:
            candidates = prompts[gain.job]
            candidates.note(gain)
            for part in gain.parts:
                choice = candidates.choices[part.index]
                if choice.finish_reason is not None:  # nothing but the echo was wanted
                    continue
                if echoes and not choice.begun:
                    wanted = candidates.source.logprobs if call.request.logprobs is not None else None
                    choice.echo(*echoes[gain.job], wanted)
                choice.add(_NOTHING if call.echo_only else part.gain)
                yield choice
            yield None


_NOTHING = TextDelta("", finish_reason="length")  # what a prompt of which only the echo is wanted generates


async def _run(call: _Call) -> AsyncGenerator[Gain, None]:
    if call.echo_only and call.request.logprobs is None and call.request.prompt_logprobs is None:
        for job in call.jobs:
            yield Gain(job.index, tuple(TextPart(i, _NOTHING) for i in range(job.params.num_sequences)))
        return
    async with aclosing(run(call.serving, call.jobs)) as gains:
        async for gain in gains:
            yield gain


async def _whole(call: _Call) -> Completion:
    prompts = [Candidates(job, call.style) for job in call.jobs]
    async with aclosing(_gains(call, prompts)) as gains:
        async for _ in gains:
            pass
    best = [choice for candidates in prompts for choice in candidates.best()]
    answer = call.answer([completion_choice(choice, call.serving.tokenizer) for choice in best])
    answer.usage = total_usage(prompts)
    return answer


async def _events(call: _Call) -> AsyncGenerator[bytes, None]:
    prompts = [Candidates(job, call.style) for job in call.jobs]
    options = call.request.stream_options
    events = b""  # of tokens that came together: they leave in one piece, since a write costs several times a chunk
    async with aclosing(_gains(call, prompts)) as gains:
        async for choice in gains:
            if choice is None:
                if events:
                    yield events
                    events = b""
            elif choice.due:
                chunk = call.answer([completion_choice(choice, call.serving.tokenizer)])
                if options and options.continuous_usage_stats:
                    chunk.usage = choice.usage()
                choice.clear()
                events += event(chunk)
    last = DONE
    if options and options.include_usage:
        chunk = call.answer([])
        chunk.usage = total_usage(prompts)
        last = event(chunk) + DONE
    yield last
