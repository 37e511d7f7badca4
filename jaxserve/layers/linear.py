"""Matrix products over weights `[out, in]`, or over the same in a CPU kernel's panels."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear.api import PanelMatrix
from pallas_kernels.linear.api import linear as panel_linear

# XLA:CPU sums a float32 product in one and the same order where its columns are a multiple of this: 536 combinations of
# sizes, jax 0.10.2 and 0.12.
_COLUMNS = 64


def linear(
    x: Float[Array, "tokens ..."],
    weight: Float[Array, "..."] | PanelMatrix,
    bias: Float[Array, "..."] | None = None,
    *,
    num_in_axes: int = 1,
    num_tokens: Int[Array, "1"] | None = None,
) -> Float[Array, "tokens ..."]:
    """x @ weight + bias in float32, over flattened axes.

    Args:
        x: [T, *ins]; cast to the weight's dtype before the product.
        weight: [*outs, *ins]; a `PanelMatrix` knows its own axes.
        bias: [*outs].
        num_in_axes: how many axes `ins` has.
        num_tokens: how many of the T hold a token; a kernel leaves the others, which are zeros then.

    Returns:
        float32 [T, *outs]. The accumulator is float32 in every dtype: with a 16-bit result XLA:CPU
        converts the whole weight in memory each call (37 instead of 238 GFLOP/s at 32 rows).
    """
    if isinstance(weight, PanelMatrix):
        y = panel_linear(x.reshape(len(x), *weight.ins).astype(weight.dtype), weight, num_tokens)
        return y if bias is None else y + bias.astype(jnp.float32)
    outs = weight.shape[: weight.ndim - num_in_axes]
    matrix = weight.reshape(math.prod(outs), -1)
    y = faster_form(
        x.reshape(len(x), -1).astype(weight.dtype),
        tokens_left=lambda x: _dot(x, matrix, 1),
        weights_left=lambda x: weight_left(matrix, x).T,
        weights=(matrix,),
    ).reshape(len(x), *outs)
    return y if bias is None else y + bias.astype(jnp.float32)


def faster_form(
    x: Float[Array, "tokens ..."],
    *,
    tokens_left: Callable[[jax.Array], jax.Array],
    weights_left: Callable[[jax.Array], jax.Array],
    weights: tuple[Array, ...],
) -> jax.Array:
    """Of two forms of the same products, with the tokens or with the weight as the left operand, the faster one.

    With the weight on the left, float32 products of 64 tokens and more take XLA:CPU 3 to 17 % less time, and the bits
    are the same where tokens and outputs are multiples of 64. With fewer tokens it is faster still, but sums in another
    order than programs of more tokens, which must give a token the same bits.
    """
    columns = [len(x), *(len(weight) for weight in weights)]
    if weights[0].dtype != jnp.float32 or any(number % _COLUMNS for number in columns):
        return tokens_left(x)
    return jax.lax.platform_dependent(x, cpu=weights_left, default=tokens_left)


def weight_left(weight: Float[Array, "out in"], x: Array, *, token_axis: int = 0) -> Float[Array, "out tokens"]:
    """weight @ x in float32.

    Args:
        x: [T, in], or [in, T] with a token_axis of 1.
    """
    # Without the barrier, a transposition behind it would turn it into the product with the tokens on the left.
    return jax.lax.optimization_barrier(_dot(weight, x, 1 - token_axis))


def _dot(left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
    return jax.lax.dot_general(left, right, (((1,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32)
