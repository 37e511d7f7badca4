"""The GPU attention kernel in Mosaic GPU's interpreter: against the reference, and against itself bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu_generations import AMPERE, HOPPER, Generation
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.kernel_gpu import attention_gpu
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import PLACE, list_work
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import Sizes as KernelSizes
from pallas_kernels.ragged_paged_attention.ref import attention_reference
from pallas_kernels.ragged_paged_attention.tuning_gpu import Tiles, default_tiles, shared_bytes
from tests.kernels.gpu_interpreter import compile_threads_once, forget_failures, params  # noqa: F401
from tests.kernels.ragged_cases import Sequence, Sizes, place, random_case, random_sequence, rounding_bound

CASES = int(os.environ.get("JAXSERVE_KERNEL_CASES", "50"))
SCALE = 0.125
TILES = Tiles(kv_tile=64, kv_split=64, ring=3, lanes=1, num_ctas=1, max_splits_held=16, cut_below=100)


@dataclass(frozen=True)
class Setting:
    """One compiled program of the random tests; looking for races takes a third of its time, so four look.

    Interpreted, Blackwell is Hopper: its copies are the same and products are the interpreter's.
    """

    sizes: Sizes
    tiles: Tiles = TILES
    options: dict[str, Any] = field(default_factory=dict)
    races: bool = False
    generation: Generation = HOPPER

    def __hash__(self) -> int:
        return hash((self.sizes, self.tiles, tuple(self.options.items()), self.generation))


SMALL = Sizes(
    num_tokens=20, num_rows=3, table_width=5, block_size=32, num_kv_heads=1, num_blocks=13, dtype="bfloat16"
)  # up to three splits a sequence
SETTINGS = {
    "plain": Setting(
        replace(SMALL, num_kv_heads=2, block_size=16, table_width=9, num_blocks=24), replace(TILES, lanes=2), races=True
    ),
    "window": Setting(replace(SMALL, group=4), options={"window": 37}),
    "softcap_sinks": Setting(replace(SMALL, group=3, head_dim=128), options={"softcap": 3.0, "sinks": 1.5}),
    "float32": Setting(
        replace(SMALL, dtype="float32", group=1, table_width=3, block_size=64, num_blocks=8),
        options={"window": 100, "sinks": -0.5},
        races=True,
    ),
    "wide_head": Setting(
        replace(SMALL, group=1, head_dim=256, block_size=64, table_width=2, num_blocks=6), replace(TILES, ring=2)
    ),
    "fp8": Setting(  # two tiles a split, two tiles a block
        replace(
            SMALL,
            group=16,
            num_tokens=10,
            head_dim=128,
            block_size=128,
            table_width=2,
            num_blocks=6,
            kv_dtype="float8_e4m3fn",
        ),
        replace(TILES, kv_split=128),
    ),
    "fp8_float32": Setting(replace(SMALL, num_tokens=10, dtype="float32", kv_dtype="float8_e5m2")),
}
SETTINGS["ampere"] = replace(SETTINGS["plain"], generation=AMPERE)
SETTINGS["ampere_wide_head"] = replace(SETTINGS["wide_head"], generation=AMPERE)
SETTINGS["ampere_float32"] = replace(SETTINGS["float32"], generation=AMPERE, tiles=replace(TILES, ring=2))


def options_of(setting: Setting) -> dict[str, Any]:
    options = dict(setting.options)
    if "sinks" in options:
        heads = jnp.arange(setting.sizes.num_heads, dtype=jnp.float32)
        options["sinks"] = options["sinks"] + jnp.sin(heads)
    return options


@cache
def program(setting: Setting) -> Any:
    static = options_of(setting) | {"scale": SCALE, "tiles": setting.tiles}
    if (setting.sizes.kv_dtype or "").startswith("float8"):
        static |= {"k_scale": 0.03, "v_scale": 0.02}
    if setting.generation is HOPPER:
        call = partial(ragged_paged_attention, backend="gpu")
    else:
        call = partial(attention_gpu, generation=setting.generation)
    return jax.jit(partial(call, interpret=params(setting.races), **static))


@cache
def reference(setting: Setting) -> Any:
    """In float32: the exact output, and the same weights' sum of the values' magnitudes."""

    def run(q: jax.Array, cache: jax.Array, *rest: jax.Array, **scales: float) -> tuple[jax.Array, jax.Array]:
        call = partial(attention_reference, **options_of(setting), scale=SCALE, **scales)
        keys, values = jnp.split(cache.astype(jnp.float32), 2, axis=-1)
        magnitude = jnp.concatenate([keys, jnp.abs(values)], axis=-1)
        q = q.astype(jnp.float32)
        return call(q, cache, *rest), call(q, magnitude, *rest)

    return jax.jit(run)


@pytest.mark.parametrize("name", SETTINGS)
def test_random_cases(name: str):
    """Free blocks, unwritten places, padding and what tables name past a sequence's end are NaN throughout."""
    setting = SETTINGS[name]
    rng = np.random.default_rng(sorted(SETTINGS).index(name))
    for number in range(-(-CASES // len(SETTINGS))):
        case = random_case(rng, setting.sizes, edges=(63, 64, 65, 128, 129))
        out = np.asarray(program(setting)(*case.arguments)).astype(np.float32)
        expected, weighted = (np.asarray(array) for array in reference(setting)(*case.arguments, **case.scales))
        bound = rounding_bound(case, weighted, expected)
        off = np.abs(out - expected) - bound
        assert off.max() <= 0, f"case {number} of {name}: {off.max()} past the bound, lengths {case.seq_lens}"
        end = int(case.cu_q_lens[int(case.num_seqs[0])])
        assert not out[end:].any()


def queries_of(sequence: Sequence, begin: int, end: int) -> Sequence:
    """The sequence as of position `end`, when its queries from `begin` on are computed."""
    first = sequence.length - len(sequence.queries)
    return Sequence(sequence.queries[begin - first : end - first], sequence.kv[:end])


@pytest.mark.parametrize("name", ["plain", "float32", "ampere"])
def test_a_token_has_the_same_bits_in_every_company(name: str):
    """Every position as a decoding token, cut into splits and not; in chunks of several sizes; beside others; over
    other blocks; in a wider table: bit for bit."""
    setting = SETTINGS[name]
    sizes = setting.sizes
    rng = np.random.default_rng(7)
    length, count = 141, 3
    sequence = random_sequence(rng, sizes, count, length)
    first = length - count
    uncut = replace(setting, tiles=replace(setting.tiles, cut_below=0))

    def run(setting: Setting, sequences: list[Sequence], index: int) -> np.ndarray:
        case = place(rng, setting.sizes, sequences)
        begin, end = np.asarray(case.cu_q_lens)[index : index + 2]
        return np.asarray(program(setting)(*case.arguments).astype(jnp.float32))[begin:end]

    def in_chunks(setting: Setting, *ends: int) -> np.ndarray:
        begins = (first, *ends[:-1])
        pieces = zip(begins, ends, strict=True)
        return np.concatenate([run(setting, [queries_of(sequence, a, b)], 0) for a, b in pieces])

    whole = in_chunks(setting, length)
    assert np.isfinite(whole).all()
    assert np.array_equal(in_chunks(setting, *range(first + 1, length + 1)), whole), "decoding, cut into splits"
    assert np.array_equal(in_chunks(uncut, *range(first + 1, length + 1)), whole), "decoding, uncut"
    assert np.array_equal(in_chunks(setting, first + 1, length), whole), "chunks of 1 and 2"
    other, chunk = random_sequence(rng, sizes, 1, 30), random_sequence(rng, sizes, 5, 9)
    assert np.array_equal(run(setting, [other, chunk, sequence], 2), whole), "beside decoding and a chunk"
    last = queries_of(sequence, length - 1, length)
    assert np.array_equal(run(setting, [other, last, chunk], 1), whole[-1:]), "decoding beside others"
    if name == "plain":
        wider = replace(setting, sizes=replace(sizes, table_width=13, num_rows=5, num_tokens=31))
        assert np.array_equal(run(wider, [chunk, sequence], 1), whole), "in a wider table"


def test_who_copies_changes_no_bit():
    """In the interpreter, where products are the same: what threads copy and report is what the engine does."""
    case = random_case(np.random.default_rng(5), SETTINGS["plain"].sizes, edges=(64, 65, 129))
    by_engine, by_threads = (np.asarray(program(SETTINGS[name])(*case.arguments)) for name in ("plain", "ampere"))
    assert np.array_equal(by_engine.view(np.uint16), by_threads.view(np.uint16))


def test_sequences_are_cut_only_while_there_is_little_to_do():
    """So that the tests above have seen both paths."""

    def places(cut_below: int, held: int) -> list[int]:
        tiles = replace(TILES, cut_below=cut_below, max_splits_held=held)
        sizes = KernelSizes(
            8, 4, 2, 64, 30, 16, 9, 2, jnp.bfloat16, jnp.bfloat16, SCALE, None, None, False, tiles, HOPPER
        )  # fmt: skip
        ints = partial(jnp.asarray, dtype=jnp.int32)
        work = list_work(sizes, ints([130, 90]), ints([0, 1, 5]), ints([2]), ints([1]))
        return np.asarray(work.items)[: int(work.num_items[0]), PLACE].tolist()

    assert places(100, 16) == [0, 1, 2, -1, -1]  # three splits, one tile of queries, one of padding
    assert places(100, 2) == [-1, -1, -1], "three splits have no place in two"
    assert places(1, 16) == [-1, -1, -1], "four jobs keep the one worker busy"


def test_tiles_that_no_sm_has_room_for_are_refused():
    case = random_case(np.random.default_rng(0), SMALL)
    call = partial(ragged_paged_attention, *case.arguments, scale=SCALE, backend="gpu", interpret=True)
    with pytest.raises(ValueError, match=r"2 lanes of 40 slots, .* need \d+ bytes of shared memory: an SM has 232448"):
        call(tiles=Tiles(ring=40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_tile": 96}, "kv_tile is 96, kv_split 512: a tile has 64 or 128 keys"),
        ({"kv_split": 96}, "kv_tile is 64, kv_split 96: a split is whole tiles"),
        ({"ring": 1}, "ring is 1: 2 slots at least"),
        ({"lanes": 3}, "lanes is 3: a CTA has room for 1 or 2"),
        ({"num_ctas": 0}, r"num_ctas and max_splits_held are \(0, 1024\): 1 at least"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Tiles(**options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_default_tiles_fit_an_sm_and_keep_enough_under_way(head_dim: int, kv_dtype: str):
    """33 KB a microsecond are an H200's share for an SM: at 1 us of latency as much must be under way, beside what
    is being multiplied; half of it does for float32, which is no one's fast path."""
    q_dtype = "float32" if kv_dtype == "float32" else "bfloat16"
    tiles = default_tiles(head_dim, q_dtype, kv_dtype)
    assert shared_bytes(tiles, head_dim, q_dtype, kv_dtype) <= 227 * 1024
    slot = tiles.kv_tile * min(head_dim, 128) * jnp.dtype(kv_dtype).itemsize
    under_way = tiles.lanes * (tiles.ring - 1) * slot
    assert under_way >= (16_500 if kv_dtype == "float32" else 33_000)
