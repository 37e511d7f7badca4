"""The demo model behind the real server, as its users meet it: the issue's list of what shows it is done."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

READY_S = 300.0  # two busy cores compile slowly; an idle machine needs a tenth of it
QUESTIONS = [
    "Hello!", "Who are you?", "What is the capital of France?", "Tell me a story about a fox.", "What is 7 + 5?",
    "What is a block table?", "Tell me a joke.", "Name three fruits.",
]  # fmt: skip


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not among the metrics"
        return sum(map(float, found))

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "requests that nobody reads go on"
            time.sleep(0.05)


def start(folder: Path, *flags: str) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"server-{port}.log"
    environment = os.environ | {"HOME": str(folder)}  # a compilation cache of our own
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "jaxserve.serve", "--port", str(port), *flags]
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return server
        except httpx.TransportError:
            pass  # nobody listens yet
        time.sleep(0.1)
    raise AssertionError(f"not ready after {READY_S} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path, repo: Path) -> Iterator[Server]:
    """`python -m jaxserve.serve` with no model named; must end with status 0."""
    paths = os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        server = start(home)
    try:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str, **kwargs: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="demo", messages=messages, **{"temperature": 0, **kwargs})


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_answers_in_english_and_ends_its_own_answers(client: openai.OpenAI, question: str) -> None:
    choice = ask(client, question).choices[0]
    assert choice.finish_reason == "stop", "the model does not end its answer"
    text = choice.message.content
    assert re.fullmatch(r"[\x20-\x7e\n…’“”–—]+", text), text
    words = re.findall(r"[a-z]+", text.lower())
    assert words
    assert len(set(words)) > len(words) / 4, f"it repeats itself: {text}"


def test_it_knows_what_it_was_taught(client: openai.OpenAI) -> None:
    assert "Paris" in ask(client, "What is the capital of France?").choices[0].message.content
    assert "blocks" in ask(client, "What is a block table?").choices[0].message.content
    story = ask(client, "Tell me a story about a fox.").choices[0].message.content
    assert "fox" in story
    assert len(story.split()) > 40


def test_usage_logprobs_and_stream_agree(client: openai.OpenAI) -> None:
    whole = ask(client, "Hello!", logprobs=True, top_logprobs=3, seed=1)
    stream = list(
        ask(
            client, "Hello!", logprobs=True, top_logprobs=3, seed=1, stream=True, stream_options={"include_usage": True}
        )
    )
    assert stream[-1].usage == whole.usage
    assert stream[-1].choices == []
    chunks = [c.choices[0] for c in stream[:-1]]
    assert "".join(c.delta.content or "" for c in chunks) == whole.choices[0].message.content
    tokens = [t for c in chunks if c.logprobs for t in c.logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    for token in tokens:  # greedy: the chosen token is the likeliest, as the very same float
        assert token.logprob == max(t.logprob for t in token.top_logprobs)
    assert chunks[-1].finish_reason == "stop"


def test_completions_echo_and_score_a_prompt(client: openai.OpenAI) -> None:
    prompt = "Once upon a time there was a fox"
    scored = client.completions.create(model="demo", prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens).endswith(scored.choices[0].text[-3:])
    several = client.completions.create(model="demo", prompt=[prompt, "The moon"], max_tokens=8, temperature=0)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.usage.completion_tokens <= 16


def test_the_same_seed_gives_the_same_text_and_another_seed_another(client: openai.OpenAI) -> None:
    tell = lambda seed: ask(client, QUESTIONS[3], temperature=1, seed=seed, max_tokens=40).choices[0].message.content  # noqa: E731
    assert tell(1) == tell(1)
    assert len({tell(seed) for seed in range(2, 8)}) > 3


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    full = ask(client, QUESTIONS[3]).choices[0].message.content
    word = full.split()[10]
    cut = ask(client, QUESTIONS[3], stop=[word])
    assert cut.choices[0].message.content == full.split(word)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_three_choices_streamed_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 2, "seed": 4, "max_tokens": 40}
    whole = ask(client, QUESTIONS[3], **options)
    assert len({choice.message.content for choice in whole.choices}) == 3
    pieces, reasons, usage = {0: "", 1: "", 2: ""}, {}, None
    for chunk in ask(client, QUESTIONS[3], stream=True, stream_options={"include_usage": True}, **options):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        usage = chunk.usage or usage
    assert pieces == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    first = ask(client, QUESTIONS[3], **options | {"n": 1})
    assert first.choices[0].message.content == pieces[0]
    assert first.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stop_string_of_one_choice_leaves_the_others(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 2, "seed": 4, "max_tokens": 40}
    texts = [choice.message.content for choice in ask(client, QUESTIONS[3], **options).choices]
    word = next(word for word in texts[1].split() if word not in texts[0] and word not in texts[2])
    choices = ask(client, QUESTIONS[3], stop=[word], **options).choices
    assert [choice.message.content for choice in choices] == [texts[0], texts[1].split(word)[0], texts[2]]
    assert (choices[1].finish_reason, choices[1].model_extra["stop_reason"]) == ("stop", word)


def test_best_of_and_beam_search(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12}
    four = client.completions.create(n=4, temperature=2, seed=9, logprobs=0, **options)
    best = client.completions.create(n=1, best_of=4, temperature=2, seed=9, **options)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in four.choices]
    assert [choice.text for choice in best.choices] == [four.choices[means.index(max(means))].text]
    assert best.usage.completion_tokens == four.usage.completion_tokens
    beams = client.completions.create(n=4, extra_body={"use_beam_search": True, "length_penalty": 0}, **options)
    assert len({choice.text for choice in beams.choices}) == 4
    assert [choice.index for choice in beams.choices] == [0, 1, 2, 3]


def test_what_was_computed_is_used_again_and_forgotten_on_demand(server: Server, client: openai.OpenAI) -> None:
    question = "Tell me a story about a fox who had never seen the sea and wanted to know what it was like."

    def cached(**extra: Any) -> int:
        answer = ask(client, question, max_tokens=4, extra_body=extra)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200
    hits = server.metric("vllm:prefix_cache_hits_total")
    assert cached() == 0
    again = cached()
    assert again >= 16
    assert server.metric("vllm:prefix_cache_hits_total") == hits + again
    assert (cached(cache_salt="mine"), cached(cache_salt="yours")) == (0, 0)
    assert cached(cache_salt="mine") == again
    assert httpx.post(f"{server.url}/reset_prefix_cache").content == b""
    assert cached() == 0


def test_a_client_that_leaves_ends_all_choices_of_its_request(server: Server) -> None:
    body = {"model": "demo", "prompt": "a", "n": 8, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        indices = set()
        for line in answer.iter_lines():
            if line:
                indices.add(httpx.Response(200, content=line[6:]).json()["choices"][0]["index"])
            if len(indices) == 8:
                break
    assert indices == set(range(8)), "the answer ended before all choices had begun"
    server.wait_until_idle()  # fails if anything runs on


def test_errors_reach_the_client_as_its_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(client, "x", temperature=3)
    assert (hot.value.code, hot.value.param) == ("decimal_above_max_value", "temperature")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "x " * 20_000)
    assert long.value.code == "context_length_exceeded"


async def gather(url: str, jobs: list[Callable[[httpx.AsyncClient], Awaitable[Any]]], width: int) -> list[Any]:
    gate = asyncio.Semaphore(width)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(job: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
            async with gate:
                return await job(http)

        return await asyncio.gather(*(one(job) for job in jobs))


def test_32_streams_at_once_say_what_each_says_alone(server: Server, client: openai.OpenAI) -> None:
    rng = np.random.default_rng(0)
    prompts = [f"{QUESTIONS[i % len(QUESTIONS)]} {'Please. ' * int(rng.integers(0, 6))}".strip() for i in range(32)]
    alone = [ask(client, p, max_tokens=64).choices[0].message.content for p in prompts]

    async def stream(http: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 64}
        ) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        chunks = [httpx.Response(200, content=line[6:]).json() for line in lines[:-1]]
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

    jobs = [lambda http, p=p: stream(http, p) for p in prompts]
    assert asyncio.run(gather(server.url, jobs, 32)) == alone


def random_body(rng: np.random.Generator) -> dict[str, Any]:
    """Any mix of parameters that the API honours."""
    optional: dict[str, Any] = {
        "temperature": float(rng.random() * 2), "top_p": float(rng.random()), "top_k": int(rng.integers(1, 300)),
        "min_p": float(rng.random() * 0.3), "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 7,
        "repetition_penalty": 1.1, "logit_bias": {"5": 1.5}, "min_tokens": 1, "ignore_eos": True, "logprobs": 3,
        "stop": ["zebra", "."], "stop_token_ids": [9], "allowed_token_ids": list(range(40, 900)),
        "bad_words": ["fox", "the moon"], "echo": True, "n": int(rng.integers(1, 4)), "cache_salt": "s",
    }  # fmt: skip
    chosen = {name: value for name, value in optional.items() if rng.random() < 0.2}
    prompt = " ".join(["a fox and a moon"] * int(rng.integers(1, 40)))
    return {"model": "demo", "prompt": prompt, "max_tokens": int(rng.integers(1, 12)), **chosen}


def test_a_thousand_requests_with_random_aborts_leak_and_compile_nothing(server: Server) -> None:
    """Blocks, tasks and descriptors are back; no program was compiled after ready."""
    rng = np.random.default_rng(1)
    process = psutil.Process(server.process.pid)
    (engine,) = process.children()

    async def one(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int) -> int:
        async with http.stream("POST", "/v1/completions", json=body | {"stream": leave_after >= 0}) as answer:
            if leave_after < 0:
                await answer.aread()
            else:
                async for _ in answer.aiter_lines():
                    leave_after -= 1
                    if leave_after < 0:
                        break
            return answer.status_code

    def batch(count: int) -> list[int]:
        bodies = [random_body(rng) for _ in range(count)]
        leave = [int(rng.integers(0, 8)) if rng.random() < 0.4 else -1 for _ in range(count)]
        jobs = [lambda http, b=b, n=n: one(http, b, n) for b, n in zip(bodies, leave, strict=True)]
        return asyncio.run(gather(server.url, jobs, 48))

    assert set(batch(100)) == {200}  # whatever is made once, is made now
    server.wait_until_idle()
    descriptors, threads = process.num_fds(), process.num_threads()
    engine_descriptors, engine_threads = engine.num_fds(), engine.num_threads()
    assert set(batch(1000)) == {200}
    server.wait_until_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("jaxserve:recompiles_after_ready_total") == 0
    deadline = time.monotonic() + 10  # closed sockets leave the server a moment after the client
    while process.num_fds() > descriptors + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.num_fds() <= descriptors + 2
    assert process.num_threads() <= threads + 2
    assert (engine.num_fds(), engine.num_threads()) == (engine_descriptors, engine_threads)
    assert "Traceback" not in server.log.read_text()


def test_the_engine_is_a_process_of_its_own_that_no_client_reaches(server: Server) -> None:
    (engine,) = psutil.Process(server.process.pid).children(recursive=True)
    assert "jaxserve_server.engine_worker" in engine.cmdline()
    assert not [c for c in engine.net_connections("all") if c.status == psutil.CONN_LISTEN]
    assert not [m for m in psutil.Process(server.process.pid).memory_maps() if "jaxlib" in m.path], (
        "jax in HTTP's process"
    )


def test_sigterm_lets_open_streams_end_and_starts_fast_again(server: Server, home: Path) -> None:
    """A second server on the first one's compilation cache; stopped with eight streams open."""
    second = start(home)
    try:
        assert list((home / ".cache/jaxserve/xla").iterdir()), "nothing was cached"
        (engine,) = psutil.Process(second.process.pid).children()

        async def stream(http: httpx.AsyncClient) -> list[str]:
            body = {
                "model": "demo",
                "prompt": "Once upon a time",
                "max_tokens": 600,
                "ignore_eos": True,
                "stream": True,
            }
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                return [line async for line in answer.aiter_lines() if line]

        async def run() -> tuple[list[list[str]], int]:
            async with httpx.AsyncClient(base_url=second.url, timeout=60) as http:
                streams = [asyncio.create_task(stream(http)) for _ in range(8)]
                all_run = re.compile(r"^vllm:num_requests_running\{[^}]*\} 8", re.MULTILINE)
                while not all_run.search((await http.get("/metrics")).text):
                    await asyncio.sleep(0.01)
                second.process.send_signal(signal.SIGTERM)
                while (await http.get("/health")).status_code == 200:
                    await asyncio.sleep(0.002)
                late = await http.post("/v1/completions", json={"model": "demo", "prompt": "x"})
                return await asyncio.gather(*streams), late.status_code

        results, late = asyncio.run(run())
        assert late == 503
        for lines in results:
            assert lines[-1] == "data: [DONE]"
            assert len(lines) > 500
        assert second.process.wait(timeout=60) == 0, second.log.read_text()
        assert not engine.is_running(), "the engine outlives its server"
    finally:
        second.process.kill()
        second.process.wait()
