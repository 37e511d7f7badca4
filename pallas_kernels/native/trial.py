"""Whether the CPU's kernels are right on this machine: a compiler, or a processor, that nobody has tried may err.

The oracle is numpy, in float64: the plain references would take XLA two seconds to compile at a first start.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import FLOAT_DTYPES
from pallas_kernels.linear.api import gated_linear, linear, take_rows, to_panels
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.rms_norm.api import add_rms_norm
from pallas_kernels.rope_write.api import rope_write

# Of the largest sum of magnitudes. A float32 chain over 130 numbers errs by 2^-17 of it at most; what is rounded to
# bfloat16, a softmax weight or a result, errs by 2^-8.
_ALLOWED = 2.0**-15
_ALLOWED_ROUNDED = {"float32": _ALLOWED, "bfloat16": 2.0**-7}
_NUM_TOKENS, _NUM_INS, _NUM_OUTS = 14, 130, 64  # groups of rows of several sizes, and several panels
_BLOCK_SIZE, _HEAD_DIM, _NUM_HEADS, _NUM_KV_HEADS = 16, 34, 6, 2
_SCALE = _HEAD_DIM**-0.5
_LENGTHS, _BEGINS = (70, 1, 135), (0, 1, 2, 9)  # of keys, and where queries begin: two decode, one is a chunk
_TABLES = ((7, 3, 12, 1, 9, 0, 0, 0, 0), (4, 0, 0, 0, 0, 0, 0, 0, 0), (15, 2, 11, 5, 14, 6, 8, 13, 10))
_SLOTS = (40, 41, 3, 100, 17, 90, 200, 60, 77)  # where the same tokens' keys and values go
_EPS = 1e-5

_Numbers = dict[str, np.ndarray]


def kernels_error() -> str | None:
    """What is wrong with them, as a sentence; None if nothing is. They must be callable."""
    for dtype in FLOAT_DTYPES:
        given = _given(dtype)
        # One program of all kernels: each by itself would take XLA a tenth of a second.
        found = jax.jit(lambda given, dtype=dtype: _run(given, dtype))(given)
        exact = {name: np.asarray(array).astype(np.float64) for name, array in given.items()}
        for name, (wanted, allowed) in _wanted(exact, dtype).items():
            off = float(np.abs(np.asarray(found[name]).astype(np.float64) - wanted).max())
            if not off <= allowed:
                return f"the CPU's {name} in {dtype} are off by {off:.3g}, where {allowed:.3g} is allowed"
    return None


def _given(dtype: str) -> _Numbers:
    num_blocks, num_tokens = 1 + max(map(max, _TABLES)), _BEGINS[-1]
    pool = _values((num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, 2 * _HEAD_DIM), dtype)
    pool[0] = np.nan  # the null block, which is nobody's
    angles = 3 * _values((num_tokens, _HEAD_DIM // 2), "float32")
    return {
        "x": _values((_NUM_TOKENS, _NUM_INS), dtype),
        "weight": _values((2, _NUM_OUTS, _NUM_INS), dtype),
        "pool": pool,
        "q": _values((num_tokens, _NUM_HEADS, _HEAD_DIM), dtype),
        "qkv": _values((num_tokens, _NUM_KV_HEADS, _NUM_HEADS // _NUM_KV_HEADS + 2, _HEAD_DIM), "float32"),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "norm": _values((_HEAD_DIM,), dtype),
    }


def _run(given: dict[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
    """Every kernel once. Attention in blocks out of order."""
    x, panels = given["x"], to_panels(given["weight"])
    ints = (jnp.asarray(values, jnp.int32) for values in (_TABLES, _LENGTHS, _BEGINS, [len(_LENGTHS)], [2]))
    all_of = lambda array: jnp.full((1,), len(array), jnp.int32)  # noqa: E731
    rows = take_rows(to_panels(given["weight"][0]), jnp.arange(_NUM_TOKENS, dtype=jnp.int32))
    turned, written = rope_write(
        given["qkv"],
        given["cos"],
        given["sin"],
        given["pool"],
        jnp.asarray(_SLOTS, jnp.int32),
        all_of(given["qkv"]),
        dtype=dtype,
        scale=_SCALE,
        eps=_EPS,
        q_norm=given["norm"],
        k_norm=given["norm"],
    )
    total, normed = add_rms_norm(
        rows, x.astype(jnp.float32), given["weight"][1, 0], all_of(rows), eps=_EPS, dtype=jnp.dtype(dtype)
    )
    return {
        "products": linear(x, panels),
        "gated products": gated_linear(x, panels),
        "attention's results": ragged_paged_attention(given["q"], given["pool"], *ints, scale=_SCALE, backend="cpu"),
        "sums": total,
        "norms": normed,
        "queries": turned,
        "written keys and values": written.reshape(-1, *written.shape[2:])[jnp.asarray(_SLOTS)],
    }


def _wanted(given: _Numbers, dtype: str) -> dict[str, tuple[np.ndarray, float]]:
    """What should come out, and how far it may be off. No number that is given is above 1."""
    x, (gate, up), rounded = given["x"], given["weight"], _ALLOWED_ROUNDED[dtype]
    products = np.stack([x @ gate.T, x @ up.T], axis=1)
    gated = products[:, 0] / (1 + np.exp(-products[:, 0])) * products[:, 1]
    total = gate[:_NUM_TOKENS] + x
    normed = _normed(total, up[0])
    heads, weight = given["qkv"], given["norm"]
    q, k = (_turned(_normed(part, weight), given) for part in (heads[:, :, :-2], heads[:, :, -2]))
    kv = np.concatenate([k, heads[:, :, -1]], axis=-1)
    return {
        "products": (products, _ALLOWED * float((np.abs(x) @ np.abs(gate).T).max())),
        "gated products": (gated, rounded * float(np.abs(gated).max())),
        "attention's results": (_attention(given), rounded),
        "sums": (total, _ALLOWED),
        "norms": (normed, rounded * float(np.abs(normed).max())),
        "queries": (q * _SCALE, rounded * float(np.abs(q).max())),
        "written keys and values": (kv, rounded * float(np.abs(kv).max())),
    }


def _normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + _EPS) * weight


def _turned(x: np.ndarray, given: _Numbers) -> np.ndarray:
    low, high = np.split(x, 2, axis=-1)
    cos, sin = (given[name].reshape(len(x), *[1] * (x.ndim - 2), -1) for name in ("cos", "sin"))
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _attention(given: _Numbers) -> np.ndarray:
    q, pool = given["q"], given["pool"]
    wanted = np.zeros(q.shape)
    for table, length, begin, end in zip(_TABLES, _LENGTHS, _BEGINS, _BEGINS[1:], strict=False):
        kv = pool[list(table)].reshape(-1, *pool.shape[2:])[:length]
        for token in range(begin, end):
            seen = kv[: length - (end - 1 - token)]
            for head in range(_NUM_HEADS):
                keys, values = np.split(seen[:, head * _NUM_KV_HEADS // _NUM_HEADS], 2, axis=-1)
                weights = np.exp(keys @ q[token, head] * _SCALE)
                wanted[token, head] = weights @ values / weights.sum()
    return wanted


def _values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers in [-1, 1] without a pattern that a wrong order would keep."""
    return np.sin(np.arange(math.prod(shape)) ** 1.5).reshape(shape).astype(jnp.dtype(dtype))
