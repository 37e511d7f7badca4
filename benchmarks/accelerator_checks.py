"""Is every Pallas kernel right on this device? Asked of fresh random batches, before any of them is timed.

Attention: against the definition in float32, within what rounding allows (`accelerator_cases.error_over_bound`), NaN in
all that must not be read; and bit for bit, a token decoded against the same token inside chunks. Kernels that write:
bit for bit. What a kernel writes to was NaN before: an element that it leaves out is no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_cases import (
    FP8_SCALES,
    Case,
    Heads,
    Stream,
    counts_of,
    error_over_bound,
    make_case,
    random_streams,
    step_batch_of,
    step_shape_of,
    unpoisoned_null_block,
    xla_attention,
)
from benchmarks.accelerator_jobs import AGAIN, Sink, fact_of_heads
from benchmarks.accelerator_timing import random_values
from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention

ATTENTION = "ragged_paged_attention"
XLA = "xla attention"
KERNELS: Mapping[str, Callable[..., jax.Array]] = {
    ATTENTION: ragged_paged_attention,
    "kv_write": kv_write,
    "block_copy": block_copy,
    "block_gather": block_gather,
    "block_scatter": block_scatter,
}
FULL_OPTIONS = {"window": 700, "softcap": 20.0}


@dataclass(frozen=True, slots=True)
class Target:
    """Where kernels run.

    Attributes:
        backend: "gpu" or "tpu".
        interpret: in the backend's interpreter, on a CPU, with sizes that it ends with.
        tiles: of attention; None for the backend's own choice.
    """

    backend: str
    interpret: bool = False
    tiles: Any = None

    @property
    def options(self) -> dict[str, Any]:
        return {"backend": self.backend, "interpret": self.interpret}


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of a check; `most` is the largest that is right."""

    what: str
    value: float
    unit: str
    most: float


def target_for(platform: str, backend: str) -> Target:
    """The kernels that belong to a platform; on a CPU `backend`'s, interpreted."""
    if platform != "cpu":
        return Target("tpu" if platform == "tpu" else "gpu")
    if backend == "tpu":
        from pallas_kernels.ragged_paged_attention.tuning import Tiles as TpuTiles

        return Target("tpu", True, TpuTiles(kv_tile=64, q_tile=16))
    from pallas_kernels.ragged_paged_attention.tuning_gpu import Tiles

    return Target("gpu", True, Tiles(kv_tile=64, kv_split=64, ring=2, lanes=1, num_ctas=2))


def heads_to_check(small: bool) -> list[tuple[Heads, dict[str, Any]]]:
    """Shapes of attention with options, those first that are timed."""
    if small:
        return [(Heads(1, 4, 64), {})]
    timed = [(Heads(8, group, head_dim), {}) for head_dim in (128, 64) for group in (4, 8)]
    others = [
        (Heads(8, 2, 128), {}),
        (Heads(8, 4, 128, block_size=64), {}),
        (Heads(2, 4, 128), FULL_OPTIONS),
        (Heads(2, 4, 128, dtype="float32"), {}),
        (Heads(2, 4, 128, kv_dtype="float8_e4m3fn"), {}),
        (Heads(1, 16, 256), {}),
    ]
    return [*timed, *others]


def attention_name(heads: Heads, options: Mapping[str, Any]) -> str:
    return f"{ATTENTION}, {heads.name}" + (", window, softcap, sinks" if options else "")


def run(sink: Sink, *, platform: str, backend: str, small: bool, seed: int, kernels: Any = None) -> None:
    """Checks until one raises, which may have broken the process: the rest is for another one."""
    target = target_for(platform, backend)
    needed_s = 5.0 if platform == "cpu" else 15.0
    for name, check in _checks(target, small, seed, KERNELS if kernels is None else kernels).items():
        if not sink.begin(f"check {name}", needed_s):
            continue
        try:
            findings = list(check())
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("pallas_kernels"):
                sink.note(f"check {name}: there is no kernel for {target.backend}")
                sink.end(f"check {name}")
                continue
            sink.note(f"check {name}: FAILS: {type(error).__name__}: {str(error)[:1000]}")
            sink.add(f"check {name}: passes", 0, "", "1")
            sink.end(f"check {name}")
            sink.fact(AGAIN, True)
            return
        for finding in findings:
            value = finding.value if np.isfinite(finding.value) else 1e30  # no JSON for infinity
            sink.add(f"check {name}: {finding.what}", value, finding.unit, f"<= {finding.most:g}")
        passes = all(finding.value <= finding.most for finding in findings)
        sink.add(f"check {name}: passes", passes, "", "1")
        if passes:
            sink.fact(f"passes {name}", True)
            plain = [heads for heads, options in heads_to_check(small) if attention_name(heads, options) == name]
            for heads in plain:
                if heads == Heads(heads.num_kv_heads, heads.group, heads.head_dim):
                    sink.fact(fact_of_heads(heads.head_dim, heads.group), True)
        sink.end(f"check {name}")


def _checks(
    target: Target, small: bool, seed: int, kernels: Mapping[str, Callable]
) -> dict[str, Callable[[], Iterator[Finding]]]:
    attention = kernels[ATTENTION]
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        attention_name(heads, options): partial(check_attention, attention, heads, options, target, small, seed)
        for heads, options in heads_to_check(small)
    }
    checks["kv_write"] = partial(_check_kv_write, kernels["kv_write"], target, seed)
    checks["block_copy"] = partial(_check_block_copy, kernels["block_copy"], target, seed)
    checks["block_gather"] = partial(_check_gather, kernels["block_gather"], target, seed)
    checks["block_scatter"] = partial(_check_scatter, kernels["block_scatter"], target, seed)
    for dtype in ("bfloat16", "float32"):
        heads = Heads(1, 4, 64, dtype) if small else Heads(8, 4, 128, dtype)
        checks[f"{XLA}, {dtype}"] = partial(_check_xla, heads, small, seed)
    return checks


def into_poison(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(*arguments)` as a program whose result lies where an array lay that is given as the first argument."""

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def call(poison: jax.Array, *arguments: Any) -> jax.Array:
        return function(*arguments)

    return call


def check_attention(
    kernel: Callable, heads: Heads, options: dict[str, Any], target: Target, small: bool, seed: int
) -> Iterator[Finding]:
    """Against the definition, and a token's bits decoded and in chunks."""
    num_tokens, num_rows, width = (12, 3, 6) if small else (400, 12, 2048 // heads.block_size)
    rng = np.random.default_rng(seed)
    longest = width * heads.block_size
    options = dict(options)
    if options:
        options["sinks"] = random_values(seed, (heads.num_heads,), "float32")
    attend = partial(kernel, scale=heads.scale, tiles=target.tiles, **target.options, **options)
    run_it = into_poison(partial(attend, **(FP8_SCALES if heads.kv_dtype else {})))
    worst = 0.0
    for _ in range(1 if small else 3):
        streams = random_streams(rng, num_tokens=num_tokens, num_rows=num_rows, longest=longest)
        own_seed = int(rng.integers(2**31))
        case = make_case(heads, streams, num_tokens=num_tokens, num_rows=num_rows, table_width=width, seed=own_seed)
        poison = jnp.full(case.q.shape, jnp.nan, case.q.dtype)
        worst = max(worst, error_over_bound(case, run_it(poison, *case.arguments), **options))
    yield Finding("worst error over its bound", worst, "", 1.0)
    differing, compared = differing_bits(run_it, heads, num_tokens, num_rows, width, seed)
    yield Finding("tokens whose bits differ, decoded and in chunks", differing, f"of {compared}", 0.0)


def differing_bits(
    attend: Callable, heads: Heads, num_tokens: int, num_rows: int, width: int, seed: int
) -> tuple[int, int]:
    """How many tokens of one sequence differ from one chunk to two cut at an odd place, or to rows that decode them."""
    length = width * heads.block_size - 5
    num_queries = num_tokens - num_rows
    sizes = {"num_tokens": num_tokens, "num_rows": num_rows, "table_width": width, "seed": seed}
    one = make_case(heads, [Stream(length, num_queries)], **sizes)
    first = length - num_queries

    def arranged(streams: list[Stream], queries: np.ndarray, size: int) -> np.ndarray:
        """Outputs where every row is of the same sequence, and the stream's tokens are `queries` of it."""
        table = jnp.broadcast_to(one.block_tables[:1], one.block_tables.shape)
        q = jnp.full((size, *one.q.shape[1:]), jnp.nan, one.q.dtype).at[: len(queries)].set(one.q[queries])
        counts = [jnp.asarray(count) for count in counts_of(streams, num_rows)]
        out = attend(jnp.full(q.shape, jnp.nan, q.dtype), q, one.cache, table, *counts)
        return np.asarray(out)[: len(queries)].view(np.uint8).reshape(len(queries), -1)

    every = np.arange(num_queries)
    whole = arranged([Stream(length, num_queries)], every, num_tokens)
    cut = max(num_queries // 3, 1) | 1
    halves = arranged([Stream(first + cut, cut), Stream(length, num_queries - cut)], every, num_tokens)
    differing = int((whole != halves).any(-1).sum())
    decoded = np.unique(np.linspace(0, num_queries - 1, num_rows).astype(int))
    rows = [Stream(first + int(query) + 1) for query in decoded]
    beside_a_chunk = [*rows[:-1], Stream(length, num_queries - int(decoded[-2]) - 1)]
    mixed_queries = np.concatenate([decoded[:-1], np.arange(decoded[-2] + 1, num_queries)])
    alone = arranged(rows, decoded, num_rows)
    mixed = arranged(beside_a_chunk, mixed_queries, num_tokens)
    differing += int((whole[decoded] != alone).any(-1).sum())
    differing += int((whole[mixed_queries] != mixed).any(-1).sum())
    return differing, num_queries + len(decoded) + len(mixed_queries)


def _pool(seed: int, target: Target) -> jax.Array:
    """Random values, a quarter of them NaN: what kernels move, they must move as it is."""
    shape = (24, 16, 2, 128) if target.interpret else (600, 16, 8, 256)
    values = random_values(seed, shape, "bfloat16")
    return jnp.where(random_values(seed + 1, shape, "float32") > 0.86, jnp.nan, values.astype(jnp.float32)).astype(
        values.dtype
    )


def _compare_in_place(
    kernel: Callable, target: Target, pool: jax.Array, arguments: tuple[Any, ...], what: str
) -> Iterator[Finding]:
    expected = np.asarray(jax.jit(partial(kernel, backend="reference"))(pool, *arguments)).view(np.uint16)
    program = jax.jit(partial(kernel, **target.options), donate_argnums=0).lower(pool, *arguments).compile()
    copies = copies_of(program.as_text(), pool.shape)
    found = np.asarray(program(pool, *arguments)).view(np.uint16)
    yield Finding(f"{what} that differ", int((found != expected).any(-1).sum()), f"of {expected[..., 0].size}", 0.0)
    if not target.interpret:
        yield Finding("copies of the pool in its program", copies, "", 0.0)


def copies_of(program: str | None, shape: tuple[int, ...]) -> int:
    """How often a compiled program copies a whole array of that shape, at once or by a copy that it waits for later."""
    dims = ",".join(map(str, shape))
    array = rf"\w+\[{dims}\]"
    return len(re.findall(rf"= {array}\S* copy\(|= \({array}[^=]*? copy-start\(", program or ""))


def _check_kv_write(kernel: Callable, target: Target, seed: int) -> Iterator[Finding]:
    pool, rng = _pool(seed, target), np.random.default_rng(seed)
    num_blocks, size, num_kv, width = pool.shape
    num_tokens = 20 if target.interpret else 300
    slots = rng.permutation(num_blocks * size)[:num_tokens].astype(np.int32)
    slots[::7] = rng.choice([-1, num_blocks * size, 2**31 - 1], len(slots[::7]))
    k, v = (random_values(seed + i, (num_tokens, num_kv, width // 2), pool.dtype) for i in (2, 3))
    yield from _compare_in_place(kernel, target, pool, (k, v, jnp.asarray(slots)), "heads of slots")


def _ids(rng: np.random.Generator, num_blocks: int, count: int) -> jax.Array:
    """Distinct block ids, some of them padding."""
    ids = rng.permutation(num_blocks)[:count].astype(np.int32)
    ids[::5] = rng.choice([num_blocks, -1, 2**31 - 1], len(ids[::5]))
    return jnp.asarray(ids)


def _check_block_copy(kernel: Callable, target: Target, seed: int) -> Iterator[Finding]:
    pool, rng = _pool(seed, target), np.random.default_rng(seed)
    half = pool.shape[0] // 2
    sources = jnp.asarray(rng.integers(0, half, half // 2), jnp.int32)
    targets = rng.permutation(np.arange(half, 2 * half))[: half // 2].astype(np.int32)
    targets[::5] = pool.shape[0]
    yield from _compare_in_place(kernel, target, pool, (sources, jnp.asarray(targets)), "heads of slots")


def _check_gather(kernel: Callable, target: Target, seed: int) -> Iterator[Finding]:
    pool = _pool(seed, target)
    ids = _ids(np.random.default_rng(seed), pool.shape[0], pool.shape[0] // 2)
    expected = np.asarray(kernel(pool, ids, backend="reference")).view(np.uint16)
    poison = jnp.full(expected.shape, jnp.nan, pool.dtype)
    found = np.asarray(into_poison(partial(kernel, **target.options))(poison, pool, ids)).view(np.uint16)
    yield Finding("heads of slots that differ", int((found != expected).any(-1).sum()), f"of {found[..., 0].size}", 0.0)


def _check_scatter(kernel: Callable, target: Target, seed: int) -> Iterator[Finding]:
    pool = _pool(seed, target)
    ids = _ids(np.random.default_rng(seed), pool.shape[0], pool.shape[0] // 2)
    payload = random_values(seed + 5, (len(ids), *pool.shape[1:]), pool.dtype)
    yield from _compare_in_place(kernel, target, pool, (payload, ids), "heads of slots")


def _check_xla(heads: Heads, small: bool, seed: int) -> Iterator[Finding]:
    """What the engine falls back to."""
    num_tokens, num_rows, width = (24, 4, 8) if small else (400, 12, 128)
    streams = random_streams(
        np.random.default_rng(seed), num_tokens=num_tokens, num_rows=num_rows, longest=width * heads.block_size
    )
    sizes = {"num_tokens": num_tokens, "num_rows": num_rows, "table_width": width, "seed": seed}
    case: Case = unpoisoned_null_block(make_case(heads, streams, **sizes))
    shape = step_shape_of(case)
    attend = jax.jit(partial(xla_attention, heads=heads, shape=shape))
    out = attend(case.q, case.cache, case.block_tables, step_batch_of(streams, shape))
    out = jnp.where(jnp.arange(num_tokens)[:, None, None] < case.num_queries, out, 0)
    yield Finding("worst error over its bound", error_over_bound(case, out), "", 1.0)
