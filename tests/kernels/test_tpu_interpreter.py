"""That the checks of the TPU kernels' tests can fail: a planted race, a planted NaN, a planted read out of bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.tpu_interpreter import CHECKED, run_checked


def copy_of(x: jax.Array, *, waits: bool, at: int = 0) -> jax.Array:
    def kernel(at_ref, x_ref, out_ref, buffer, semaphore):  # i32[1], f32[16, 128] in HBM, f32[8, 128] twice
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(at_ref[0], 8)], buffer, semaphore)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = buffer[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        interpret=CHECKED,
    )(jnp.full((1,), at, jnp.int32), x)


X = jnp.arange(16.0 * 128).reshape(16, 128)


def test_a_kernel_that_waits_passes():
    np.testing.assert_array_equal(run_checked(copy_of, X, waits=True, at=3), X[3:11])


def test_a_read_before_the_wait_is_found():
    with pytest.raises(Exception, match=r"(?i)race"):
        run_checked(copy_of, X, waits=False)


def test_a_copy_from_past_the_end_is_found():
    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        run_checked(copy_of, X, waits=True, at=9)


def test_a_call_without_a_kernel_is_found():
    with pytest.raises(AssertionError, match="no kernel ran in the interpreter"):
        run_checked(lambda: X)
