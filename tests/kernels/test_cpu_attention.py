"""The CPU's attention kernel: against the reference, and against itself bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.ref import attention_reference
from tests.kernels.cpu_kernels import needs_cpu_kernels
from tests.kernels.ragged_cases import Case, Sequence, Sizes, place, random_case, random_sequence, rounding_bound

pytestmark = needs_cpu_kernels

CASES = int(os.environ.get("JAXSERVE_KERNEL_CASES", "50"))
SCALE = 0.125


@dataclass(frozen=True)
class Setting:
    """One compiled program of the random tests."""

    sizes: Sizes
    options: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.sizes, tuple(self.options.items())))


LARGE = Sizes(num_tokens=150, num_rows=10, table_width=18, num_blocks=120)
SETTINGS = {
    "plain": Setting(LARGE),
    "bfloat16": Setting(replace(LARGE, dtype="bfloat16", num_kv_heads=3, group=3)),
    "window": Setting(replace(LARGE, dtype="bfloat16", group=4), {"window": 37}),
    "window_float32": Setting(replace(LARGE, group=1), {"window": 64}),
    "softcap_sinks": Setting(replace(LARGE, dtype="bfloat16", head_dim=128), {"softcap": 3.0, "sinks": 1.5}),
    "sinks_float32": Setting(replace(LARGE, head_dim=32), {"sinks": -0.5}),
    "no whole vectors": Setting(replace(LARGE, dtype="bfloat16", head_dim=18, group=5)),
    "no whole vectors, float32": Setting(replace(LARGE, head_dim=6, num_kv_heads=1, group=7)),
    "no power of two a block": Setting(replace(LARGE, block_size=24, table_width=9)),
    "many query heads": Setting(replace(LARGE, dtype="bfloat16", num_kv_heads=1, group=32, head_dim=80)),
}


def options_of(setting: Setting) -> dict[str, Any]:
    options = dict(setting.options)
    if "sinks" in options:
        heads = jnp.arange(setting.sizes.num_heads, dtype=jnp.float32)
        options["sinks"] = options["sinks"] + jnp.sin(heads)
    return options


@cache
def program(setting: Setting) -> Any:
    """What the kernel gives for the stream's tokens; zeros past them, where it writes nothing."""

    def run(q: jax.Array, pool: jax.Array, *ints: jax.Array) -> jax.Array:
        out = ragged_paged_attention(q, pool, *ints, scale=SCALE, backend="cpu", **options_of(setting))
        _, _, cu_q_lens, num_seqs, _ = ints
        is_fed = jnp.arange(len(q)) < cu_q_lens[num_seqs[0]]
        return jnp.where(is_fed[:, None, None], out, 0)

    return jax.jit(run)


@cache
def reference(setting: Setting) -> Any:
    """In float32: the exact output, and the same weights' sum of the values' magnitudes."""

    def run(q: jax.Array, pool: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        call = partial(attention_reference, **options_of(setting), scale=SCALE)
        keys, values = jnp.split(pool.astype(jnp.float32), 2, axis=-1)
        magnitude = jnp.concatenate([keys, jnp.abs(values)], axis=-1)
        q = q.astype(jnp.float32)
        return call(q, pool, *rest), call(q, magnitude, *rest)

    return jax.jit(run)


@pytest.mark.parametrize("name", SETTINGS)
def test_random_cases(name: str) -> None:
    """Free blocks, unwritten places, padding and what tables name past a sequence's end are NaN throughout."""
    setting = SETTINGS[name]
    rng = np.random.default_rng(sorted(SETTINGS).index(name))
    for number in range(-(-CASES // len(SETTINGS))):
        case = random_case(rng, setting.sizes, edges=(63, 64, 65, 128, 129))
        out = np.asarray(program(setting)(*case.arguments)).astype(np.float32)
        expected, weighted = (np.asarray(array) for array in reference(setting)(*case.arguments))
        off = np.abs(out - expected) - rounding_bound(case, weighted, expected)
        assert off.max() <= 0, f"case {number} of {name}: {off.max()} past the bound, lengths {case.seq_lens}"


def run(setting: Setting, case: Case) -> np.ndarray:
    out = np.asarray(program(setting)(*case.arguments))
    return out.view(np.uint16 if out.dtype.itemsize == 2 else np.uint32)


def queries_of(sequence: Sequence, begin: int, end: int) -> Sequence:
    """The sequence as of position `end`, when its queries from `begin` on are computed."""
    first = sequence.length - len(sequence.queries)
    return Sequence(sequence.queries[begin - first : end - first], sequence.kv[:end])


@pytest.mark.parametrize("name", ["plain", "bfloat16", "window", "softcap_sinks", "no whole vectors, float32"])
def test_a_token_has_the_same_bits_in_every_company(name: str) -> None:
    """As a decoding token, alone and among enough others for tasks to be cut otherwise; in chunks of several sizes,
    longer than a task's; over other blocks; in a wider table: bit for bit."""
    setting = SETTINGS[name]
    sizes = replace(setting.sizes, num_blocks=400, num_rows=20)
    setting = replace(setting, sizes=sizes)
    rng = np.random.default_rng(7)
    length, count = 206, 140
    sequence = random_sequence(rng, sizes, count, length)
    first = length - count
    whole = run(setting, place(rng, sizes, [sequence]))[:count]
    for size in (1, 3, 17, 64, 100):
        for begin in range(0, count, size if size > 1 else 23):
            end = min(begin + size, count)
            part = queries_of(sequence, first + begin, first + end)
            found = run(setting, place(rng, sizes, [part]))[: end - begin]
            np.testing.assert_array_equal(found, whole[begin:end], err_msg=f"{begin} to {end}")
    last = queries_of(sequence, length - 1, length)
    others = [random_sequence(rng, sizes, 1, int(rng.integers(1, 280))) for _ in range(sizes.num_rows - 1)]
    wide = replace(sizes, table_width=sizes.table_width + 3)
    for among in (sizes, wide):
        found = run(replace(setting, sizes=among), place(rng, among, [*others[:9], last, *others[9:]]))
        np.testing.assert_array_equal(found[9], whole[-1])


def test_bits_of_bfloat16_are_taken_for_it() -> None:
    """A CPU's cache holds uint16: XLA:CPU would convert a bfloat16 one whole in each write."""
    setting = SETTINGS["bfloat16"]
    case = random_case(np.random.default_rng(3), setting.sizes)
    q, pool, *rest = case.arguments
    as_bits = jax.lax.bitcast_convert_type(pool, jnp.uint16)
    np.testing.assert_array_equal(program(setting)(q, as_bits, *rest), program(setting)(q, pool, *rest))
    with pytest.raises(ValueError, match=r"the cache holds uint16: .* bitcast integers that hold floats"):
        ragged_paged_attention(q, as_bits, *rest, scale=SCALE, backend="reference")


def test_what_is_not_a_number_stays_in_its_row() -> None:
    """A query that is NaN or infinite makes its own output NaN, and no other's."""
    setting = SETTINGS["bfloat16"]
    rng = np.random.default_rng(5)
    sequences = [random_sequence(rng, setting.sizes, 1, 70), random_sequence(rng, setting.sizes, 20, 90)]
    case = place(rng, setting.sizes, sequences)
    whole = np.asarray(program(setting)(*case.arguments)).astype(np.float32)
    for value in (np.nan, np.inf):
        q = case.q.at[5, 4].set(value)
        out = np.asarray(program(setting)(q, *case.arguments[1:])).astype(np.float32)
        assert np.isnan(out[5, 4]).all()
        out[5, 4] = whole[5, 4]
        np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_lens": 300_000},  # past the table
        {"seq_lens": 2},  # fewer keys than queries
        {"cu_q_lens": -1},
        {"cu_q_lens": 10**6},  # past the stream
    ],
    ids=str,
)
def test_a_sequence_that_cannot_be_is_left_out(change: dict[str, int]) -> None:
    """Nothing is read or written past the arrays; the engine's host checks every number before it sends it."""
    setting = SETTINGS["plain"]
    rng = np.random.default_rng(6)
    case = place(rng, setting.sizes, [random_sequence(rng, setting.sizes, 5, 70)])
    (name, value), index = next(iter(change.items())), 1 if "cu_q_lens" in change else 0
    bad = replace(case, **{name: getattr(case, name).at[index].set(value)})
    assert not np.asarray(program(setting)(*bad.arguments)).any()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head_dim": 7}, "head_dim is 7: the CPU's kernels have even ones up to 512"),
        ({"head_dim": 514}, "head_dim is 514"),
        (
            {"kv_dtype": "float16", "dtype": "float16"},
            "the cache holds float16: the CPU's kernels have bfloat16, float32",
        ),
        ({"kv_dtype": "float8_e4m3fn"}, "the cache holds float8_e4m3fn"),
    ],
)
def test_what_it_does_not_cover_is_refused(changes: dict[str, Any], why: str) -> None:
    case = random_case(np.random.default_rng(0), replace(SETTINGS["plain"].sizes, **changes))
    with pytest.raises(ValueError, match=why):
        ragged_paged_attention(*case.arguments, scale=SCALE, backend="cpu")
