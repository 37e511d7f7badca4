"""A client that streams completions and notes when each token arrived.

Bare asyncio and a few lines of HTTP/1.1, because it shares the machine with the server that it measures: a full client
spends more time on a token than the server does. Speaks plain http only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One request as its client saw it. Times are seconds of time.perf_counter.

    Attributes:
        due_s: when the load wanted it sent; latencies count from here, so that a late client does not
            flatter the server (coordinated omission).
        event_s: arrival of each event that carries text.
        num_tokens: output tokens as the server counted them.
        error: why it failed, or None.
    """

    due_s: float
    event_s: tuple[float, ...]
    num_tokens: int
    error: str | None

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_s, self.event_s[1:], strict=False)]

    @property
    def mean_itl_s(self) -> float:
        """Mean time a token after the first; 0 for an answer of one token."""
        return (self.event_s[-1] - self.event_s[0]) / max(self.num_tokens - 1, 1)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time that the user waited."""
        return self.num_tokens / (self.event_s[-1] - self.due_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamClient:
    """Sends streamed completions to one server."""

    url: str
    model: str
    output_tokens: int
    api_key: str | None = None
    timeout_s: float = 300.0

    async def complete(self, prompt: list[int], due_s: float) -> StreamResult:
        """One request, sent now. Failures are in the result, never raised."""
        try:
            async with asyncio.timeout(self.timeout_s):
                events = [(time.perf_counter(), event) async for event in self._events(prompt)]
        except (OSError, TimeoutError, EOFError, ValueError, asyncio.LimitOverrunError) as failure:
            return StreamResult(due_s, (), 0, f"{type(failure).__name__}: {failure}")
        return _read_events(due_s, events)

    async def _events(self, prompt: list[int]) -> AsyncIterator[bytes]:
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            writer.write(self._request(prompt, parts.netloc))
            status, chunked = await _read_head(reader)
            if status != 200:
                raise ValueError(f"status {status}: {(await reader.read(500)).decode(errors='replace')}")
            buffer = b""
            async for data in _body(reader, chunked):
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    yield event.removeprefix(b"data: ")
        finally:
            writer.close()

    def _request(self, prompt: list[int], host: str) -> bytes:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        payload = json.dumps(body).encode()
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n{key}\r\n"
        )
        return head.encode() + payload


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body is chunked)."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return int(head.split(b" ", 2)[1]), b"transfer-encoding: chunked" in head


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while data := await reader.read(65536):
            yield data
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _read_events(due_s: float, events: list[tuple[float, bytes]]) -> StreamResult:
    """What the events said, judged after the clock has stopped."""
    arrivals, num_tokens, done, error = [], 0, False, None
    for at, event in events:
        if event == b"[DONE]":
            done = True
            continue
        message = json.loads(event)
        if "error" in message:
            error = json.dumps(message["error"])
        elif message.get("usage"):
            num_tokens = message["usage"]["completion_tokens"]
        if message.get("choices") and message["choices"][0].get("text"):
            arrivals.append(at)
    if error is None and not done:
        error = "the stream ended without [DONE]"
    if error is None and not arrivals:
        error = "the stream held no text"
    return StreamResult(due_s, tuple(arrivals), num_tokens, error)
