"""A small byte-level tokenizer, an engine that plays scripts, and the real application around them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import httpx
import pytest
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxserve.config import ModelConfig
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_files import TokenizerFiles
from jaxserve.types import BeamSearchParams, Delta, EngineStats, SamplingParams, TokenLogprobs
from jaxserve_server.app import AppSettings, build_app
from jaxserve_server.routes import api_routes
from jaxserve_server.serving import Serving
from jaxserve_server.status import Phase, ServerStatus

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("Ġw", "or"), ("l", "d")]
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
MAX_MODEL_LEN = 64


def byte_level(*, add_bos: bool = False) -> Tokenizer:
    """256 bytes, eight merges ("hello", " wor", "ld") and four control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    controls = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    if add_bos:
        bos = ("<|bos|>", backend.token_to_id("<|bos|>"))
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    return Tokenizer(TokenizerFiles(backend, SPECIAL, CHATML))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Puts no BOS before a prompt."""
    return byte_level()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Tokenizer:
    """Puts a BOS before a prompt."""
    return byte_level(add_bos=True)


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return ChatTemplate(CHATML, SPECIAL)


@pytest.fixture(scope="session")
def model_config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position=MAX_MODEL_LEN,
        eos_token_ids=(tokenizer.token_to_id("<|im_end|>"),),
    )


def scored(token_id: int, count: int, index: int = 0) -> TokenLogprobs:
    """Made-up logprobs: the token itself is the likeliest, then its neighbours, each half as likely.

    Continuations are the likelier the later they are: -0.1 for the first, -0.1 / 2 for the second …
    """
    own = -0.1 / (index + 1)
    neighbours = [(max(0, token_id - i), own - 0.7 * i) for i in range(count)]
    return TokenLogprobs(token_id, own, 1, tuple(neighbours))


class ScriptedEngine:
    """Says `reply` to everything, one token a delta, or plays `script`: deltas, exceptions to raise, events to await.

    Continuations take turns; the one of index i begins i tokens into the reply, so that few are alike. A beam
    search gives all its hypotheses at the end, each as one delta. A continuation that was aborted by its index
    says no more but its end.

    Attributes:
        calls: (prompt, params, request id) of each request.
        salts: the cache_salt of each request.
        yielded: the id of each delta that was given.
        aborted: ids whose iterator was closed before its last delta.
        told: (id, reason, index) of each call of `abort`.
        resets: calls of `reset_prefix_cache`.
    """

    def __init__(self, tokenizer: Tokenizer, reply: str = "hello world", script: Sequence[Any] | None = None):
        self.tokenizer = tokenizer
        self.reply = reply
        self.script = script
        self.calls: list[tuple[tuple[int, ...], SamplingParams | BeamSearchParams, str | None]] = []
        self.salts: list[str | None] = []
        self.yielded: list[str | None] = []
        self.aborted: list[str | None] = []
        self.told: list[tuple[str, str, int | None]] = []
        self.resets = 0
        self.is_ready = True
        self.pace: Callable[[], Any] = lambda: asyncio.sleep(0)

    def play(self, token_ids: Sequence[int], params: SamplingParams | BeamSearchParams) -> list[Any]:
        """The deltas of `reply` under `params`."""
        if isinstance(params, BeamSearchParams):
            return [self._hypothesis(token_ids, params, i) for i in range(params.beam_width)]
        each = [self._continuation(token_ids, params, i) for i in range(params.num_sequences)]
        return [delta for turn in zip_longest(*each) for delta in turn if delta is not None]

    def _reply(self, token_ids: Sequence[int], max_tokens: int | None, index: int) -> tuple[list[int], str]:
        ids = [*self.tokenizer.encode(self.reply, False), *self.tokenizer.encode("<|im_end|>", False)]
        ids = ids[index % len(ids) :]
        kept = ids[: min(max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(token_ids))]
        return kept, "stop" if kept == ids else "length"

    def _continuation(self, token_ids: Sequence[int], params: SamplingParams, index: int) -> list[Delta]:
        """Cut at max_tokens, with the logprobs that were asked; with the first delta what the prompt has."""
        kept, reason = self._reply(token_ids, params.max_tokens, index)
        prompt = None
        if params.prompt_logprobs is not None and index == 0:
            prompt = (None, *(scored(i, params.prompt_logprobs) for i in token_ids[1:]))
        return [
            Delta(
                token_ids=(token_id,),
                logprobs=None if params.logprobs is None else (scored(token_id, params.logprobs, index),),
                prompt_logprobs=prompt if n == 0 else None,
                finish_reason=reason if n == len(kept) - 1 else None,
                num_cached_tokens=3 if n == index == 0 else 0,
                index=index,
            )
            for n, token_id in enumerate(kept)
        ]

    def _hypothesis(self, token_ids: Sequence[int], params: BeamSearchParams, index: int) -> Delta:
        kept, reason = self._reply(token_ids, params.max_tokens, index)
        total = -0.5 - index
        cached = 3 if index == 0 else 0
        score = total / len(kept) ** params.length_penalty
        return Delta(tuple(kept), None, None, reason, None, cached, None, index, total, score)

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        self.calls.append((tuple(token_ids), params, request_id))
        self.salts.append(cache_salt)
        num_open = params.num_sequences
        try:
            for item in self.play(token_ids, params) if self.script is None else self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                if any(told == request_id and index == item.index for told, _, index in self.told):
                    continue
                await self.pace()
                self.yielded.append(request_id)
                if item.finish_reason is not None:
                    num_open = 0 if item.finish_reason in ("abort", "error") else num_open - 1
                yield item
        finally:
            if num_open:
                self.aborted.append(request_id)

    def abort(self, request_id: str, reason: str = "abort", index: int | None = None) -> None:
        self.told.append((request_id, reason, index))

    async def reset_prefix_cache(self) -> int:
        self.resets += 1
        return 5

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 8, 8, 0, 0, 0, 0.0)


class Server:
    """The application with one engine, and a client in the same process."""

    def __init__(self, engine: ScriptedEngine, serving: Serving):
        self.engine = engine
        self.serving = serving
        status = ServerStatus(phase=Phase.READY)
        built = build_app(api_routes(), status, AppSettings(allowed_hosts=None, log_requests=False))
        built.inner.state.serving = serving
        self.app = built.asgi

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(send())

    def post(self, path: str, body: Any) -> httpx.Response:
        """Sends `body`: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, content=data, headers={"content-type": "application/json"})

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self._ok("/v1/completions", {"model": "tiny", **fields})

    def chat(self, content: str = "hi", **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return self._ok("/v1/chat/completions", {"model": "tiny", "messages": messages, **fields})

    def _ok(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The stream's data, parsed; "[DONE]" stays text. Every event is one `data:` line and an empty one."""
        answer = self.post(path, {"model": "tiny", "stream": True, **body})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("\n\n")
        lines = answer.text[:-2].split("\n\n")
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@pytest.fixture
def make_server(tokenizer: Tokenizer, template: ChatTemplate, model_config: ModelConfig) -> Callable[..., Server]:
    def make(reply: str = "hello world", script: Sequence[Any] | None = None, **changes: Any) -> Server:
        engine = ScriptedEngine(tokenizer, reply, script)
        settings: dict[str, Any] = {
            "engine": engine,
            "tokenizer": tokenizer,
            "chat_template": template,
            "model_names": ("tiny", "org/tiny"),
            "model_config": model_config,
            "max_model_len": MAX_MODEL_LEN,
            "system_fingerprint": "jaxserve-test",
            "created": 1_700_000_000,
        }
        return Server(engine, Serving(**{**settings, **changes}))

    return make


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def error_of() -> Callable[[httpx.Response], dict[str, Any]]:
    """The error object of an answer, checked for OpenAI's shape, the table's row and details that must not leak."""
    from jaxserve_server.errors import ErrorKind

    rows = {(kind.value.status, kind.value.type, kind.value.code) for kind in ErrorKind}

    def error(answer: httpx.Response) -> dict[str, Any]:
        body = answer.json()
        assert set(body) == {"error"}, body
        found = body["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str)
        assert (answer.status_code, found["type"], found["code"]) in rows
        assert not re.search(r'/home/|0x[0-9a-f]{6,}|Traceback|site-packages|File "', found["message"])
        return found

    return error


@pytest.fixture
def listen() -> Iterator[Callable[[Any], str]]:
    """Serves an application with uvicorn on a loopback port, in a thread; returns its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any) -> str:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, http="h11", log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        listening = threading.Event()
        startup = server.startup

        async def announced(sockets: Any = None) -> None:
            await startup(sockets)
            listening.set()

        server.startup = announced
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert listening.wait(10)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
