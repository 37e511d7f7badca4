"""Every state that a few blocks and requests can reach, whatever the order of events.

A depth-first search with each state reduced to what can matter later: blocks, rows and steps are renamed in the
order in which they are met, content goes in as bytes. Whoever waits is served in the end: from each state the search
follows the engine's own next move (digest what is due, else step), and no such path may be a circle.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import MemoryCosts, SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler

from .history import EOS, Add
from .world import Simulation

Action = tuple
MAX_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Scope:
    """What the search is about.

    Attributes:
        faults: how often each of "lose" and "reset" may happen on a path.
    """

    limits: dict
    adds: tuple[Add, ...]
    faults: int = 1
    is_abortable: bool = True


@dataclass(slots=True)
class _World:
    """A simulation, and what has been used up on the way."""

    sim: Simulation
    num_lost: int = 0
    num_resets: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """How much there was."""

    num_states: int
    num_transitions: int
    num_ends: int
    longest_drain: int


class Search:
    """All states of a scope, each checked."""

    def __init__(self, scope: Scope, max_states: int = 10**7):
        self._scope, self._max_states = scope, max_states
        self._next: dict[bytes, bytes | None] = {}  # by state, where the engine's own move leads
        self._came_by: dict[bytes, tuple[bytes | None, Action]] = {}
        self.num_transitions = self.num_ends = 0
        self.seen: set[str] = set()  # what has happened on some path

    def run(self) -> Found:
        """Visits every state.

        Raises:
            AssertionError: with the events that lead to a wrong one.
        """
        limits = SchedulerLimits(**self._scope.limits, eos_token_ids=(EOS,), costs=MemoryCosts(swap_block_s=1e-7))
        start = _World(Simulation(Scheduler(limits), depth=MAX_IN_FLIGHT, deep_every=10**9))
        name = self._name(start)
        self._came_by[name] = (None, ("start",))
        stack = [(name, _freeze(start))]
        while stack:
            name, frozen = stack.pop()
            stack += self._expand(name, frozen)
            assert len(self._came_by) <= self._max_states, f"more than {self._max_states} states"
        return Found(len(self._came_by), self.num_transitions, self.num_ends, self._longest_drain())

    def _expand(self, name: bytes, frozen: bytes) -> Iterator[tuple[bytes, bytes]]:
        world = _thaw(frozen)
        actions = self._actions(world)
        own = ("digest",) if world.sim.undigested else ("step",) if world.sim.has_requests else None
        self._next[name] = None
        if own is None:
            self.num_ends += 1
            world.sim.drain()
            world.sim.check_outputs()
        for number, action in enumerate(actions):
            if number or own is None:
                world = _thaw(frozen)
            try:
                self._act(world, action)
                there = self._name(world)
                if there not in self._came_by:
                    world.sim.scheduler.check_integrity()
            except AssertionError as error:
                raise AssertionError(f"{error}\nafter {[*self._path(name), action]}") from error
            self.num_transitions += 1
            if action == own:
                self._next[name] = there
            if there not in self._came_by:
                self._came_by[there] = (name, action)
                yield there, _freeze(world)

    def _actions(self, world: _World) -> list[Action]:
        sim = world.sim
        actions: list[Action] = [("add", i) for i, add in enumerate(self._scope.adds) if add.name not in sim.requests]
        if sim.has_requests and len(sim.undigested) < MAX_IN_FLIGHT:
            actions.append(("step",))
        if sim.undigested:
            actions.append(("digest",))
        if self._scope.is_abortable:
            for name, request in sim.requests.items():
                if request.sequences:
                    actions.append(("abort", name))
                if len(request.sequences) > 1:
                    actions += [("abort_sequence", name, sequence.index) for sequence in request.sequences]
        if sim.requests and world.num_lost < self._scope.faults:
            actions.append(("lose",))
        if len(sim.scheduler.memory.index) and world.num_resets < self._scope.faults:
            actions.append(("reset",))
        return actions

    def _act(self, world: _World, action: Action) -> None:
        kind, *values = action
        sim = world.sim
        if kind == "add":
            sim.add(self._scope.adds[values[0]].request())
        elif kind == "step":
            self._note(sim.step())
        elif kind == "digest":
            sim.digest()
        elif kind == "abort":
            sim.abort(values[0])
        elif kind == "abort_sequence":
            sim.abort_sequence(*values)
        elif kind == "lose":
            sim.lose_device()
            world.num_lost += 1
        else:
            sim.reset_cache()
            world.num_resets += 1

    def _note(self, plan: StepPlan) -> None:
        shares = any(admitted.num_stored for admitted in plan.admitted)
        happened = {
            "swap": any(gone.swapped for gone in plan.preempted),
            "recompute": any(not gone.swapped for gone in plan.preempted),
            "restore": len(plan.swap_in_slots) > 0,
            "copy": len(plan.copy_to) > 0,
            "fork": bool(plan.prefill_stored.any()),
            "hit": shares and not len(plan.swap_in_slots),
        }
        self.seen.update(name for name, has in happened.items() if has)

    def _path(self, name: bytes | None) -> list[Action]:
        path: list[Action] = []
        while name is not None:
            name, action = self._came_by[name]
            path.append(action)
        return path[-2::-1]

    def _longest_drain(self) -> int:
        """Moves of the engine's own from any state to one where nothing is left; a circle is a livelock."""
        length: dict[bytes, int] = {}
        for name in self._next:
            path = []
            at: bytes | None = name
            while at is not None and at not in length:
                assert len(path) <= len(self._next), f"never ends: {self._path(name)}"
                path.append(at)
                at = self._next[at]
            after = -1 if at is None else length[at]
            for back, state in enumerate(reversed(path), 1):
                length[state] = after + back
        return max(length.values())

    def _name(self, world: _World) -> bytes:
        """What can matter later, with blocks renamed as they are met."""
        sim = world.sim
        scheduler = sim.scheduler
        rows, memory = scheduler.sequences, scheduler.memory
        pool, index, host = memory.pool, memory.index, memory.host
        met = [*memory.table.ids.ravel().tolist(), *pool._kept.in_order().tolist()]
        ring = pool._ring[(pool._head + np.arange(pool._num_empty)) % len(pool._ring)].tolist()
        new_id = {0: 0}
        for block in (*met, *ring):
            new_id.setdefault(block, len(new_id))
        inside = index.all_blocks().tolist()
        by_prefix = {index._prefix_of_block[block]: new_id[block] for block in inside}
        cached = sorted((new_id[b], by_prefix.get(index._key_of_block[b][:8], 0)) for b in inside)
        current = pool.generation[host._home] == host._home_generation if host.num_slots else []
        homes = [new_id[b] if b >= 0 and ok else -1 for b, ok in zip(host._home.tolist(), current, strict=True)]
        by_slot = [(slot, new_id[b]) for b, slot in enumerate(host._slot_of_block.tolist()) if slot >= 0]
        live = [block for block in new_id if block and (pool.ref_count[block] or pool.is_kept[block])]
        columns = [c.tobytes() for c in rows._zero_when_inactive()]
        waiting = [
            (
                (s.place, len(s.known_token_ids), s.num_preemptions, s.caches, s.num_cached_tokens, s.num_swapped),
                None if s.swapped is None else s.swapped.tolist(),
            )
            for s in scheduler.waiting
        ]
        running = [None if s is None else (s.place, s.num_preemptions, s.caches) for s in rows.sequences]
        flights = [
            (
                (
                    f.roster.rows.tolist(),
                    f.positions.tolist(),
                    (rows.generation[f.roster.rows] == f.roster.generations).tolist(),
                ),
                (f.plan.prefill_rows.tolist(), f.plan.prefill_starts.tolist(), f.plan.prefill_lens.tolist()),
                (rows.generation[f.plan.prefill_rows] == f.plan.prefill_generations).tolist(),
            )
            for f in scheduler._in_flight
        ]
        results = [(name, len(r.token_ids), r.reason) for name, r in sim.results.items()]
        order = [(request.request_id, request.arrival) for request in sim.requests.values()]
        state = (
            [new_id[b] for b in met],
            [new_id[b] for b in ring],
            sorted(memory.table._replaced),
            pool.ref_count[list(new_id)].tobytes(),
            cached,
            homes,
            sorted(by_slot),
            host._free[: host.num_free].tolist(),
            columns,
            waiting,
            running,
            flights,
            results,
            order,
            world.num_lost,
            world.num_resets,
            sim.device.blocks[live].tobytes(),
            sim.store.slots.tobytes(),
        )
        return hashlib.sha256(pickle.dumps(state)).digest()


def _freeze(world: _World) -> bytes:
    return pickle.dumps(world, pickle.HIGHEST_PROTOCOL)


def _thaw(frozen: bytes) -> _World:
    world = pickle.loads(frozen)
    rows = world.sim.scheduler.sequences
    width = rows.token_ids.shape[1]
    rows.token_ids = rows._flat_token_ids.reshape(rows.num_rows, -1)[:, :width]  # a view, which pickling made a copy
    return world
