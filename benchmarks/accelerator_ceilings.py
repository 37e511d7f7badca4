"""The ceilings of this very device: what copies, reads and matrix products reach, with nothing else running.

* copy: `a -> b`, `b -> a`, ... between two arrays, each written into memory that the call is given; bytes read and
  bytes written count. The faster of a plain copy and of an elementwise kernel (x xor 1): a ceiling that is too low
  would flatter every share.
* read: the sum of an array's words; bytes read count. Two arrays in turn.
* matrix product: [8192, 8192] x [8192, 8192] in bfloat16 with float32 sums, two pairs in turn.

Arrays are far larger than any cache (2 GiB; the H200's L2 has 60 MB) and random: a product of zeros runs faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.accelerator_jobs import Sink
from benchmarks.accelerator_timing import Timing, memory_bytes, random_values, time_calls


def run(sink: Sink, *, quick: bool, seed: int) -> None:
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    for name, value in (
        ("platform", device.platform),
        ("kind", device.device_kind),
        ("num_devices", jax.device_count()),
        ("memory_bytes", memory_bytes()),
        ("client", str(getattr(device.client, "platform_version", ""))),
    ):
        sink.fact(name, value)
    small = quick or on_cpu
    num_bytes = 2**26 if on_cpu else 2**29 if small else 2**31
    width = 512 if on_cpu else 8192
    rounds = 3 if small else 7
    copies = {name: _copy(num_bytes, seed, form, rounds) for name, form in (("plain", _same), ("kernel", _flip))}
    name, copy = min(copies.items(), key=lambda item: item[1].seconds)
    bytes_s = 2 * num_bytes / copy.seconds
    sink.fact("copy_bytes_s", bytes_s)
    sink.add(f"copy bandwidth ({name})", bytes_s / 1e9, "GB/s")
    sink.add("copy bandwidth: spread", copy.spread, "%")
    read = _read(num_bytes, seed, rounds)
    sink.fact("read_bytes_s", num_bytes / read.seconds)
    sink.add("read bandwidth", num_bytes / read.seconds / 1e9, "GB/s")
    product = _product(width, seed, rounds)
    flops_s = 2 * width**3 / product.seconds
    sink.fact("flops_s", flops_s)
    sink.add(f"matrix peak, bfloat16, {width}³", flops_s / 1e12, "TFLOP/s")
    sink.add("matrix peak: spread", product.spread, "%")


def _same(source: jax.Array) -> jax.Array:
    return jnp.copy(source)


def _flip(source: jax.Array) -> jax.Array:
    return source ^ jnp.uint32(1)


def _copy(num_bytes: int, seed: int, form: Callable[[jax.Array], jax.Array], rounds: int) -> Timing:
    """`form` of one array into the memory of another, back and forth."""

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def into(target: jax.Array, source: jax.Array) -> jax.Array:
        return form(source)

    shape = (num_bytes // 4096, 1024)
    arrays = [random_values(seed + i, shape, jnp.float32).view(jnp.uint32) for i in range(2)]

    def call(index: int) -> jax.Array:
        arrays[0], arrays[1] = arrays[1], into(arrays[0], arrays[1])
        return arrays[1]

    return time_calls(call, rounds=rounds)


def _read(num_bytes: int, seed: int, rounds: int) -> Timing:
    arrays = [random_values(seed + i, (num_bytes // 4096, 1024), jnp.float32).view(jnp.uint32) for i in range(2)]
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.uint32))
    return time_calls(lambda index: total(arrays[index % 2]), rounds=rounds)


def _product(width: int, seed: int, rounds: int) -> Timing:
    pairs = [[random_values(seed + 2 * i + j, (width, width), jnp.bfloat16) for j in range(2)] for i in range(2)]
    dims = (((1,), (0,)), ((), ()))

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    return time_calls(lambda index: product(*pairs[index % 2]), rounds=rounds)
