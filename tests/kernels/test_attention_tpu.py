"""The TPU attention kernel in the TPU interpreter: against the reference, and against itself bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.tuning import CHIPS, Tiles, tiles_for
from tests.kernels.ragged_cases import Case, Sequence, Sizes, place, random_case, random_sequence, rounding_bound
from tests.kernels.tpu_interpreter import CHECKED, run_checked

NUM_CASES = int(os.environ.get("JAXSERVE_KERNEL_CASES", "50"))


@dataclass(frozen=True)
class Setting:
    """A program: its shapes and all that is static. Sinks are drawn from a fixed seed."""

    sizes: Sizes
    tiles: Tiles
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def options(self) -> dict[str, Any]:
        sinks = None
        if self.has_sinks:
            sinks = jnp.asarray(np.random.default_rng(7).normal(0, 2, self.sizes.num_heads), jnp.float32)
        scale = self.sizes.head_dim**-0.5
        return {"scale": scale, "window": self.window, "softcap": self.softcap, "sinks": sinks}


# Heads of each size and groups of 1 to 16, blocks from 16 to 128, one to six tiles of keys, each option and dtype.
SETTINGS = {
    "float32": Setting(Sizes(group=1), Tiles(32, 8)),
    "grouped": Setting(Sizes(num_kv_heads=3, group=2, head_dim=128), Tiles(48, 16)),
    "bfloat16": Setting(
        Sizes(num_kv_heads=1, group=4, head_dim=128, dtype="bfloat16"), Tiles(32, 8), window=21, softcap=5.0
    ),
    "sinks": Setting(
        Sizes(group=3, head_dim=256, dtype="bfloat16", block_size=32, table_width=4, num_blocks=24),
        Tiles(64, 16, decode_heads=1, chunk_heads=1),
        has_sinks=True,
    ),
    "fp8": Setting(
        Sizes(num_kv_heads=1, group=16, dtype="bfloat16", kv_dtype="float8_e4m3fn", table_width=12, num_blocks=64),
        Tiles(64, 8),
        window=70,
        has_sinks=True,
    ),
    "fp8 wide": Setting(
        Sizes(group=5, kv_dtype="float8_e5m2", block_size=128, table_width=3, num_blocks=16), Tiles(256, 16)
    ),
}
BY_NAME = pytest.mark.parametrize("name", SETTINGS)


@cache
def program(setting: Setting, backend: str) -> Callable[..., jax.Array]:
    chosen = {"tiles": setting.tiles, "interpret": CHECKED} if backend == "tpu" else {}
    return jax.jit(partial(ragged_paged_attention, **setting.options, **chosen, backend=backend))


def attend(setting: Setting, case: Case) -> jax.Array:
    return run_checked(program(setting, "tpu"), *case.arguments, **as_arrays(case.scales))


def as_arrays(scales: dict[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(scale) for name, scale in scales.items()}


def assert_close_to_reference(setting: Setting, case: Case) -> None:
    """Within what the kernel rounds; `rounding_bound` has the derivation."""
    exact_case = replace(case, q=case.q.astype(jnp.float32))
    if case.cache.dtype == jnp.bfloat16:
        exact_case = replace(exact_case, cache=case.cache.astype(jnp.float32))
    reference = partial(program(setting, "reference"), **as_arrays(case.scales))
    exact = reference(*exact_case.arguments)
    is_value = jnp.arange(2 * setting.sizes.head_dim) >= setting.sizes.head_dim
    magnitudes = jnp.where(is_value, abs(exact_case.cache.astype(jnp.float32)), exact_case.cache.astype(jnp.float32))
    weighted = reference(*replace(exact_case, cache=magnitudes.astype(exact_case.cache.dtype)).arguments)
    out = np.asarray(attend(setting, case).astype(jnp.float32), np.float64)
    error = np.abs(out - np.asarray(exact, np.float64))
    bound = rounding_bound(case, weighted, exact)
    assert np.all(error <= bound), (
        f"off by {np.nanmax(error / np.maximum(bound, 1e-30))} bounds, NaN: {np.isnan(out).sum()}"
    )


@BY_NAME
def test_random_ragged_batches(name: str):
    setting = SETTINGS[name]
    tile = setting.tiles.kv_tile
    rng = np.random.default_rng(list(SETTINGS).index(name))
    for _ in range(-(-NUM_CASES // len(SETTINGS))):
        assert_close_to_reference(setting, random_case(rng, setting.sizes, (tile - 1, tile, tile + 1, 2 * tile)))


# --- exactness: equal bits ---------------------------------------------------------------------------------
#
# XLA:CPU, under the interpreter, rounds a float32 product by how many rows it has. A TPU does not, nor does
# XLA:CPU in bfloat16. So float32 is compared where a decode tile and a chunk's tile have eight rows each.
EXACT = {name: SETTINGS[name] for name in ("float32", "bfloat16", "fp8")}
BY_EXACT_NAME = pytest.mark.parametrize("name", EXACT)


def last_rows(setting: Setting, sequences: list[Sequence], which: int, seed: int = 0) -> np.ndarray:
    """Bits of the output of sequence `which`; the seed decides where blocks lie."""
    case = place(np.random.default_rng(seed), setting.sizes, sequences)
    begin, end = case.cu_q_lens[which], case.cu_q_lens[which + 1]
    out = attend(setting, case)[int(begin) : int(end)]
    return np.asarray(out).view(np.uint16 if out.dtype == jnp.bfloat16 else np.uint32)


def cut(whole: Sequence, first: int, end: int) -> Sequence:
    """The step that computes positions first to end."""
    return Sequence(whole.queries[first:end], whole.kv[:end])


@pytest.fixture
def whole(name: str) -> Sequence:
    """A sequence of almost the longest context, with the query of every position."""
    sizes = EXACT[name].sizes
    return random_sequence(np.random.default_rng(3), sizes, sizes.longest - 3, sizes.longest - 3)


@BY_EXACT_NAME
def test_a_token_has_the_same_bits_decoded_and_in_any_chunk(name: str, whole: Sequence):
    setting, end = EXACT[name], whole.length
    alone = last_rows(setting, [cut(whole, end - 1, end)], 0)
    for size in (2, 7, 8, 33, setting.sizes.num_tokens):
        np.testing.assert_array_equal(
            last_rows(setting, [cut(whole, end - size, end)], 0)[-1:], alone, err_msg=str(size)
        )
    middle = end - 5  # not the chunk's last token, and in another place of its tile of queries
    decoded = last_rows(setting, [cut(whole, middle - 1, middle)], 0)
    for size in (6, 14):
        np.testing.assert_array_equal(
            last_rows(setting, [cut(whole, end - size, end)], 0)[size - 6 : size - 5], decoded
        )


@BY_EXACT_NAME
def test_neighbours_and_places_of_blocks_change_no_bit(name: str, whole: Sequence):
    setting, end = EXACT[name], whole.length
    rng = np.random.default_rng(5)
    of = partial(random_sequence, rng, setting.sizes)
    step = cut(whole, end - 9, end)
    alone = last_rows(setting, [step], 0)
    np.testing.assert_array_equal(last_rows(setting, [step], 0, seed=11), alone)
    beside = [of(1, 31), of(1, 2), of(4, 33), step, of(11, 40)]
    np.testing.assert_array_equal(last_rows(setting, beside, 3, seed=12), alone)
    decoded = last_rows(setting, [cut(whole, end - 1, end)], 0)
    np.testing.assert_array_equal(decoded[0], alone[-1])
    beside = [of(1, 50), cut(whole, end - 1, end), of(1, 1), of(20, 20)]
    np.testing.assert_array_equal(last_rows(setting, beside, 1, seed=13), decoded)


def test_wider_tables_and_larger_programs_change_no_bit():
    setting = EXACT["float32"]
    sizes = setting.sizes
    larger = replace(sizes, num_tokens=56, num_rows=7, table_width=2 * sizes.table_width + 1, num_blocks=70)
    whole = random_sequence(np.random.default_rng(3), sizes, sizes.longest, sizes.longest)
    steps = [cut(whole, whole.length - 1, whole.length), cut(whole, whole.length - 19, whole.length)]
    for which in (0, 1):
        small = last_rows(setting, steps, which)
        np.testing.assert_array_equal(last_rows(replace(setting, sizes=larger), steps, which), small)


def test_a_slightly_longer_key_gives_other_bits():
    """So the comparisons above can fail."""
    setting = EXACT["float32"]
    whole = random_sequence(np.random.default_rng(3), setting.sizes, 1, 90)
    changed = whole.kv.copy()
    changed[40, 0] *= 1 + 2**-14
    assert np.any(last_rows(setting, [whole], 0) != last_rows(setting, [replace(whole, kv=changed)], 0))


# --- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(40, 16), "kv_tile is 40: it must be a whole number of blocks of 16 tokens"),
        (Tiles(192, 16), "kv_tile is 192: past 128 it must be a multiple of 128, a row of lanes"),
        (Tiles(32, 12), "q_tile is 12: it must be a multiple of 8, the rows of a tile of memory"),
        (Tiles(32, 16, decode_heads=0), "decode_heads is 0: 1 at least"),
        (Tiles(32, 16, chunk_heads=0), "chunk_heads is 0: 1 at least"),
        (Tiles(32, 16, vmem_limit_mib=0), "vmem_limit_mib is 0: 1 at least"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tiles: Tiles, message: str):
    case = random_case(np.random.default_rng(0), Sizes())
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*case.arguments, scale=1.0, tiles=tiles, backend="tpu", interpret=True)


def test_block_tables_past_scalar_memory_are_refused():
    case = random_case(np.random.default_rng(0), Sizes())
    tables = jnp.zeros((5, 40_000), jnp.int32)
    message = r"5 x 40000 take 800000 bytes of a TPU's scalar memory, where 786432 may be used: use larger blocks"
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*replace(case, block_tables=tables).arguments, scale=1.0, backend="tpu", interpret=True)


@pytest.mark.parametrize("chip", [None, *CHIPS])
def test_chosen_tiles_fit_every_model(chip: str | None):
    for num_kv_heads in (1, 2, 3, 8, 32):
        for group in range(1, 17):
            for head_dim in (64, 128, 256):
                for block_size in (16, 32, 64, 128):
                    sizes = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
                    tiles = tiles_for(chip, **sizes, block_size=block_size, kv_itemsize=2)
                    tiles.check(block_size)
                    buffers = 2 * 2 * tiles.kv_tile * num_kv_heads * 2 * head_dim
                    rows = tiles.q_tile * group * num_kv_heads
                    assert buffers + 4 * rows * (2 * 128 + 5 * max(head_dim, 128)) <= tiles.vmem_limit_mib << 20


def test_an_unknown_chip_is_refused():
    sizes = {"num_kv_heads": 1, "group": 1, "head_dim": 64, "block_size": 16, "kv_itemsize": 2}
    with pytest.raises(ValueError, match="chip is 'v4': it must be one of v5e, v6e, tpu7x"):
        tiles_for("v4", **sizes)
