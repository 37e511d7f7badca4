"""The seam's book-keeping of a request's continuations, on a core that plays scripts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import async_engine
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import EngineDeadError, EngineError, NumericalError, ParameterError
from jaxserve.types import BeamSearchParams, Delta, SamplingParams


class ScriptedCore:
    """Gives one delta of `script` a step to the one request that is there; waits at an event; forgets it at None.

    Attributes:
        told: what was aborted: (request id, index or None, reason).
        checked: (params, cache_salt) of each request.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        self.script: list[Any] = []
        self.owner: Any = None
        self.ended: set[int] = set()
        self.told: list[tuple[str, int | None, str]] = []
        self.checked: list[tuple[Any, str | None]] = []
        self.num_resets = 0
        self.scheduler = SimpleNamespace(num_running=0, num_waiting=0, check_integrity=lambda: None)
        self.limits = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64)
        self.metrics = SimpleNamespace(on_rejected=lambda reason: None)

    @property
    def has_work(self) -> bool:
        return self.owner is not None and bool(self.script)

    @property
    def open_requests(self) -> Set[str]:
        return set() if self.owner is None else {self.owner.request_id}

    def stats(self) -> None:
        return None

    def check(self, token_ids: Sequence[int], params: Any, cache_salt: str | None = None) -> Any:
        self.checked.append((params, cache_salt))
        return None

    def add(self, request_id: str, admitted: Any, owner: Any, arrival_s: float) -> None:
        self.owner = owner

    def wait_for_loop(self) -> None:
        """It has none."""

    def step(self) -> list[tuple[Any, Delta]]:
        item = self.script.pop(0)
        if isinstance(item, threading.Event):
            item.wait(10)
            return []
        if isinstance(item, Exception):
            raise item
        if item is None:
            self.owner = None
            return []
        return [] if item.index in self.ended else [(self.owner, item)]

    def abort(self, request_id: str, reason: str = "abort") -> Any:
        self.told.append((request_id, None, reason))
        owner, self.owner = self.owner, None
        return owner

    def abort_sequence(self, request_id: str, index: int, reason: str) -> Any:
        self.told.append((request_id, index, reason))
        if self.owner is None or index in self.ended:
            return None
        self.ended.add(index)
        return self.owner

    def reset_prefix_cache(self) -> int:
        self.num_resets += 1
        return 7


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[AsyncEngine, ScriptedCore]]]:
    monkeypatch.setattr(async_engine, "EngineCore", ScriptedCore)
    engines: list[AsyncEngine] = []

    def make(*script: Any) -> tuple[AsyncEngine, ScriptedCore]:
        engine = AsyncEngine(None, None, EngineConfig())  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        core: Any = engine._core
        core.script = list(script)
        return engine, core

    yield make
    for engine in engines:
        engine.shutdown()


def token(index: int, reason: Any = None) -> Delta:
    return Delta((index,), finish_reason=reason, index=index)


async def read(engine: AsyncEngine, params: Any = None, **kwargs: Any) -> list[tuple[int, str | None]]:
    params = params or SamplingParams(n=3)
    return [(d.index, d.finish_reason) async for d in engine.generate([1], params, request_id="r", **kwargs)]


def test_a_request_ends_when_each_continuation_has_ended(make_engine: Callable) -> None:
    script = [token(0, "stop"), token(2), token(1), token(2, "length"), token(1, "stop"), token(0)]
    engine, core = make_engine(*script)
    got = asyncio.run(read(engine))
    assert got == [(d.index, d.finish_reason) for d in script[:-1]]
    assert core.told == []
    assert engine._streams == {}


def test_a_beam_search_ends_with_its_last_hypothesis(make_engine: Callable) -> None:
    engine, core = make_engine(token(0, "stop"), token(1, "length"))
    params = BeamSearchParams(beam_width=2)
    assert asyncio.run(read(engine, params, cache_salt="s")) == [(0, "stop"), (1, "length")]
    assert core.checked == [(params, "s")]


def test_the_failure_of_one_ends_all(make_engine: Callable) -> None:
    failure = Delta(finish_reason="error", error=NumericalError("NaN"), index=1)
    engine, core = make_engine(token(0), failure, token(0))
    with pytest.raises(NumericalError):
        asyncio.run(read(engine))
    assert core.told == []  # the core has ended it


def test_a_request_that_the_core_drops_ends_with_an_error(make_engine: Callable, caplog: Any) -> None:
    """A search with fewer hypotheses than its width left its reader waiting for ever."""
    engine, core = make_engine(token(0, "stop"), token(2), None)

    async def run() -> list[Delta]:
        async with aclosing(engine.generate([1], SamplingParams(n=3), request_id="r")) as stream:
            got = [await anext(stream), await anext(stream)]
            with pytest.raises(EngineError, match="dropped"):
                await anext(stream)
        return got

    assert [d.index for d in asyncio.run(asyncio.wait_for(run(), 20))] == [0, 2]
    assert core.told == []
    assert engine._streams == {}
    assert "request r ended with 2 of its answers open" in caplog.text


@pytest.mark.parametrize("reason", ["abort", "stop"])
def test_an_abort_without_an_index_ends_all(make_engine: Callable, reason: Any) -> None:
    go_on = threading.Event()
    engine, core = make_engine(token(0), go_on, token(1))

    async def run() -> list[tuple[int, str | None]]:
        got = []
        async for delta in engine.generate([1], SamplingParams(n=3), request_id="r"):
            got.append((delta.index, delta.finish_reason))
            if len(got) == 1:
                engine.abort("r", reason)
                go_on.set()
        return got

    got = asyncio.run(run())
    assert (got[0], got[-1]) == ((0, None), (0, reason))
    assert core.told == [("r", None, reason)]


def test_an_abort_of_one_leaves_the_others(make_engine: Callable) -> None:
    go_on = threading.Event()
    engine, core = make_engine(token(1), go_on, token(1), token(0, "length"), token(2, "stop"))

    async def run() -> list[tuple[int, str | None]]:
        got = []
        async for delta in engine.generate([1], SamplingParams(n=3), request_id="r"):
            got.append((delta.index, delta.finish_reason))
            if len(got) == 1:
                engine.abort("r", "stop", 1)
                go_on.set()
        return got

    got = asyncio.run(run())
    assert sorted((index, reason) for index, reason in got if reason) == [(0, "length"), (1, "stop"), (2, "stop")]
    assert core.told == [("r", 1, "stop")]


def test_an_abort_of_a_continuation_that_has_ended_counts_once(make_engine: Callable) -> None:
    """Its own end may be on its way while the reader finds a stop string: the others must still be waited for."""
    engine, core = make_engine(token(0, "stop"), token(1))
    core.ended.add(5)

    async def run() -> list[tuple[int, str | None]]:
        got = []
        async for delta in engine.generate([1], SamplingParams(n=2), request_id="r"):
            got.append((delta.index, delta.finish_reason))
            if len(got) == 1:
                core.ended.add(0)
                engine.abort("r", "stop", 0)
            if len(got) == 2:
                engine.abort("r", "stop", 1)
        return got

    assert asyncio.run(run()) == [(0, "stop"), (1, None), (1, "stop")]


def test_leaving_ends_what_is_open(make_engine: Callable) -> None:
    engine, core = make_engine(token(0, "stop"), token(1))

    async def run() -> None:
        async with aclosing(engine.generate([1], SamplingParams(n=3), request_id="r")) as stream:
            await anext(stream)

    asyncio.run(run())
    engine.shutdown()
    assert core.told == [("r", None, "abort")]


def test_a_reset_answers_with_the_number_of_blocks(make_engine: Callable) -> None:
    engine, core = make_engine()

    async def run() -> list[int]:
        return await asyncio.gather(*(engine.reset_prefix_cache() for _ in range(3)))

    assert asyncio.run(run()) == [7, 7, 7]
    assert core.num_resets == 3
    assert not engine._resets


def test_a_reset_of_a_loop_that_ends_fails_and_does_not_hang(make_engine: Callable) -> None:
    stuck = threading.Event()
    engine, core = make_engine(stuck, RuntimeError("INTERNAL: injected"))

    async def run() -> None:
        reader = asyncio.create_task(read(engine))
        while core.owner is None:
            await asyncio.sleep(0)
        pending = asyncio.create_task(engine.reset_prefix_cache())
        given_up = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0)
        given_up.cancel()
        core.reset_prefix_cache = lambda: (_ for _ in ()).throw(EngineDeadError("gone"))  # type: ignore[method-assign]
        stuck.set()
        results = await asyncio.gather(reader, pending, given_up, return_exceptions=True)
        assert [type(r) for r in results] == [EngineDeadError, EngineDeadError, asyncio.CancelledError]
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()
        with pytest.raises(EngineDeadError):
            await read(engine)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_the_core_refuses_reaches_the_caller(make_engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, core = make_engine()

    def refuse(*_: Any) -> None:
        raise ParameterError("'beam_width' must be at most 4.", param="beam_width")

    monkeypatch.setattr(core, "check", refuse)
    with pytest.raises(ParameterError, match="beam_width"):
        asyncio.run(read(engine, BeamSearchParams(beam_width=5)))
    assert engine._streams == {}
