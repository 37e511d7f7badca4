"""The CPU's products: against float64, and against themselves bit for bit."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear.api import (
    PanelMatrix,
    can_gate,
    gated_linear,
    linear,
    take_rows,
    to_matrix,
    to_panels,
    uncovered_matrix,
)
from tests.kernels.cpu_kernels import needs_cpu_kernels

pytestmark = needs_cpu_kernels

DTYPES = ("float32", "bfloat16")
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def exact(x: jax.Array, weight: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """x @ weight.T in float64, and how far a chain of float32 multiply-adds may lie from it.

    Each of the depth steps rounds a partial sum: gamma_n = n u / (1 - n u) times the sum of magnitudes (Higham,
    Accuracy and Stability of Numerical Algorithms, §3.1). A bfloat16 step rounds up to twice, and takes what is below
    2^-126 for zero: nothing here is.
    """
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    n = 2 * x.shape[1]
    return x64 @ w64.T, n * 2.0**-24 / (1 - n * 2.0**-24) * (np.abs(x64) @ np.abs(w64).T)


@pytest.mark.parametrize(
    ("dtype", "outs", "ins"), [*product(DTYPES, (1, 31, 32, 100), (2, 34, 576)), ("float32", 64, 7)]
)
def test_products_are_right(dtype: str, outs: int, ins: int) -> None:
    weight = draw((outs, ins), dtype)
    panels = to_panels(weight)
    for num in (1, 2, 3, 11, 12, 13, 40, 800):  # groups of rows of every size, and more rows than a task's
        x = draw((num, ins), dtype, seed=num)
        wanted, bound = exact(x, weight)
        assert (np.abs(np.asarray(linear(x, panels)) - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_among_any_others(dtype: str) -> None:
    panels = to_panels(draw((2, 96, 130), dtype))
    x = draw((900, 130), dtype, seed=1)
    whole, gated = np.asarray(linear(x, panels)), np.asarray(gated_linear(x, panels))
    for num in (*range(1, 30), 383, 385):
        for start in (0, 7):
            part = x[start : start + num]
            np.testing.assert_array_equal(linear(part, panels), whole[start : start + num])
            np.testing.assert_array_equal(gated_linear(part, panels), gated[start : start + num])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_products_are_right(dtype: str) -> None:
    weight = draw((2, 64, 130), dtype)
    x = draw((29, 130), dtype, seed=1)
    (gate, gate_bound), (up, up_bound) = (exact(x, weight[half]) for half in (0, 1))
    wanted = gate / (1 + np.exp(-gate)) * up
    # silu's slope is at most 1.1; exp and the division add 8 units in the last place, and the result is rounded.
    bound = 1.1 * gate_bound * (np.abs(up) + up_bound) + np.abs(gate) * up_bound
    bound += (8 * 2.0**-24 + UNITS[dtype]) * (np.abs(wanted) + bound)
    found = np.asarray(gated_linear(x, to_panels(weight))).astype(np.float64)
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_pass_through_silu(dtype: str) -> None:
    """exp neither overflows nor gives NaN; NaN stays NaN, in its own row."""
    weight = jnp.concatenate([jnp.eye(32), jnp.eye(32)]).reshape(2, 32, 32).astype(dtype)
    x = np.zeros((4, 32), np.float32)
    x[0, :6] = [100.0, -100.0, 88.0, -88.0, 0.0, -1e4]
    x[2] = np.nan
    found = np.asarray(gated_linear(jnp.asarray(x).astype(dtype), to_panels(weight))).astype(np.float32)
    wanted = np.asarray(jax.nn.silu(jnp.asarray(x)) * x)
    np.testing.assert_allclose(found[[0, 1, 3]], wanted[[0, 1, 3]], rtol=2 * UNITS[dtype] + 1e-6, atol=1e-30)
    assert np.isnan(found[2]).all()


def test_rows_without_a_token_are_left() -> None:
    panels, x = to_panels(draw((2, 32, 64), "bfloat16")), draw((20, 64), "bfloat16").at[9:].set(jnp.nan)
    for num, call in product((0, 1, 9, 20, 99, -3), (linear, gated_linear)):
        found = np.asarray(jax.jit(call)(x, panels, jnp.full((1,), num, jnp.int32))).astype(np.float32)
        kept = min(max(num, 0), 20)
        np.testing.assert_array_equal(found[:kept], np.asarray(call(x, panels)).astype(np.float32)[:kept])
        as_reference = np.asarray(call(x[:9], panels, jnp.full((1,), num, jnp.int32), backend="reference"))
        # Of 64 products of two numbers around 1, whose sums err by 2^-18; gated ones are rounded twice to bfloat16.
        np.testing.assert_allclose(as_reference.astype(np.float32)[:kept], found[:9][:kept], rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_hold_the_matrix(dtype: str) -> None:
    for shape, num_in_axes in (((100, 64), 1), ((2, 3, 5, 64), 1), ((40, 3, 2, 8), 3)):
        weight = draw(shape, dtype)
        panels = to_panels(weight, num_in_axes=num_in_axes)
        assert panels.shape == shape
        np.testing.assert_array_equal(to_matrix(panels), weight)
    rows = jnp.asarray([39, 0, 32, 31], jnp.int32)
    for backend in ("cpu", "reference"):
        np.testing.assert_array_equal(take_rows(panels, rows, backend=backend), weight[rows].astype(jnp.float32))
    for num in (0, 3, 4, 99, -1):
        kept = min(max(num, 0), 4)
        found = take_rows(panels, rows, jnp.full((1,), num, jnp.int32))
        np.testing.assert_array_equal(found[:kept], weight[rows[:kept]].astype(jnp.float32))
    outside = take_rows(panels, jnp.asarray([-5, 2**31 - 1], jnp.int32))  # clamped: nothing past the matrix is read
    np.testing.assert_array_equal(outside[0], weight[0].astype(jnp.float32))


def test_what_does_not_fit_is_refused() -> None:
    panels = to_panels(draw((33, 64), "bfloat16"))
    for x, why in (
        (draw((3, 62), "bfloat16"), r"x is bfloat16\[3, 62\]: the weight takes bfloat16\['tokens', 64\]"),
        (draw((3, 64), "float32"), "x is float32"),
        (draw((0, 64), "bfloat16"), "x holds no token: one at least"),
    ):
        with pytest.raises(ValueError, match=why):
            linear(x, panels)
    with pytest.raises(ValueError, match="backend is 'tpu': it must be cpu or reference"):
        linear(draw((3, 64), "bfloat16"), panels, backend="tpu")
    assert not can_gate(panels.outs)
    with pytest.raises(ValueError, match=r"outputs \(33,\): they must be \(2, a multiple of 32\)"):
        gated_linear(draw((3, 64), "bfloat16"), panels)
    with pytest.raises(ValueError, match=r"outputs \(2, 32\): rows are taken along one axis"):
        take_rows(to_panels(draw((2, 32, 8), "float32")), jnp.zeros(1, jnp.int32))
    assert uncovered_matrix((3,), (7,), "float32") is None
    with pytest.raises(ValueError, match="a product has 7 inputs: in bfloat16 the CPU's kernels take an even number"):
        to_panels(draw((3, 7), "bfloat16"))
    with pytest.raises(ValueError, match="weights are float16: the CPU's kernels have bfloat16, float32"):
        to_panels(draw((3, 8), "float16"))


def test_panels_of_another_shape_are_an_error_and_no_read_past_them() -> None:
    panels = to_panels(draw((64, 64), "float32"))
    wrong = PanelMatrix(panels.panels[:1], (64,), (64,))
    with pytest.raises(jax.errors.JaxRuntimeError, match="weights are not in the panels"):
        linear(draw((3, 64), "float32"), wrong)
