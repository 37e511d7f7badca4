"""Whether the CPU's kernels are right on this machine: a compiler, or a processor, that nobody has tried may err.

The oracle is numpy, in float64: the plain references would take XLA two seconds to compile at a first start.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import FLOAT_DTYPES
from pallas_kernels.linear.api import gated_linear, linear, to_panels
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention

# Of the largest sum of magnitudes. A float32 chain over 130 numbers errs by 2^-17 of it at most; what is rounded to
# bfloat16, a softmax weight or a result, errs by 2^-8.
_ALLOWED = 2.0**-15
_ALLOWED_ROUNDED = {"float32": _ALLOWED, "bfloat16": 2.0**-7}
_NUM_TOKENS, _NUM_INS, _NUM_OUTS = 14, 130, 64  # groups of rows of several sizes, and several panels
_BLOCK_SIZE, _HEAD_DIM, _NUM_HEADS, _NUM_KV_HEADS = 16, 34, 6, 2
_SCALE = _HEAD_DIM**-0.5
_LENGTHS, _BEGINS = (70, 1, 135), (0, 1, 2, 9)  # of keys, and where queries begin: two decode, one is a chunk
_TABLES = ((7, 3, 12, 1, 9, 0, 0, 0, 0), (4, 0, 0, 0, 0, 0, 0, 0, 0), (15, 2, 11, 5, 14, 6, 8, 13, 10))


def kernels_error() -> str | None:
    """What is wrong with them, as a sentence; None if nothing is. They must be callable."""
    for dtype in FLOAT_DTYPES:
        for name, found, wanted, allowed in (*_products(dtype), _attention(dtype)):
            off = float(np.abs(np.asarray(found).astype(np.float64) - wanted).max())
            if not off <= allowed:
                return f"the CPU's {name} in {dtype} are off by {off:.3g}, where {allowed:.3g} is allowed"
    return None


def _products(dtype: str) -> list[tuple[str, jax.Array, np.ndarray, float]]:
    """(what, what came out, what should, how far it may be off), plain and gated."""
    x, weight = _values((_NUM_TOKENS, _NUM_INS), dtype), _values((2, _NUM_OUTS, _NUM_INS), dtype)
    panels = to_panels(weight)
    x64, gate, up = (np.asarray(array).astype(np.float64) for array in (x, *weight))
    wanted = np.stack([x64 @ gate.T, x64 @ up.T], axis=1)
    gated = wanted[:, 0] / (1 + np.exp(-wanted[:, 0])) * wanted[:, 1]
    magnitude = float((np.abs(x64) @ np.abs(gate).T).max())
    return [
        ("products", linear(x, panels), wanted, _ALLOWED * magnitude),
        ("gated products", gated_linear(x, panels), gated, _ALLOWED_ROUNDED[dtype] * float(np.abs(gated).max())),
    ]


def _attention(dtype: str) -> tuple[str, jax.Array, np.ndarray, float]:
    """In blocks out of order; NaN in the null block, which is nobody's. No value is above 1."""
    num_blocks = 1 + max(map(max, _TABLES))
    pool = _values((num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, 2 * _HEAD_DIM), dtype).at[0].set(jnp.nan)
    q = _values((_BEGINS[-1], _NUM_HEADS, _HEAD_DIM), dtype)
    ints = (jnp.asarray(values, jnp.int32) for values in (_TABLES, _LENGTHS, _BEGINS, [len(_LENGTHS)], [2]))
    found = ragged_paged_attention(q, pool, *ints, scale=_SCALE, backend="cpu")
    q64, pool64 = np.asarray(q).astype(np.float64), np.asarray(pool).astype(np.float64)
    wanted = np.zeros(q.shape)
    for table, length, begin, end in zip(_TABLES, _LENGTHS, _BEGINS, _BEGINS[1:], strict=False):
        kv = pool64[list(table)].reshape(-1, *pool.shape[2:])[:length]
        for token in range(begin, end):
            seen = kv[: length - (end - 1 - token)]
            for head in range(_NUM_HEADS):
                keys, values = np.split(seen[:, head * _NUM_KV_HEADS // _NUM_HEADS], 2, axis=-1)
                weights = np.exp(keys @ q64[token, head] * _SCALE)
                wanted[token, head] = weights @ values / weights.sum()
    return "attention", found, wanted, _ALLOWED_ROUNDED[dtype]


def _values(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Numbers in [-1, 1] without a pattern that a wrong order would keep."""
    return jnp.asarray(np.sin(np.arange(math.prod(shape)) ** 1.5).reshape(shape), dtype)
