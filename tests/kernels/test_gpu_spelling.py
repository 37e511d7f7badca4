"""What the GPU kernels rest on: exact powers of two, and exact terms of a float32."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_gpu import bfloat16_terms, power_of_two


def test_powers_of_two_are_exact_and_end_in_zero():
    exponents = np.asarray([0, -1, -2, -23, -24, -125, -126, -127, -128, -1000, -(2.0**100), -np.inf], np.float32)
    expected = np.where(exponents >= -126, np.exp2(exponents.astype(np.float64)), 0.0)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponents)), expected)


def test_three_terms_hold_a_float32_and_one_what_fits_it():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(4096).astype(np.float32) * np.exp2(rng.integers(-60, 60, 4096)).astype(np.float32)
    terms = [np.asarray(term.astype(jnp.float32), np.float64) for term in bfloat16_terms(jnp.asarray(values), 3)]
    np.testing.assert_array_equal(sum(terms), values)
    for wider, narrower in itertools.pairwise(terms):
        assert (np.abs(narrower) <= np.abs(wider) * 2.0**-8).all()
    fp8 = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    (only,) = bfloat16_terms(jnp.asarray(fp8).astype(jnp.float32), 1)
    np.testing.assert_array_equal(only.astype(jnp.float32), fp8.astype(np.float32))
