"""Histories: what one seed makes happen to a scheduler, as a list of events that can be replayed, cut and printed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from jaxserve.errors import QueueFullError
from jaxserve.scheduler.policy import MemoryCosts, SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

from .echo_device import reference_output
from .world import Simulation

EOS = 7
MAX_WAITING = 12  # an arrival finds at most so many before it, or does not come
DEEP_EVERY = 16


@dataclass(frozen=True, slots=True)
class Add:
    """A request arrives."""

    name: str
    prompt: tuple[int, ...]
    total: int
    stops: tuple[int, ...] = ()
    min_tokens: int = 0
    n: int = 1
    salt: bytes = b""
    reads_cache: bool = True

    def request(self) -> Request:
        return Request(
            self.name,
            np.array(self.prompt, np.int32),
            self.total,
            (EOS, *self.stops),
            self.min_tokens,
            num_sequences=self.n,
            cache_salt=self.salt,
            reads_cache=self.reads_cache,
        )


Event = Add | tuple  # ("step",), ("nan", seed), ("raise",), ("tear",), ("arrive", n), ("digest",), ("abort", name), …


@dataclass(frozen=True, slots=True)
class History:
    """Limits and events.

    Attributes:
        limits: of the scheduler, as keyword arguments; costs as those of `MemoryCosts`.
        is_slow: copies to host memory arrive only when an event says so, or somebody waits for them.
    """

    limits: dict
    costs: dict
    depth: int
    is_slow: bool
    events: tuple[Event, ...] = field(repr=False)

    def __str__(self) -> str:
        lines = "".join(f"        {event!r},\n" for event in self.events)
        head = f"    limits={self.limits!r},\n    costs={self.costs!r},\n"
        return f"History(\n{head}    depth={self.depth}, is_slow={self.is_slow},\n    events=(\n{lines}    ),\n)"


def at_depth(history: History, depth: int) -> History:
    """The same, with so many answers due."""
    return replace(history, depth=depth)


def run(history: History, deep_every: int = DEEP_EVERY) -> Simulation:
    """Lets it happen, then drains and compares every output with its reference."""
    limits = SchedulerLimits(**history.limits, eos_token_ids=(EOS,), costs=MemoryCosts(**history.costs))
    sim = Simulation(Scheduler(limits), history.depth, deep_every, history.is_slow)
    for event in history.events:
        _apply(sim, event)
    sim.drain()
    sim.check_outputs()
    assert max(sim.preemptions.values(), default=0) <= 5
    sim.scheduler.check_integrity()
    return sim


def _apply(sim: Simulation, event: Event) -> None:
    """An event that has no meaning here (an abort of nobody) is passed over: histories stay histories when cut."""
    if isinstance(event, Add):
        if sim.scheduler.num_waiting < MAX_WAITING and event.name not in sim.requests:
            sim.add(event.request())
        return
    kind, *values = event
    if kind == "step":
        sim.step()
    elif kind == "steps":
        for _ in range(values[0]):
            sim.step()
    elif kind == "nan":
        dice = random.Random(values[0])
        sim.step(choose_nan=lambda rows: [row for row in rows.tolist() if dice.random() < 0.3])
    elif kind == "raise":
        sim.step(raises=True)
    elif kind == "tear":
        sim.step(tears=True)
    elif kind == "arrive":
        sim.store.arrive(values[0])
    elif kind == "digest":
        if sim.undigested:
            sim.digest()
    elif kind == "lose":
        sim.lose_device()
    elif kind == "abort":
        sim.abort(values[0])
    elif kind == "abort_sequence":
        sim.abort_sequence(*values)
    elif kind == "reset":
        sim.reset_cache()
    elif kind == "depth":
        sim.depth = values[0]
    elif kind == "ahead":
        sim.max_steps = values[0]
    elif kind == "duplicate":
        _add_again(sim, values[0])
    else:
        raise ValueError(f"no such event: {event}")


def _add_again(sim: Simulation, name: str) -> None:
    """A request id that is in use is refused, and nothing has changed."""
    request = sim.requests.get(name)
    if request is None or not request.sequences:
        return
    twin = Request(name, request.prompt_token_ids, request.max_total_len)
    before = sim.scheduler.num_waiting
    try:
        sim.scheduler.add(twin)
    except (ValueError, QueueFullError):
        assert sim.scheduler.num_waiting == before
    else:
        raise AssertionError(f"a second {name} was taken")


def make_history(seed: int, num_events: int = 600) -> History:
    """The seed's history: a random subset of features on random small limits."""
    dice = random.Random(seed)
    limits, costs = _make_limits(dice)
    weights = {
        "step": 60.0,
        "steps": 6.0,
        "add": dice.choice([6.0, 20.0, 50.0]),
        "digest": dice.choice([0.0, 3.0]),
        "depth": dice.choice([0.0, 2.0]),
        "ahead": dice.choice([0.0, 2.0]),
        "abort": dice.choice([0.0, 2.0, 8.0]),
        "abort_sequence": dice.choice([0.0, 2.0, 8.0]),
        "duplicate": dice.choice([0.0, 0.5]),
        "reset": dice.choice([0.0, 0.0, 1.0, 4.0]),
        "nan": dice.choice([0.0, 0.0, 0.5, 2.0]),
        "raise": dice.choice([0.0, 0.0, 0.3, 1.0]),
        "lose": dice.choice([0.0, 0.0, 0.3]),
        "tear": dice.choice([0.0, 0.0, 1.0, 4.0]),
        "arrive": dice.choice([0.0, 4.0]),
    }
    workload = _Workload(dice, limits["max_model_len"])
    kinds = dice.choices(list(weights), list(weights.values()), k=num_events)
    events = tuple(_make_event(kind, dice, workload) for kind in kinds)
    return History(limits, costs, dice.randint(0, 2), dice.random() < 0.5, events)


def _make_limits(dice: random.Random) -> tuple[dict, dict]:
    """Pools from one longest request's worth up; with and without cache and host memory."""
    block_size = dice.choice([1, 2, 4, 8])
    num_rows, max_len = dice.choice([1, 2, 3, 4, 6, 8]), dice.choice([8, 16, 24, 40])
    longest = -(-max_len // block_size)
    more = dice.choice([0, longest // 4, longest // 2, longest, dice.randint(0, longest * num_rows)])
    limits = {
        "num_blocks": 1 + longest + more,
        "block_size": block_size,
        "max_num_seqs": num_rows,
        "max_model_len": max_len,
        "max_num_batched_tokens": num_rows + dice.choice([0, 1, 5, 40]),
        "num_swap_blocks": dice.choice([0, max(1, longest // 2), 2 * longest, 10 * longest, 10 * longest]),
        "enable_prefix_caching": dice.random() < 0.8,
    }
    return limits, {"swap_block_s": dice.choice([1e-7, 1e-7, 2e-5, 1e-3])}


def _make_event(kind: str, dice: random.Random, workload: _Workload) -> Event:
    if kind == "add":
        return workload.next()
    if kind in ("abort", "duplicate"):
        return kind, workload.some_name(dice)
    if kind == "abort_sequence":
        return kind, workload.some_name(dice), dice.randrange(5)
    if kind in ("depth", "arrive"):
        return kind, dice.randint(0, 2)
    if kind == "steps":
        return kind, dice.randint(2, 8)
    if kind == "ahead":
        return kind, dice.choice([1, 2, 3, 8])
    return (kind, dice.randrange(2**20)) if kind == "nan" else (kind,)


class _Workload:
    """Arrivals: prompts that begin alike by Zipf's law, next turns of conversations, parallel samples, salts."""

    def __init__(self, dice: random.Random, max_len: int):
        self._dice, self._max_len = dice, max_len
        num_texts = dice.choice([1, 3, 8])
        self._texts = [tuple(dice.choices(range(1000), k=max_len)) for _ in range(num_texts)]
        self._popularity = [1 / rank for rank in range(1, num_texts + 1)]
        self._num_sequences = dice.choice([[1], [1], [1, 2], [1, 1, 3, 5], [2, 4]])
        self._salts = dice.choice([[b""], [b""], [b"", b"a"], [b"a", b"b", b"aa"]])
        self._own_share = dice.choice([0.0, 0.3, 0.8])
        self._turn_share = dice.choice([0.0, 0.3, 0.6])
        self._blind_share = dice.choice([0.0, 0.0, 0.2])
        self._stops = dice.choice([(), (), tuple(range(100, 140))])
        self._is_short = dice.random() < 0.3
        self._past: list[Add] = []

    def some_name(self, dice: random.Random) -> str:
        """Mostly of the latest, who are still there."""
        return f"r{max(0, len(self._past) - 1 - int(dice.expovariate(0.3)))}"

    def next(self) -> Add:
        dice, max_len = self._dice, self._max_len
        prompt = self._next_turn() if self._past and dice.random() < self._turn_share else None
        if prompt is None:
            text = dice.choices(self._texts, self._popularity)[0]
            prompt = text[: dice.choice([dice.randint(1, max_len - 1), dice.randint(1, max_len // 3)])]
            if dice.random() < self._own_share:
                kept = dice.randrange(len(prompt))
                prompt = (*prompt[:kept], *dice.choices(range(1000), k=len(prompt) - kept))
        longest = min(max_len, len(prompt) + 4) if self._is_short else max_len
        total = dice.choice([longest, dice.randint(len(prompt) + 1, longest)])
        made = Add(
            f"r{len(self._past)}",
            prompt,
            total,
            self._stops,
            dice.choice([0, 0, total - len(prompt)]),
            dice.choice(self._num_sequences),
            dice.choice(self._salts),
            dice.random() >= self._blind_share,
        )
        self._past.append(made)
        return made

    def _next_turn(self) -> tuple[int, ...] | None:
        """A transcript of an earlier request, and a question more."""
        earlier = self._dice.choice(self._past[-4:])
        output, _, _ = reference_output(earlier.request(), (EOS,), self._dice.randrange(earlier.n))
        prompt = (*earlier.prompt, *output, *self._dice.choices(range(1000), k=self._dice.randint(1, 3)))
        return prompt if len(prompt) < self._max_len else None


def seeds(first: int, stride: int) -> Iterator[int]:
    """first, first + stride, …"""
    while True:
        yield first
        first += stride
