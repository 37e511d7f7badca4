"""A server process around an engine that counts instead of computing. Run by tests, with JSON settings.

python fake_server.py '{"load_s": 0.2, "keys": ["secret"]}'
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError
from jaxserve.metrics import EngineMetrics
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_files import TokenizerFiles
from jaxserve.types import Delta, EngineStats, SamplingParams
from jaxserve_server.app import AppSettings
from jaxserve_server.auth import ApiKeys
from jaxserve_server.lifecycle import ServerSettings, Supervisor
from jaxserve_server.middleware import BodyLimits
from jaxserve_server.protocol import ConnectionLimits
from jaxserve_server.routes import api_routes
from jaxserve_server.serving import Serving
from jaxserve_server.startup_log import configure_logging
from jaxserve_server.status import Loaded


class CountingEngine:
    """Yields the integers from 0, modulo 64, one every `token_s`."""

    def __init__(self, token_s: float, shutdown_s: float) -> None:
        self.metrics = EngineMetrics(max_model_len=4096, cache_info={"block_size": "16", "num_gpu_blocks": "8"})
        self.is_ready = True
        self.num_open = self.num_aborted = 0
        self.reading: dict[str, Any] = {}
        self._token_s = token_s
        self._shutdown_s = shutdown_s

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta]:
        self.num_open += 1
        ended = False
        try:
            for i in range(params.max_tokens or 16):
                await asyncio.sleep(self._token_s)
                ended = i + 1 == params.max_tokens
                yield Delta((i % 64,), finish_reason="length" if ended else None)
        finally:
            self.num_open -= 1
            self.num_aborted += not ended

    def abort(self, request_id: str, reason: str = "abort", index: int | None = None) -> None:
        raise AssertionError("the shell of the server aborts nothing by itself")

    async def reset_prefix_cache(self) -> int:
        return 0

    def stats(self) -> EngineStats:
        idle = dict.fromkeys(EngineStats.__dataclass_fields__, 0) | {"num_blocks": 8, "num_free_blocks": 8}
        return EngineStats(**(idle | {"num_running": self.num_open} | self.reading))

    async def refresh(self) -> None:
        pass

    def shutdown(self) -> None:
        time.sleep(self._shutdown_s)
        print("engine shut down", flush=True)


async def count(request: Request) -> Response:
    """`{"n": 3}`: three numbers; `"stream": true`: as events."""
    body = await request.json()
    deltas = request.app.state.serving.engine.generate([1], SamplingParams(max_tokens=body["n"]))
    if body.get("stream"):
        return StreamingResponse(events(deltas), media_type="text/event-stream")
    return JSONResponse([delta.token_ids[0] async for delta in deltas])


async def events(deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
    async for delta in deltas:
        yield b"data: %d\n\n" % delta.token_ids[0]
    yield b"data: [DONE]\n\n"


async def flood(request: Request) -> Response:
    """More bytes than any buffer holds, for readers that do not read."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(2**20)

    return StreamingResponse(pieces(), media_type="application/octet-stream")


async def crash(request: Request) -> Response:
    raise RuntimeError(f"a secret of /home/user {request.headers['x-secret']}")


async def crash_in_stream(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: 0\n\n"
        raise RuntimeError("0xdeadbeef")

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def state(request: Request) -> Response:
    """The engine's figures; a body sets what `stats` reads and `is_ready`."""
    engine = request.app.state.serving.engine
    if request.method == "POST":
        engine.reading = await request.json()
        engine.is_ready = engine.reading.pop("is_ready", True)
    return JSONResponse({"open": engine.num_open, "aborted": engine.num_aborted})


ROUTES = [
    Route("/v1/count", count, methods=["POST"]),
    Route("/v1/flood", flood, methods=["GET"]),
    Route("/v1/crash", crash, methods=["GET"]),
    Route("/v1/crash_in_stream", crash_in_stream, methods=["GET"]),
    Route("/v1/state", state, methods=["GET", "POST"]),
]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return Tokenizer(TokenizerFiles(backend, {"eos_token": "<|end|>"}, None))


def load(settings: dict[str, Any]) -> Loaded:
    time.sleep(settings.get("load_s", 0.0))
    if settings.get("failure") == "checkpoint":
        raise CheckpointError("The folder is empty. Give another.")
    if settings.get("failure") == "bug":
        raise ZeroDivisionError("a bug")
    engine = CountingEngine(settings.get("token_s", 0.01), settings.get("shutdown_s", 0.0))
    model = ModelConfig(
        **{"architecture": "fake", "vocab_size": 257, "hidden_size": 8, "intermediate_size": 8},
        **{"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "max_position": 65536},
    )
    serving = Serving(
        engine=engine,
        tokenizer=byte_tokenizer(),
        chat_template=ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}),
        model_names=("fake",),
        model_config=model,
        max_model_len=65536,
        system_fingerprint="fake",
        created=0,
    )
    return Loaded(serving=serving, engine=engine, max_num_queued_reqs=4)


def main() -> int:
    settings = json.loads(sys.argv[1])
    configure_logging("warning")
    for name in settings.get("ignore_signals", ()):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    app = {
        "keys": ApiKeys(settings.get("keys", ())),
        "body_limits": BodyLimits(**settings.get("body", {})),
        **settings.get("app", {}),
    }
    server = ServerSettings(
        port=0,
        app=AppSettings(**app),
        connections=ConnectionLimits(**settings.get("connections", {})),
        uvicorn_log_level="warning",
        **settings.get("server", {}),
    )
    return Supervisor(server, lambda loop: load(settings), [*ROUTES, *api_routes()]).run()


if __name__ == "__main__":
    sys.exit(main())
