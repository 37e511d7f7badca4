"""`PanelMatrix`: a weight matrix in the order in which the CPU's kernel reads it, and the product with it.

XLA:CPU packs a weight anew in every product, which for few tokens takes longer than reading it: 17 ms for all products
of SmolLM2-135M at two rows in bfloat16, where this takes 10. Here a weight is packed once, when it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, name_of_dtype, require

WIDTH = 32  # columns of a panel: product.h's kWidth
_DEPTHS = {"float32": 1, "bfloat16": 2}  # numbers of a unit: product.h's kDepth


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PanelMatrix:
    """A matrix [*outs, *ins] in panels of 32 outputs.

    Attributes:
        panels: [outs / 32, ins / u, 32, u], u = 1 of float32 and 2 of bfloat16: what the kernel takes of a column at
            once. Outputs past the last are zeros.
        outs, ins: the matrix's axes.
    """

    panels: jax.Array
    outs: tuple[int, ...] = field(metadata={"static": True})
    ins: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outs + self.ins

    @property
    def dtype(self) -> jnp.dtype:
        return self.panels.dtype


def uncovered_matrix(outs: tuple[int, ...], ins: tuple[int, ...], dtype: object) -> str | None:
    """Why a matrix cannot lie in panels, as a sentence; None if it can."""
    name = name_of_dtype(dtype)
    if name not in FLOAT_DTYPES:
        return f"weights are {name}: the CPU's kernels have {', '.join(FLOAT_DTYPES)}"
    if math.prod(ins) % _DEPTHS[name]:
        return f"a product has {math.prod(ins)} inputs: in {name} the CPU's kernels take an even number"
    return None


@partial(jax.jit, static_argnames="num_in_axes")
def _panels(weight: jax.Array, num_in_axes: int) -> jax.Array:
    matrix = weight.reshape(math.prod(weight.shape[: weight.ndim - num_in_axes]), -1)
    matrix = jnp.pad(matrix, ((0, -len(matrix) % WIDTH), (0, 0)))
    depth = _DEPTHS[name_of_dtype(weight.dtype)]
    return matrix.reshape(-1, WIDTH, matrix.shape[1] // depth, depth).swapaxes(1, 2)


def to_panels(weight: jax.Array, *, num_in_axes: int = 1) -> PanelMatrix:
    """A matrix [*outs, *ins] in panels.

    Raises:
        ValueError: the kernel has nothing for it; `uncovered_matrix` tells beforehand.
    """
    outs, ins = weight.shape[: weight.ndim - num_in_axes], weight.shape[weight.ndim - num_in_axes :]
    reason = uncovered_matrix(outs, ins, weight.dtype)
    require(reason is None, str(reason))
    return PanelMatrix(_panels(weight, num_in_axes), outs, ins)


def to_matrix(weight: PanelMatrix) -> jax.Array:
    """[*outs, *ins]: what `to_panels` was given."""
    num_panels, depth, _, unit = weight.panels.shape
    matrix = weight.panels.swapaxes(1, 2).reshape(num_panels * WIDTH, depth * unit)
    return matrix[: math.prod(weight.outs)].reshape(weight.shape)


def take_rows(
    weight: PanelMatrix, ids: jax.Array, num_tokens: jax.Array | None = None, *, backend: str = "cpu"
) -> jax.Array:
    """float32 [T, *ins]: those rows of a matrix with one axis of outputs, such as an embedding that is the head too.

    Args:
        ids: i32[T].
        num_tokens: i32[1] how many of the T, at the beginning, are looked up; the others may come back as anything.
            None for all.
        backend: "cpu", after `native.build.load_kernels`, or "reference".

    Raises:
        ValueError: the matrix has several axes of outputs.
    """
    _check_backend(backend)
    require(len(weight.outs) == 1, f"the matrix has outputs {weight.outs}: rows are taken along one axis")
    if backend == "reference":
        rows = weight.panels[ids // WIDTH, :, ids % WIDTH].astype(jnp.float32)
    else:
        shape = jax.ShapeDtypeStruct((len(ids), math.prod(weight.ins)), jnp.float32)
        rows = jax.ffi.ffi_call("jaxserve_take_rows", shape)(weight.panels, ids, _all_if_none(num_tokens, ids))
    return rows.reshape(len(ids), *weight.ins)


def linear(
    x: jax.Array, weight: PanelMatrix, num_tokens: jax.Array | None = None, *, backend: str = "cpu"
) -> jax.Array:
    """x @ weight.T in float32, each sum along one chain whatever the number of tokens.

    Args:
        x: [T, *ins] of the weight's dtype.
        num_tokens: i32[1] how many of the T, at the beginning, are computed; None for all. The others may come back as
            anything: nothing is written there.
        backend: "cpu", after `native.build.load_kernels`, or "reference".

    Returns:
        float32 [T, *outs].

    Raises:
        ValueError: x does not fit the weight.
    """
    rows = _rows(x, weight, backend)
    num_outs = math.prod(weight.outs)
    if backend == "reference":
        y = _reference(rows, to_matrix(weight).reshape(num_outs, -1), num_tokens)
    else:
        call = jax.ffi.ffi_call("jaxserve_linear", jax.ShapeDtypeStruct((len(x), num_outs), jnp.float32))
        y = call(rows, weight.panels, _all_if_none(num_tokens, x))
    return y.reshape(len(x), *weight.outs)


def gated_linear(
    x: jax.Array, weight: PanelMatrix, num_tokens: jax.Array | None = None, *, backend: str = "cpu"
) -> jax.Array:
    """silu(x @ gate.T) * (x @ up.T), as `linear`; rounded to the weight's dtype, for the next product.

    Args:
        weight: outs [2, F], the gate first; F must be a multiple of 32 (`can_gate`).

    Returns:
        [T, F].

    Raises:
        ValueError: x does not fit the weight, or the weight is none of these.
    """
    rows = _rows(x, weight, backend)
    require(can_gate(weight.outs), f"the weight has outputs {weight.outs}: they must be (2, a multiple of {WIDTH})")
    width = weight.outs[1]
    if backend == "reference":
        wide = _reference(rows, to_matrix(weight).reshape(2 * width, -1), num_tokens)
        return (jax.nn.silu(wide[:, :width]) * wide[:, width:]).astype(weight.dtype)
    call = jax.ffi.ffi_call("jaxserve_gated_linear", jax.ShapeDtypeStruct((len(x), width), weight.dtype))
    return call(rows, weight.panels, _all_if_none(num_tokens, x))


def can_gate(outs: tuple[int, ...]) -> bool:
    """Whether `gated_linear` takes a matrix with these axes of outputs: two halves of whole panels."""
    return len(outs) == 2 and outs[0] == 2 and outs[1] % WIDTH == 0


def _rows(x: jax.Array, weight: PanelMatrix, backend: str) -> jax.Array:
    _check_backend(backend)
    fits = x.ndim == 1 + len(weight.ins) and x.shape[1:] == weight.ins and x.dtype == weight.dtype
    found, wanted = f"{x.dtype}{list(x.shape)}", f"{weight.dtype}{['tokens', *weight.ins]}"
    require(fits, f"x is {found}: the weight takes {wanted}")
    require(len(x) >= 1, "x holds no token: one at least")
    return x.reshape(len(x), -1)


def _check_backend(backend: str) -> None:
    require(backend in ("cpu", "reference"), f"backend is {backend!r}: it must be cpu or reference")


def _all_if_none(num_tokens: jax.Array | None, x: jax.Array) -> jax.Array:
    return jnp.full((1,), len(x), jnp.int32) if num_tokens is None else num_tokens


def _reference(rows: jax.Array, matrix: jax.Array, num_tokens: jax.Array | None) -> jax.Array:
    y = jnp.matmul(rows, matrix.T, preferred_element_type=jnp.float32)
    return y if num_tokens is None else jnp.where(jnp.arange(len(rows))[:, None] < num_tokens, y, 0.0)
