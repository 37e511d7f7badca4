"""The server's end of an engine's process, with a process at the other end that computes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, EngineDeadError, ParameterError
from jaxserve.types import SamplingParams
from jaxserve_server import engine_process, remote_engine, wire
from jaxserve_server.engine_process import EngineProcess, RemoteLaunch, child_environment
from jaxserve_server.engine_worker import Link
from jaxserve_server.remote_engine import RemoteEngine

SCRIPT = str(Path(__file__).parent / "fake_worker.py")
ENDLESS = SamplingParams(max_tokens=None)


@asynccontextmanager
async def launched(mode: str) -> AsyncIterator[RemoteLaunch]:
    start = wire.Start(mode, "auto", None, EngineConfig(), "info")
    launch = await asyncio.to_thread(RemoteLaunch, start, asyncio.get_running_loop(), (SCRIPT,))
    try:
        yield launch
    finally:
        await asyncio.to_thread(launch._engine.shutdown)
        assert launch._process.process.poll() is not None, "an orphan"


def served(mode: str, test: Callable[[RemoteEngine, EngineProcess], Awaitable[Any]]) -> Any:
    """The result of `test` with a fake engine that is ready."""

    async def run() -> Any:
        async with launched(mode) as launch:
            assert (await asyncio.to_thread(launch.read_model)).generation_defaults == {"top_k": 3}
            ready = await asyncio.to_thread(launch.finish)
            assert isinstance(ready.engine, RemoteEngine)
            return await test(ready.engine, launch._process)

    return asyncio.run(asyncio.wait_for(run(), 60))


async def collect(engine: RemoteEngine, params: SamplingParams = ENDLESS, **kwargs: Any) -> list[int]:
    return [token async for delta in engine.generate([1], params, **kwargs) for token in delta.token_ids]


def test_streams_side_by_side() -> None:
    async def test(engine: RemoteEngine, _: EngineProcess) -> list[list[int]]:
        results = await asyncio.gather(*(collect(engine, SamplingParams(max_tokens=n)) for n in range(1, 20)))
        assert engine._streams == engine._number_of == {}
        return results

    assert served("count", test) == [list(range(n)) for n in range(1, 20)]


def test_a_reader_that_leaves_ends_its_request_and_no_other() -> None:
    async def test(engine: RemoteEngine, _: EngineProcess) -> None:
        async with aclosing(engine.generate([1], ENDLESS, request_id="a")) as stream:
            await anext(stream)
            with pytest.raises(ValueError, match="'a' is in use"):
                await collect(engine, request_id="a")
            other = asyncio.create_task(collect(engine, SamplingParams(max_tokens=40)))
        assert await other == list(range(40))
        await engine.refresh()
        assert engine.stats().num_running == 0
        engine.abort("nobody")

    served("count", test)


def test_the_numbers_are_fetched_and_the_objects_stay() -> None:
    async def test(engine: RemoteEngine, _: EngineProcess) -> None:
        metrics = engine.metrics
        assert metrics.cache_info == {"block_size": "16"}
        for count in (1, 2):
            await engine.refresh()
            assert metrics.generation_tokens == count
        assert engine.metrics is metrics
        assert await asyncio.gather(*(engine.reset_prefix_cache() for _ in range(3))) == [7, 7, 7]
        assert not engine._calls

    served("count", test)


def test_what_cannot_be_sent_is_refused_and_harms_nobody() -> None:
    async def test(engine: RemoteEngine, _: EngineProcess) -> None:
        for prompt in ([1.5], [2**70]):
            with pytest.raises(ParameterError, match="integer token ids") as refused:
                await anext(engine.generate(prompt, ENDLESS))  # type: ignore[arg-type]
            assert refused.value.param == "prompt"
        with pytest.raises(ParameterError, match="surrogate"):
            await collect(engine, SamplingParams(stop=["\ud800"]))
        assert engine._streams == engine._number_of == {}
        assert await collect(engine, SamplingParams(max_tokens=2)) == [0, 1]

    served("count", test)


def test_a_killed_engine_fails_all_streams_and_calls(caplog: pytest.LogCaptureFixture) -> None:
    async def test(engine: RemoteEngine, process: EngineProcess) -> None:
        readers = [asyncio.create_task(collect(engine)) for _ in range(3)]
        while engine.stats().num_running < 3:
            await asyncio.sleep(0.005)
        process.process.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(r) for r in results] == [EngineDeadError] * 3
        assert not engine.is_ready
        assert (engine.stats().num_running, engine.stats().last_commit_age_s) == (0, 0.0)
        for again in (collect(engine), engine.reset_prefix_cache()):
            with pytest.raises(EngineDeadError):
                await again
        await engine.refresh()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_engine.logger, "propagate", True)
        served("count", test)
    assert "the engine's process ended: killed by SIGKILL" in caplog.text


@pytest.mark.parametrize(
    ("mode", "message"), [("garbage", "malformed message"), ("fails", "The device failed 3 steps in a row")]
)
def test_an_engine_that_fails_or_babbles_is_dead(mode: str, message: str) -> None:
    async def test(engine: RemoteEngine, process: EngineProcess) -> None:
        with pytest.raises(EngineDeadError, match=message):
            await collect(engine)
        assert not engine.is_ready
        if mode == "garbage":
            assert await asyncio.to_thread(process.process.wait, 10) == -signal.SIGKILL

    served(mode, test)


def test_a_silent_engine_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "REFRESH_S", 0.05)

    async def test(engine: RemoteEngine, process: EngineProcess) -> None:
        assert engine.stats().last_commit_age_s == 0.0, "idle"
        engine._heard_s -= 70
        assert 70 <= engine.stats().last_commit_age_s < 80, "idle, but it should be heard once a second"
        engine._heard_s = time.monotonic()
        stream = engine.generate([1], ENDLESS)
        pending = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await engine.refresh()  # which it does not answer: not for long
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)

    served("mute", test)

    async def busy(engine: RemoteEngine, process: EngineProcess) -> None:
        async with aclosing(engine.generate([1], ENDLESS)) as stream:
            await anext(stream)
            process.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.3)
            first = engine.stats().last_commit_age_s
            await asyncio.sleep(0.2)
            assert engine.stats().last_commit_age_s >= first + 0.2, "a stopped process makes no progress"
            assert first > 0.25
            process.process.send_signal(signal.SIGCONT)

    served("count", busy)


def test_failures_while_loading_reach_the_loader_as_they_are() -> None:
    async def run(mode: str) -> None:
        async with launched(mode) as launch:
            await asyncio.to_thread(launch.read_model)

    with pytest.raises(CheckpointError, match=r"^The folder is empty\. Give another\.$"):
        asyncio.run(asyncio.wait_for(run("no checkpoint"), 60))
    with pytest.raises(EngineDeadError, match=r"has ended. \(exit code 3\)"):
        asyncio.run(asyncio.wait_for(run("dies"), 60))


def test_an_abandoned_launch_leaves_no_process() -> None:
    async def run() -> None:
        async with launched("count") as launch:
            await asyncio.to_thread(launch.abandon)
            assert launch._process.process.poll() == -signal.SIGKILL

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_engine_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "STOP_S", 0.2)

    async def test(engine: RemoteEngine, process: EngineProcess) -> None:
        process.process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(engine.shutdown)
        assert process.process.poll() == -signal.SIGKILL

    served("count", test)


# --- the real worker, before it is told what to serve ---------------------------------------------------------


def test_signals_for_the_group_do_not_end_the_engine_and_the_server_s_end_does() -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM reach both; the server drains first, then the engine ends."""
    process = EngineProcess()
    try:
        for _ in range(4):  # from its first instruction on
            process.process.send_signal(signal.SIGINT)
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            assert process.process.poll() is None
        process.socket.close()
        assert process.process.wait(20) == 1
    finally:
        process.kill()
        process.process.wait()


def test_an_engine_outlives_no_server() -> None:
    code = (
        "import os, time; from jaxserve_server.engine_process import EngineProcess\n"
        "print(EngineProcess().process.pid, flush=True); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=child_environment())
    try:
        assert server.stdout is not None
        engine = psutil.Process(int(server.stdout.readline()))
        assert engine.is_running()
        server.kill()
        server.wait()
        gone, _ = psutil.wait_procs([engine], timeout=20)
        assert gone, "an orphan"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_garbage_from_the_server_is_logged_and_the_end(capfd: pytest.CaptureFixture) -> None:
    process = EngineProcess()
    process.socket.sendall(b"\x05\0\0\0hello")
    assert process.process.wait(20) == 1
    process.socket.close()
    assert "MalformedFrameError" in capfd.readouterr().err


def test_the_http_process_never_imports_jax_and_the_engine_s_no_http() -> None:
    code = (
        "import json, sys; import {}\n"
        "print(json.dumps([m for m in ('jax', 'flax', 'orbax', 'starlette', 'uvicorn') if m in sys.modules]))"
    )
    modules = "jaxserve_server.cli, jaxserve_server.lifecycle, jaxserve_server.loading, jaxserve_server.routes"
    for imports, loaded in ((modules, ["starlette", "uvicorn"]), ("jaxserve_server.engine_worker", [])):
        command = [sys.executable, "-c", code.format(imports)]
        done = subprocess.run(command, capture_output=True, env=child_environment(), check=True)
        assert json.loads(done.stdout) == loaded


def test_the_engine_s_process_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "sk-canary")
    process = EngineProcess()
    try:
        started = psutil.Process(process.process.pid)
        assert "sk-canary" not in str(started.environ()) + str(started.cmdline())
    finally:
        process.socket.close()
        process.process.wait(20)


def test_the_socket_is_nobody_else_s(tmp_path: Path) -> None:
    process = EngineProcess()
    try:
        assert process.socket.getsockname() == process.socket.getpeername() == ""
        assert not os.get_inheritable(process.socket.fileno())
    finally:
        process.socket.close()
        process.process.wait(20)


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    """More than any socket buffer is sent at once, then read: all is there, in order."""
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    message = wire.Step([wire.WireItem(i, tuple(range(1000))) for i in range(100)], [0] * 11)
    begin = time.monotonic()
    for i in range(50):
        link.send(wire.PrefixCacheReset(i, i))
        link.send(message)
    assert time.monotonic() - begin < 5
    frames, received = wire.FrameReader(wire.FromEngine), []
    while len(received) < 100:
        received += frames.feed(ours.recv(2**16))
    assert [m.call for m in received[::2]] == list(range(50))
    assert all(m == message for m in received[1::2])
    link.flush()
    assert not link._unsent
    ours.close()
    link.send(message)  # nobody is left: no error
    theirs.close()
