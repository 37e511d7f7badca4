"""The CPU's kernels between products, the norm and the rotation with its write: against float64, and bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm.api import add_rms_norm
from pallas_kernels.rope_write.api import rope_write
from tests.kernels.cpu_kernels import needs_cpu_kernels

pytestmark = needs_cpu_kernels

DTYPES = ("float32", "bfloat16")
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # of rounding
EPS = 1e-5


def draw(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def as64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def count(num: int) -> jax.Array:
    return jnp.full((1,), num, jnp.int32)


@pytest.mark.parametrize(("dtype", "num"), [*product(DTYPES, (1, 15, 16, 34, 576, 4100))])
def test_the_norm_is_right(dtype: str, num: int) -> None:
    x, delta, weight = draw((40, num)), draw((40, num), seed=1), draw((num,), dtype, seed=2)
    for added in (delta, None):
        total, found = add_rms_norm(x, added, weight, count(40), eps=EPS, dtype=dtype)
        exact = np.asarray(x) if added is None else np.asarray(x) + np.asarray(added)
        np.testing.assert_array_equal(total, exact)
        # 16 chains of n / 16 squares err by n / 16 units in the last place, their root by half of it; a handful follow.
        allowed = (num / 32 + 8) * 2.0**-24 + UNITS[dtype]
        wanted = normed(as64(exact), as64(weight))
        assert (np.abs(as64(found) - wanted) <= allowed * np.abs(wanted)).all()
        assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_norm_has_the_same_bits_among_any_others(dtype: str) -> None:
    x, delta, weight = draw((700, 130)), draw((700, 130), seed=1), draw((130,), dtype, seed=2)
    whole = add_rms_norm(x, delta, weight, count(700), eps=EPS, dtype=dtype)
    for num, start in product((1, 2, 125, 127, 400), (0, 7)):
        rows = slice(start, start + num)
        part = add_rms_norm(x[rows], delta[rows], weight, count(num), eps=EPS, dtype=dtype)
        for found, wanted in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, wanted[rows])


def test_the_norm_leaves_rows_without_a_token() -> None:
    x, weight = draw((20, 64)), draw((64,))
    whole = add_rms_norm(x, x, weight, count(20), eps=EPS, dtype="bfloat16")
    for num in (0, 1, 9, 20, 99, -3):
        kept = min(max(num, 0), 20)
        total, found = add_rms_norm(x, x, weight, count(num), eps=EPS, dtype="bfloat16")
        np.testing.assert_array_equal(total[:kept], whole[0][:kept])
        np.testing.assert_array_equal(found[:kept], whole[1][:kept])
        # Of the sum, which takes the place of x, the others are still what they were.
        np.testing.assert_array_equal(total[kept:], x[kept:])


class Case:
    """Arguments of `rope_write`, on a cache of 5 blocks of 4."""

    def __init__(self, dtype: str, head_dim: int, num: int, *, has_norms: bool, has_bias: bool) -> None:
        kv_heads, groups = 2, 3
        self.dtype, self.num = dtype, num
        self.qkv = draw((num, kv_heads, groups + 2, head_dim))
        angles = draw((num, head_dim // 2), seed=1)
        self.cos, self.sin = jnp.cos(angles), jnp.sin(angles)
        cache = draw((5, 4, kv_heads, 2 * head_dim), dtype, seed=2)
        self.cache = jax.lax.bitcast_convert_type(cache, jnp.uint16) if dtype == "bfloat16" else cache
        self.slots = jnp.asarray(np.random.default_rng(3).permutation(20)[:num], jnp.int32)
        self.options: dict[str, Any] = {"dtype": dtype, "scale": head_dim**-0.5}
        if has_bias:
            self.options["bias"] = draw((kv_heads, groups + 2, head_dim), dtype, seed=4)
        if has_norms:
            self.options |= {"eps": EPS, "q_norm": draw((head_dim,), dtype, 5), "k_norm": draw((head_dim,), dtype, 6)}

    def run(self, num: int | None = None, **changes: Any) -> tuple[jax.Array, np.ndarray]:
        """Queries and cache, as numbers."""
        names = ("qkv", "cos", "sin", "cache", "slots")
        arrays = [changes.pop(name, getattr(self, name)) for name in names]
        q, cache = rope_write(*arrays, count(self.num if num is None else num), **self.options, **changes)
        kind = jnp.bfloat16 if cache.dtype == jnp.uint16 else cache.dtype
        return q, np.asarray(jax.lax.bitcast_convert_type(cache, kind)).astype(np.float32)

    def exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values in float64."""
        heads = as64(self.qkv) + as64(self.options.get("bias", 0.0))
        cos, sin = as64(self.cos)[:, None], as64(self.sin)[:, None]

        def turn(x: np.ndarray, norm: str) -> np.ndarray:
            x = normed(x, as64(self.options[norm])) if norm in self.options else x
            low, high = np.split(x, 2, axis=-1)
            return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

        shape = heads[:, :, :-2].shape
        q = turn(heads[:, :, :-2].reshape(shape[0], -1, shape[-1]), "q_norm").reshape(shape) * self.options["scale"]
        return q, turn(heads[:, :, -2], "k_norm"), heads[:, :, -1]


@pytest.mark.parametrize(("dtype", "head_dim"), [*product(DTYPES, (2, 32, 34, 128))])
@pytest.mark.parametrize(("has_norms", "has_bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_heads_are_rotated_and_written(dtype: str, head_dim: int, has_norms: bool, has_bias: bool) -> None:
    case = Case(dtype, head_dim, 17, has_norms=has_norms, has_bias=has_bias)
    q, cache = case.run()
    wanted_q, wanted_k, wanted_v = case.exact()
    flat = cache.reshape(20, 2, -1)[np.asarray(case.slots)]
    found_k, found_v = np.split(flat, 2, axis=-1)
    for found, wanted in ((as64(q), wanted_q), (found_k, wanted_k), (found_v, wanted_v)):
        # A rotation adds two products, each no larger than the largest of the head; a norm before it errs as above.
        largest = np.abs(wanted).max(-1, keepdims=True) + 2.0**-20
        allowed = (head_dim / 32 + 16) * 2.0**-23 * largest + UNITS[dtype] * np.abs(wanted)
        assert (np.abs(found - wanted) <= allowed).all()
    assert q.dtype == dtype
    _, before = case.run(num=0)
    others = np.setdiff1d(np.arange(20), np.asarray(case.slots))
    np.testing.assert_array_equal(cache.reshape(20, 2, -1)[others], before.reshape(20, 2, -1)[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_says_the_same(dtype: str) -> None:
    case = Case(dtype, 34, 17, has_norms=True, has_bias=True)
    for found, wanted in zip(case.run(), case.run(backend="reference"), strict=True):
        np.testing.assert_allclose(as64(found), as64(wanted), rtol=2 * UNITS[dtype] + 1e-5, atol=1e-5)
    x, weight = draw((9, 34)), draw((34,), dtype)
    for delta in (None, x):
        found = add_rms_norm(x, delta, weight, count(9), eps=EPS, dtype=dtype)
        wanted = add_rms_norm(x, delta, weight, count(9), eps=EPS, dtype=dtype, backend="reference")
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(as64(one), as64(other), rtol=2 * UNITS[dtype] + 1e-5)


def test_nothing_is_written_for_nobody() -> None:
    """Neither past the tokens nor to a slot outside of the cache, whichever number that is."""
    case = Case("bfloat16", 32, 6, has_norms=False, has_bias=False)
    _, before = case.run(num=0)
    _, after = case.run(num=4, slots=jnp.asarray([-1, 20, 2**31 - 1, 7, 3, 2], jnp.int32))
    before, after = before.reshape(20, -1), after.reshape(20, -1)
    np.testing.assert_array_equal(np.delete(after, 7, axis=0), np.delete(before, 7, axis=0))
    assert (after[7] != before[7]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_among_any_others(dtype: str) -> None:
    case = Case(dtype, 34, 20, has_norms=True, has_bias=True)
    whole_q, whole = case.run()
    for start, num in ((0, 1), (3, 2), (7, 13)):
        rows = slice(start, start + num)
        parts = {name: getattr(case, name)[rows] for name in ("qkv", "cos", "sin", "slots")}
        q, cache = case.run(num=num, **parts)
        np.testing.assert_array_equal(q, whole_q[rows])
        here = np.asarray(case.slots[rows])
        np.testing.assert_array_equal(cache.reshape(20, -1)[here], whole.reshape(20, -1)[here])


def test_a_donated_cache_is_written_in_place() -> None:
    case = Case("float32", 32, 4, has_norms=False, has_bias=False)

    def run(cache: jax.Array) -> jax.Array:
        return rope_write(case.qkv, case.cos, case.sin, cache, case.slots, count(4), **case.options)[1]

    compiled = jax.jit(run, donate_argnums=0).lower(case.cache).compile()
    assert " copy(" not in compiled.as_text()
    place = case.cache.unsafe_buffer_pointer()
    assert compiled(case.cache).unsafe_buffer_pointer() == place


def test_what_does_not_fit_is_refused() -> None:
    case = Case("bfloat16", 32, 4, has_norms=False, has_bias=False)
    for changes, why in (
        ({"qkv": case.qkv.astype("bfloat16")}, r"qkv is bfloat16\[4, 2, 5, 32\]: it must be float32"),
        ({"cos": case.cos[:2]}, r"cos is float32\[2, 16\]: float32 \[4, 16\] is asked for"),
        ({"cache": case.cache[..., :32]}, r"the cache is \[5, 4, 2, 32\]: qkv asks for \[P, C, 2, 64\]"),
        ({"cache": case.cache.astype("float32")}, "the cache is float32: bfloat16 or uint16 is asked for"),
        ({"slots": case.slots[:1]}, r"slots are int32\[1\]: int32 \[4\] are asked for"),
        ({"backend": "gpu"}, "backend is 'gpu': it must be cpu or reference"),
    ):
        with pytest.raises(ValueError, match=why):
            case.run(**changes)
    x = draw((3, 8))
    for arrays, why in (
        ((x, x[:2], x[0]), r"x, delta and weight are \(3, 8\), \(2, 8\) and \(8,\)"),
        ((x.astype("bfloat16"), None, x[0]), "x is bfloat16: it must be float32"),
        ((x, x, x[0].astype("float16")), "weight is float16"),
    ):
        with pytest.raises(ValueError, match=why):
            add_rms_norm(*arrays, count(3), eps=EPS, dtype="float32")


def test_a_call_of_other_types_is_an_error_and_no_read_of_other_memory() -> None:
    x, shapes = draw((3, 8)), (jax.ShapeDtypeStruct((3, 8), jnp.float32),) * 2
    call = jax.ffi.ffi_call("jaxserve_add_rms_norm", shapes)
    for arrays in ((x, x, x[0], x[:1, 0]), (x, x, x[0].astype("float16"), count(3)), (x, x, x[0])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="the kernel has other arguments or results"):
            jax.block_until_ready(call(*arrays, eps=EPS))
    for attributes in ({}, {"eps": 1}, {"epsilon": EPS}):
        with pytest.raises(jax.errors.JaxRuntimeError, match="an attribute is missing or of another type"):
            jax.block_until_ready(call(x, x, x[0], count(3), **attributes))
