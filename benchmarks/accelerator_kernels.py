"""How near do attention kernels come to what the memory, and the matrix units, can do?

Decode: bytes of the keys and values that must be read, over the time of a call, over this device's copy bandwidth. The
program calls the kernel several times over, each call's output the next one's queries, over other blocks of one pool in
turn: no call's data is in a cache, and dispatch hides behind the work. Prefill: 4 H operations for each pair of a query
head and a key that it sees, over the matrix peak.

Both the Pallas kernel and the engine's XLA attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_cases import Heads, Stream, counts_of, step_batch_of, xla_attention
from benchmarks.accelerator_checks import ATTENTION, KERNELS, Target, attention_name, target_for
from benchmarks.accelerator_jobs import Sink
from benchmarks.accelerator_timing import Timing, memory_bytes, random_values, time_calls
from jaxserve.state import StepShape

CALLS = {1: 8}  # of a kernel in a program, by batch: at batch 1 a call takes some 20 us
MANY = 3
NEEDED_S = 12.0  # to compile and time a case
MEMORY_SHARE = 0.55  # of what the process may take, for the pool


@dataclass(frozen=True, slots=True)
class Decode:
    """A batch of decoding sequences of about so many tokens each."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"decode attention, {self.batch} x {_short(self.context)}"

    @property
    def target(self) -> str | None:
        if self.batch == 1:
            return ">= 50" if self.context == 16_384 else None
        return ">= 75"

    def streams(self, rng: np.random.Generator) -> list[Stream]:
        return [Stream(self.context - int(cut)) for cut in rng.integers(0, 16, self.batch)]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt as one chunk."""

    tokens: int

    @property
    def name(self) -> str:
        return f"prefill attention, {_short(self.tokens)}"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


FIRST = (Decode(64, 8192), Decode(256, 1024), Decode(1, 16_384))
REST = (Decode(64, 1024), Decode(256, 8192), Decode(1, 1024), Decode(1, 8192), Decode(64, 32_768), Decode(256, 32_768))
HEADS = tuple(Heads(32 // group, group, head_dim) for head_dim, group in ((128, 4), (64, 4), (128, 8), (64, 8)))
SMALL_HEADS = (Heads(1, 4, 64),)
SMALL = (Decode(2, 64),)
PALLAS, XLA = "pallas", "xla"


def run(
    sink: Sink,
    *,
    platform: str,
    backend: str,
    small: bool,
    whole: bool,
    passed: list[str],
    ceilings: dict[str, float],
    seed: int,
) -> None:
    """The most telling cases of all heads first, then what is left of the first heads, or of all: `whole`."""
    bench = Bench(sink, target_for(platform, backend), ceilings, seed, is_interpreted=platform == "cpu")
    every = SMALL_HEADS if small else HEADS
    right = [heads for heads in every if attention_name(heads, {}) in passed]
    for heads in every:
        if heads not in right:
            sink.note(f"{attention_name(heads, {})}: not timed, because its check was not passed")
    prompts = [Prefill(32)] if small else [Prefill(2048), Prefill(8192)]
    for heads in every:
        paths = [PALLAS, XLA] if heads in right else [XLA]
        bench.decode(heads, SMALL if small else FIRST, paths)
        bench.prefill(heads, prompts, paths if heads == every[0] or whole else paths[:1])
    for heads in () if small else right if whole else right[:1]:
        bench.decode(heads, REST, [PALLAS, XLA] if whole else [PALLAS])


class Bench:
    """What the timed cases share.

    Args:
        ceilings: "copy_bytes_s" and "flops_s".
        is_interpreted: nothing that is timed means anything, and rounds are short.
    """

    def __init__(
        self, sink: Sink, target: Target, ceilings: Mapping[str, float], seed: int, *, is_interpreted: bool
    ) -> None:
        self.sink, self.target, self.ceilings, self.seed = sink, target, ceilings, seed
        self.timing = {"round_s": 0.0, "rounds": 3} if is_interpreted else {"round_s": 0.1, "rounds": 5}
        self._is_interpreted = is_interpreted

    def calls(self, case: Decode) -> int:
        """Of the kernel in a program."""
        return 1 if self._is_interpreted else CALLS.get(case.batch, MANY)

    def kernel(self, heads: Heads, tiles: Any = None) -> Callable[..., jax.Array]:
        attend = KERNELS[ATTENTION]
        return partial(attend, scale=heads.scale, tiles=tiles or self.target.tiles, **self.target.options)

    def pool(self, heads: Heads, cases: Sequence[Decode]) -> jax.Array:
        """Random blocks, as many as the memory has room for and the cases can use."""
        of_block = heads.block_size * heads.num_kv_heads * 2 * heads.head_dim * jnp.dtype(heads.stored).itemsize
        room = int(MEMORY_SHARE * memory_bytes()) // of_block
        useful = max(_blocks(heads, case) * self.calls(case) for case in cases) + 1
        shape = (min(room, useful), heads.block_size, heads.num_kv_heads, 2 * heads.head_dim)
        return self.placed(random_values(self.seed, shape, heads.stored))

    def placed(self, pool: jax.Array) -> jax.Array:
        """The pool as the backend's kernels want it to lie in memory."""
        if self.target.backend != "tpu" or self.target.interpret:
            return pool
        from pallas_kernels.common import tpu_pool_format

        return jax.device_put(pool, tpu_pool_format(pool.sharding))

    def decode(self, heads: Heads, cases: Sequence[Decode], paths: Sequence[str]) -> None:
        """Rows of every case and path."""
        pool = self.pool(heads, cases)
        longest = max(case.context for case in cases)
        programs: dict[tuple[str, int], Repeated] = {}
        for path, case in product(paths, cases):
            name = f"{case.name}, {heads.name}, {path}"
            if _blocks(heads, case) >= pool.shape[0]:
                self.sink.note(f"{name}: left out: the memory has no room for it")
                continue
            if not self.sink.begin(name, NEEDED_S):
                continue
            make = self.repeated if path == PALLAS else self.repeated_xla
            if (path, case.batch) not in programs:
                programs[path, case.batch] = make(heads, case, longest)
            timing, num_bytes = self.time_decode(heads, case, pool, programs[path, case.batch])
            self.sink.add(f"{name}: a call", 1e6 * timing.seconds, "us")
            share = 100 * num_bytes / timing.seconds / self.ceilings["copy_bytes_s"]
            self.sink.add(f"{name}: of copy bandwidth", share, "%", case.target if path == PALLAS else None)
            self.sink.end(name)

    def time_decode(self, heads: Heads, case: Decode, pool: jax.Array, program: Repeated) -> tuple[Timing, int]:
        """Seconds of one call, and the bytes of keys and values that it must read."""
        rng = np.random.default_rng(self.seed)
        streams, needed = case.streams(rng), _blocks(heads, case)
        tables, at = np.zeros((case.batch, program.width), np.int32), 0
        order = 1 + rng.permutation(needed).astype(np.int32)
        for row, stream in enumerate(streams):
            count = -(-stream.length // heads.block_size)
            tables[row, :count] = order[at : at + count]
            at += count
        places = (pool.shape[0] - 1) // needed
        offsets = jnp.asarray([needed * (call % places) for call in range(self.calls(case))], jnp.int32)
        q = [random_values(self.seed + i, (case.batch, heads.num_heads, heads.head_dim), heads.dtype) for i in (1, 2)]
        lay = program.arguments(streams)
        tables_on_device = jnp.asarray(tables)
        timing = time_calls(lambda i: program(q[i % 2], pool, tables_on_device, offsets, lay), **self.timing)
        num_keys = sum(stream.length for stream in streams)
        num_bytes = num_keys * heads.num_kv_heads * 2 * heads.head_dim * jnp.dtype(heads.stored).itemsize
        return Timing(timing.seconds / self.calls(case), timing.spread), num_bytes

    def repeated(self, heads: Heads, case: Decode, longest: int, tiles: Any = None) -> Repeated:
        """The kernel's program for a batch; one for all contexts up to the longest, as in an engine."""
        attend = self.kernel(heads, tiles)

        def call(q: jax.Array, pool: jax.Array, tables: jax.Array, counts: Any) -> jax.Array:
            return attend(q, pool, tables, *counts)

        return Repeated(call, -(-longest // heads.block_size), self.calls(case), partial(_counts, num_rows=case.batch))

    def repeated_xla(self, heads: Heads, case: Decode, longest: int) -> Repeated:
        """The same of the engine's XLA attention."""
        kv_tile = max(128 if longest <= 16_384 else 256, heads.block_size)  # the engine's
        width = -(-longest // kv_tile) * kv_tile // heads.block_size
        shape = StepShape(case.batch, case.batch, width, heads.block_size, q_tile=min(128, case.batch), kv_tile=kv_tile)

        def call(q: jax.Array, pool: jax.Array, tables: jax.Array, batch: Any) -> jax.Array:
            return xla_attention(q, pool, tables, batch, heads=heads, shape=shape).astype(q.dtype)

        return Repeated(call, width, self.calls(case), partial(step_batch_of, shape=shape))

    def prefill(self, heads: Heads, cases: Sequence[Prefill], paths: Sequence[str]) -> None:
        """Rows of every case and path."""
        for case, path in product(cases, paths):
            name = f"{case.name}, {heads.name}, {path}"
            if not self.sink.begin(name, NEEDED_S):
                continue
            seconds = self._time_prefill(heads, case.tokens, path).seconds
            flops = 4 * heads.num_heads * heads.head_dim * (case.tokens * (case.tokens + 1) // 2)
            self.sink.add(f"{name}: rate", flops / seconds / 1e12, "TFLOP/s")
            self.sink.add(f"{name}: of the matrix peak", 100 * flops / seconds / self.ceilings["flops_s"], "%")
            self.sink.end(name)

    def _time_prefill(self, heads: Heads, tokens: int, path: str) -> Timing:
        size = heads.block_size
        width = -(-tokens // size)
        shape = (width + 1, size, heads.num_kv_heads, 2 * heads.head_dim)
        pool = self.placed(random_values(self.seed, shape, heads.stored))
        tables = jnp.asarray(1 + np.random.default_rng(self.seed).permutation(width).astype(np.int32))[None]
        q = [random_values(self.seed + i, (tokens, heads.num_heads, heads.head_dim), heads.dtype) for i in (1, 2)]
        streams = [Stream(tokens, tokens)]
        if path == PALLAS:
            program = jax.jit(self.kernel(heads))
            arguments: tuple[Any, ...] = (pool, tables, *_counts(streams, num_rows=1))
        else:
            step = StepShape(tokens, 1, width + -width % (128 // size), size, q_tile=min(128, tokens), kv_tile=128)
            program = jax.jit(partial(xla_attention, heads=heads, shape=step))
            arguments = (pool, tables, step_batch_of(streams, step))
        return time_calls(lambda index: program(q[index % 2], *arguments), **self.timing)


class Repeated:
    """A program that calls attention `calls` times over, each time over other blocks.

    Args:
        call: (q, pool, tables, lay) -> the output, which becomes the next call's queries.
        width: of block tables.
        arguments: what `lay` is for a list of streams.
    """

    def __init__(self, call: Callable, width: int, calls: int, arguments: Callable[[list[Stream]], Any]) -> None:
        self.width, self.arguments = width, arguments

        def run_all(q: jax.Array, pool: jax.Array, tables: jax.Array, offsets: jax.Array, lay: Any) -> jax.Array:
            for index in range(calls):
                q = call(q, pool, tables + offsets[index], lay)
            return q

        self._program = jax.jit(run_all)

    def __call__(self, *arguments: Any) -> jax.Array:
        return self._program(*arguments)


def _blocks(heads: Heads, case: Decode) -> int:
    return case.batch * -(-case.context // heads.block_size)


def _counts(streams: list[Stream], num_rows: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(count) for count in counts_of(streams, num_rows))
