"""Blocks in host memory: bitwise, in the order in which they left, and never an alias of what the device reuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.moves import batches
from jaxserve.engine.swap_store import SwapStore, staging_memory
from jaxserve.errors import EngineError

SHAPE = (2, 4, 1, 6)


def slots(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def blocks(count: int, seed: int, dtype: str = "float32") -> np.ndarray:
    """[count, ...] any bits."""
    bits = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE, 4), np.uint8)
    return bits.view(dtype)[..., 0]


class Slow:
    """A payload whose transfer ends when the test says so."""

    def __init__(self, values: np.ndarray) -> None:
        self._array, self.arrived = jnp.asarray(values), False

    def copy_to_host_async(self) -> None:
        pass

    def is_ready(self) -> bool:
        return self.arrived

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        self.arrived = True
        return np.asarray(self._array)


@pytest.mark.parametrize(
    ("platform", "kinds", "staging"),
    [
        ("cpu", ("device", "pinned_host"), None),
        ("gpu", ("device", "pinned_host"), "pinned_host"),
        ("tpu", ("device", "unpinned_host"), None),
    ],
)
def test_accelerators_go_through_pinned_memory(platform: str, kinds: tuple[str, ...], staging: str | None) -> None:
    memories = [SimpleNamespace(kind=kind) for kind in kinds]
    device: Any = SimpleNamespace(platform=platform, addressable_memories=lambda: memories)
    assert staging_memory(device) == staging


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("staging", [None, "pinned_host"])
def test_what_goes_out_comes_back_bitwise(dtype: str, verify: bool, staging: str | None) -> None:
    store = SwapStore(6, SHAPE, dtype, verify=verify, staging=staging)
    first, second = blocks(4, 0, dtype), blocks(2, 1, dtype)
    store.put(jnp.asarray(first), slots(5, 0, 3))  # the fourth is padding
    store.put(jnp.asarray(second), slots(1, 4))
    back = store.read(slots(4, 0, 3, 5), 8)
    assert back.shape == (8, *SHAPE)
    assert back[:4].tobytes() == np.stack([second[1], first[1], first[2], first[0]]).tobytes()
    assert (store.out.blocks, store.back.blocks) == (5, 4)
    assert store.out.bytes == 5 * first[0].nbytes
    assert store.out.seconds > 0 < store.back.seconds


def test_the_later_of_two_transfers_to_a_slot_wins() -> None:
    """The slot was freed and given out again while its old content was still on the way."""
    store = SwapStore(3, SHAPE, np.float32)
    old, new = Slow(blocks(2, 0)), Slow(blocks(1, 1))
    store.put(old, slots(0, 1))
    store.put(new, slots(1))
    new.arrived = True  # overtakes
    store.drain()
    assert store.num_pending == 2, "transfers land in their order"
    assert store.read(slots(1), 1).tobytes() == blocks(1, 1).tobytes()
    assert old.arrived
    assert store.read(slots(0), 1)[0].tobytes() == blocks(2, 0)[0].tobytes()


def test_reading_waits_for_what_it_needs_and_draining_for_nothing() -> None:
    store = SwapStore(4, SHAPE, np.float32)
    first, second = Slow(blocks(1, 0)), Slow(blocks(1, 1))
    store.put(first, slots(0))
    store.put(second, slots(1))
    store.drain()
    assert (first.arrived, store.num_pending) == (False, 2)
    assert store.read(slots(0), 1).tobytes() == blocks(1, 0).tobytes()
    assert (second.arrived, store.num_pending) == (False, 1)
    second.arrived = True
    store.drain()
    assert store.num_pending == 0


def test_nothing_is_aliased() -> None:
    """On a CPU `np.asarray` of a device array is the device's own memory, which the next program may be given."""
    store = SwapStore(2, SHAPE, np.float32)
    values = blocks(2, 0)
    payload = jnp.asarray(values.copy())
    store.put(payload, slots(0, 1))
    store.drain()
    jax.jit(lambda x: x * 0, donate_argnums=0)(payload).block_until_ready()
    back = store.read(slots(0, 1), 2)
    assert back.tobytes() == values.tobytes()
    back[:] = 0
    assert store.read(slots(0, 1), 2).tobytes() == values.tobytes(), "a reader changed what is stored"


def test_a_torn_copy_is_told_by_its_slot() -> None:
    store = SwapStore(4, SHAPE, np.uint16, verify=True)
    store.put(jnp.asarray(blocks(3, 0, "uint16")), slots(2, 0, 3))
    store.drain()
    store.read(slots(0, 2, 3), 3)
    store._slots[3, 1, 2, 0, 5] ^= 1
    store.read(slots(0, 2), 2)
    with pytest.raises(EngineError, match=r"Slot 3 of the swap space does not hold what was stored"):
        store.read(slots(0, 3), 2)


def test_a_failed_device_loses_what_was_on_the_way_and_only_that() -> None:
    store = SwapStore(5, SHAPE, np.float32)
    store.put(jnp.asarray(blocks(1, 0)), slots(4))
    store.drain()
    store.put(Slow(blocks(2, 1)), slots(3, 1))
    store.put(Slow(blocks(1, 2)), slots(3))
    assert store.lose_pending().tolist() == [1, 3]
    assert store.num_pending == 0
    assert store.read(slots(4), 1).tobytes() == blocks(1, 0).tobytes()


@given(count=st.integers(0, 700), sizes=st.sets(st.sampled_from([1, 4, 8, 13, 64, 512]), min_size=1))
def test_batches_cover_everything_once_with_little_padding(count: int, sizes: set[int]) -> None:
    def cut() -> Iterator[tuple[slice, int]]:
        return batches(count, sizes)

    covered = [i for part, _ in cut() for i in range(part.start, part.stop)]
    assert covered == list(range(count))
    for part, size in cut():
        num = part.stop - part.start
        assert num <= size
        assert size in sizes
        assert size < 2 * num or size == min(sizes)
