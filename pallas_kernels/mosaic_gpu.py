"""How the GPU kernels are spelled: Mosaic GPU over jax 0.10.2 to 0.12, compiled for Hopper or interpreted on a CPU.

The compiler wants a layout for every array in registers and matrix products on the tensor cores; the interpreter
knows neither register layouts (0.10.2) nor products whose left side lies in registers (any), so it gets the same
values by plain jax operations. Everything else of a kernel (copies, barriers, loops, stores) is the same code for both.
Parameters are explicit throughout, since jax's defaults differ: the lowering semantics are Lane in 0.10.2 and
Warpgroup since 0.11.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a wgmma's left side and result: one warpgroup
SWIZZLE_BYTES = 128  # the widest pattern by which TMA and wgmma spread a tile's rows over the banks
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # 0.10.2
_STORES_BY_SWAP = not hasattr(plgpu, "store")  # 0.10.2

type_of = jax.ShapeDtypeStruct


def call(
    body: Callable[..., None],
    operands: Sequence[Any],
    *,
    out_type: Sequence[Any] = (),
    scratch: Sequence[Any] = (),
    num_ctas: int,
    warpgroups: int,
    interpret: Any,
    name: str,
) -> Any:
    """Runs body(*operand refs, *output refs, *scratch refs) in `num_ctas` CTAs of `warpgroups` warpgroups each.

    The body finds itself by `lax.axis_index("cta")` and `lax.axis_index("warpgroup")`. An operand that is a
    `jax.new_ref` (see `in_place`) is written in place. Scratch is shared by a CTA's warpgroups.
    """

    def entry(*refs: Any) -> None:
        def scoped(*scratch_refs: Any) -> None:
            body(*refs, *scratch_refs)

        pl.run_scoped(scoped, *scratch, collective_axes="warpgroup")

    kernel = pl.kernel(
        entry,
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(grid=(num_ctas,), grid_names=("cta",), num_threads=warpgroups, thread_name="warpgroup"),
        compiler_params=plgpu.CompilerParams(
            approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=False
        ),
        interpret=interpreter(interpret) or False,
        name=name,
    )
    return kernel(*operands)


def in_place(array: jax.Array) -> Any:
    """A reference to `array` in device memory, which a kernel writes to; `jax.freeze` gives the array back."""
    return jax.new_ref(array, memory_space=plgpu.GMEM)


def interpreter(interpret: Any) -> Any:
    """The interpreter's parameters for True, None for False, and parameters as they are."""
    if interpret is True:
        return interpreter_params()
    return interpret or None


def interpreter_params(**options: Any) -> Any:
    """`InterpretGPUParams`, from where this jax keeps it."""
    try:
        kind = plgpu.InterpretGPUParams
    except AttributeError:  # 0.10.2
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as kind
    return kind(**options)


def tiled(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory [..., rows, columns] in the tiled, swizzled order that TMA fills and wgmma reads."""
    width = jnp.dtype(dtype).itemsize
    swizzle = min(SWIZZLE_BYTES, shape[-1] * width)
    transforms = (plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


class Registers(NamedTuple):
    """Operations on arrays in a warpgroup's registers.

    A matrix [64 a, 8 b] lies there as wgmma leaves its result, a vector [64 a] as such a matrix's rows reduced.

    Attributes:
        interpreted: whether the interpreter runs them; it knows no layouts.
    """

    interpreted: bool

    def place(self, array: jax.Array) -> jax.Array:
        """`array` in the layout of its rank."""
        if self.interpreted:
            return array
        layout = plgpu.Layout.WGMMA if array.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
        return plgpu.layout_cast(array, layout)

    def full(self, shape: tuple[int, ...], value: float | jax.Array) -> jax.Array:
        return self.place(jnp.full(shape, value, jnp.float32))

    def load(self, ref: Any) -> jax.Array:
        """A whole reference, in device or shared memory, element by element where there is no faster way."""
        if self.interpreted:
            return ref[...]
        index = ((),) if _LOAD_TAKES_INDEX else ()
        return self.place(plgpu.load(ref, *index, optimized=False))

    def store(self, ref: Any, array: jax.Array) -> None:
        """The whole of a reference, element by element where there is no faster way."""
        if self.interpreted or _STORES_BY_SWAP:
            ref[...] = array
        else:
            plgpu.store(ref, array, optimized=False)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        return self.place(lax.broadcasted_iota(jnp.int32, shape, axis))

    def across(self, vector: jax.Array, columns: int) -> jax.Array:
        """[rows] to [rows, columns]."""
        return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))

    def product(self, shape: tuple[int, int], factors: Iterable[tuple[Any, Any]]) -> jax.Array:
        """The sum, in float32 and in order, of left @ right over pairs of a bfloat16 left and right side.

        A left side is shared memory or an array in registers, a right side shared memory. Pairs are taken one by
        one, so that an iterator may wait for the next pair's data while products before it run.
        """
        if self.interpreted:
            total = jnp.zeros(shape, jnp.float32)
            for left, right in factors:
                total += _interpreted_product(left, right)
            return total

        def accumulate(sum_ref: Any) -> jax.Array:
            for left, right in factors:
                plgpu.wgmma(sum_ref, left, right.ref.transpose((1, 0)) if isinstance(right, Transposed) else right)
            return sum_ref[...]

        return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


class Transposed(NamedTuple):
    """A right side that is the transpose of what lies in shared memory."""

    ref: Any


def _interpreted_product(left: Any, right: Any) -> jax.Array:
    contracted = 1 if isinstance(right, Transposed) else 0
    right = right.ref[...] if isinstance(right, Transposed) else right[...]
    left = left if isinstance(left, jax.Array) else left[...]
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return lax.dot_general(left, right, (((1,), (contracted,)), ((), ())), precision="highest")


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly, for whole numbers up to 0 held as float32; 0 below 2^-126."""
    biased = lax.convert_element_type(lax.max(exponent, jnp.full_like(exponent, -127.0)), jnp.int32) + 127
    return lax.bitcast_convert_type(lax.shift_left(biased, jnp.full_like(biased, 23)), jnp.float32)


def bfloat16_terms(array: jax.Array, count: int) -> Iterator[jax.Array]:
    """`count` bfloat16 arrays whose sum is `array`: three hold all 24 bits of a float32."""
    for _ in range(count - 1):
        term = array.astype(jnp.bfloat16)
        yield term
        array = array - term.astype(jnp.float32)
    yield array.astype(jnp.bfloat16)


def loop(start: Any, end: Any, body: Callable[..., Any], carry: Any) -> Any:
    """`lax.fori_loop` over int32 bounds."""
    return lax.fori_loop(jnp.int32(start), jnp.int32(end), body, carry)


def divide(number: Any, by: int) -> jax.Array:
    """The quotient of a number that is not negative."""
    return lax.div(jnp.int32(number), jnp.int32(by))


def divide_up(number: Any, by: int) -> jax.Array:
    return lax.div(jnp.int32(number) + jnp.int32(by - 1), jnp.int32(by))


def remainder(number: Any, by: int) -> jax.Array:
    return lax.rem(jnp.int32(number), jnp.int32(by))
