"""How the GPU kernels are spelled: Mosaic GPU over jax 0.10.2 to 0.12, compiled for a GPU or interpreted on a CPU.

The compiler wants a layout for every array in registers and matrix products on the tensor cores; the interpreter
knows neither register layouts (0.10.2) nor products whose left side lies in registers (any), so it gets the same
values by plain jax operations. Nor does it know copies without the copy engine. Everything else of a kernel (barriers,
loops, stores, the engine's copies) is the same code for both.
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

from pallas_kernels.gpu_generations import Generation

ROWS = 64  # of a product's left side and result: one warpgroup
SWIZZLE_BYTES = 128  # the widest pattern by which TMA and wgmma spread a tile's rows over the banks
PIECE = 64  # columns that fill such a pattern in bfloat16; what kernels take of a tile at once
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # 0.10.2
_STORES_BY_SWAP = not hasattr(plgpu, "store")  # 0.10.2

_api: Any = plgpu  # what some version lacks, or types as abstract
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
        kind = _api.InterpretGPUParams
    except AttributeError:  # 0.10.2
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as kind
    return kind(**options)


def tiled(shape: Sequence[int], dtype: Any, widest: int = SWIZZLE_BYTES) -> Any:
    """Shared memory [..., rows, columns] in the tiled, swizzled order that copies fill and products read.

    It can be read and written 64 columns at a time.

    Args:
        widest: bytes of a row that a pattern may span.
    """
    width = jnp.dtype(dtype).itemsize
    swizzle = min(widest, PIECE * width)
    transforms = (_api.TilingTransform((8, swizzle // width)), _api.SwizzleTransform(swizzle))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


class Registers(NamedTuple):
    """Operations on arrays in a warpgroup's registers.

    A matrix [64 a, 8 b] lies there as wgmma and mma leave a result, a vector [64 a] as such a matrix's rows reduced.

    Attributes:
        interpreted: whether the interpreter runs them; it knows no layouts.
        generation: whose instructions they become.
    """

    interpreted: bool
    generation: Generation

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
            _api.store(ref, array, optimized=False)

    def commit(self) -> None:
        """Has what the warpgroup wrote to shared memory seen by the copy engine and by wgmma. Loads need none."""
        if self.generation.has_tma:
            plgpu.commit_smem()

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
            self.commit()  # wgmma reads as TMA writes, by the async proxy: plain reads must be ordered with it
            return total
        if not self.generation.has_wgmma:
            total = self.full(shape, 0.0)
            for left, right in factors:
                total = _api.mma(total, _mma_left(left), _mma_right(right))
            return total

        def accumulate(sum_ref: Any) -> jax.Array:
            for left, right in factors:
                plgpu.wgmma(sum_ref, left, _stored(right))
            return sum_ref[...]

        return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


class Transposed(NamedTuple):
    """A right side that is the transpose of what lies in shared memory."""

    ref: Any


def _stored(right: Any) -> Any:
    """A right side as a reference to [contracted, columns]."""
    return right.ref.transpose((1, 0)) if isinstance(right, Transposed) else right


def _mma_right(right: Any) -> jax.Array:
    return plgpu.layout_cast(_api.load(_stored(right)), _api.Layout.MMA_RHS(jnp.bfloat16))


def _mma_left(left: Any) -> jax.Array:
    """A left side where mma takes it from.

    A thread's numbers of two results side by side, [64, 8] each, are those it needs of a left side [64, 16], in this
    order: nothing moves, but Mosaic has no cast of layouts that says so.
    """
    layout = _api.Layout.MMA_LHS(jnp.bfloat16)
    if not isinstance(left, jax.Array):
        return plgpu.layout_cast(_api.load(left), layout)

    @_api.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=_api.ShapeDtypeStruct(left.shape, left.dtype, layout=layout)
    )
    def relabelled(context: Any, array: Any) -> Any:
        target = layout.to_mgpu()
        registers = array.registers.reshape(target.registers_shape(array.shape))
        return type(array)(_registers=registers, _layout=target, _is_signed=array.is_signed)

    return relabelled(left)


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
