"""What the GPU kernels rest on: exact powers of two, exact terms of a float32, and devices named when refused."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import bfloat16_terms, power_of_two, uncovered_device
from pallas_kernels.mosaic_gpu_move import move


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


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"platform": "gpu", "compute_capability": "8.0"}, "compute capability is 8.0: the kernels use wgmma"),
        (
            {"platform": "cuda", "compute_capability": "10.0"},
            "compute capability is 10.0: .* only 9.0 \\(H100, H200\\)",
        ),
        ({"platform": "gpu"}, "compute capability is unknown"),
        ({"platform": "cpu"}, "the device is cpu: the kernels are for NVIDIA GPUs of compute capability 9.0"),
    ],
)
def test_other_devices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, device: dict[str, str], message: str):
    found = SimpleNamespace(**device)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [found])
    ids = jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="block_copy: " + message):
        move(jnp.zeros((2, 128)), None, ids, ids + 1, interpret=False, name="block_copy")
    assert uncovered_device(found) is not None


def test_a_hopper_is_not_refused():
    assert uncovered_device(SimpleNamespace(platform="gpu", compute_capability="9.0")) is None
