"""The one decoder: every supported family is this function under a different `ModelConfig`.

It works on a ragged stream of tokens and does not know where keys and values are kept: `attend` does
(paged in `steps.py`, dense in training). The residual stream is float32; matrix products take the
weights' dtype and accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.config import ModelConfig
from jaxserve.layers.linear import faster_form, linear, weight_left
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import apply_rope, rope_tables
from jaxserve.models.params import are_stacked
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from pallas_kernels.linear.api import PanelMatrix, can_gate, gated_linear, take_rows

Params = dict[str, Any]


class OneOf(NamedTuple):
    """A layer's cache where one thing holds those of all layers.

    Attributes:
        caches: what holds them.
        layer: which is meant.
    """

    caches: Any
    layer: Int[Array, ""]


# (the layer's window, its cache, q [T, K, G, H] already scaled, k and v [T, K, H]) -> (out [T, K, G, H], cache)
Attend = Callable[[int | None, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def forward(
    params: Params,
    kv: tuple[Any, ...],
    tokens: Int[Array, " tokens"],
    positions: Int[Array, " tokens"],
    attend: Attend,
    config: ModelConfig,
    *,
    max_model_len: int | None = None,
    num_tokens: Int[Array, "1"] | None = None,
    axis: Axis = ONE_DEVICE,
) -> tuple[Float[Array, "tokens hidden"], tuple[Any, ...]]:
    """Hidden states after the final norm, and the caches as `attend` left them.

    Stacked layers run in a loop, so that a program is no larger for having more of them; then all have one window.

    Args:
        params: the tree of `models.params.decoder_specs(config)`.
        kv: one cache a layer, handed to `attend` and rebound. Of stacked layers, what holds all caches: `attend` is
            given an `OneOf` of it.
        tokens, positions: [T]; a token's position in its own sequence.
        max_model_len: what dynamic rope scaling is fixed at; the model's own maximum by default.
        num_tokens: how many of the T, at the beginning, are somebody's; of the others hidden states may be anything.
        axis: the devices that parameters and caches are cut over; then these are one device's parts of them, and the
            hidden states are whole on every device.
    """
    embed = params["embed"]
    x = take_rows(embed, tokens) if isinstance(embed, PanelMatrix) else axis.lookup(embed, tokens)
    x = x.astype(jnp.float32)
    tables = rope_tables(positions, config.rope, config.head_dim, max_model_len or config.max_position)

    # Layers with the same window are the same program: traced and lowered once, inlined by the compiler.
    @partial(jax.jit, static_argnames="window")
    def run_layer(
        x: jax.Array, layer: Params, kv_layer: Any, tables: tuple[jax.Array, jax.Array], window: int | None
    ) -> tuple[jax.Array, Any]:
        h = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
        out, kv_layer = _attention(layer, h, tables, window, kv_layer, attend, config, num_tokens)
        x = x + _whole(out, layer.get("o_bias"), axis)
        out = _mlp(layer, rms_norm(x, layer["mlp_norm"], config.rms_norm_eps), config, num_tokens)
        return x + _whole(out, layer.get("down_bias"), axis), kv_layer

    if are_stacked(params):
        (caches,), (window,) = kv, set(config.layer_windows)

        def run_next(
            carry: tuple[jax.Array, Any], layer: tuple[jax.Array, Params]
        ) -> tuple[tuple[jax.Array, Any], None]:
            (x, caches), (index, weights) = carry, layer
            x, (caches, _) = run_layer(x, weights, OneOf(caches, index), tables, window)
            return (x, caches), None

        stack = (jnp.arange(config.num_layers, dtype=jnp.int32), params["layers"])
        (x, caches), _ = jax.lax.scan(run_next, (x, caches), stack)
        return rms_norm(x, params["final_norm"], config.rms_norm_eps), (caches,)
    new_kv = []
    for layer, kv_layer, window in zip(params["layers"], kv, config.layer_windows, strict=True):
        x, kv_layer = run_layer(x, layer, kv_layer, tables, window)
        new_kv.append(kv_layer)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), tuple(new_kv)


def logits(params: Params, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    """float32 logits of each hidden state, by the head or the tied embedding, or by one device's part of it."""
    if "lm_head" in params:
        return linear(hidden, params["lm_head"])
    embed = params["embed"]
    if isinstance(embed, PanelMatrix):
        return linear(hidden, embed)
    return jax.lax.dot_general(
        hidden.astype(embed.dtype), embed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _whole(part: jax.Array, bias: jax.Array | None, axis: Axis) -> jax.Array:
    """A product whose inputs are cut over the devices: the sum of their parts, then once the bias."""
    out = axis.sum(part)
    return out if bias is None else out + bias.astype(jnp.float32)


def _attention(
    layer: Params,
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    window: int | None,
    kv_layer: Any,
    attend: Attend,
    config: ModelConfig,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, Any]:
    qkv = linear(
        x, layer["qkv"], layer.get("qkv_bias"), num_tokens=num_tokens
    )  # [T, K, G + 2, H], of this device's heads
    num_groups = qkv.shape[2] - 2
    q, k, v = qkv[:, :, :num_groups], qkv[:, :, num_groups], qkv[:, :, num_groups + 1]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    q = apply_rope(q.reshape(len(x), -1, config.head_dim), *tables).reshape(q.shape)
    k = apply_rope(k, *tables)
    out, kv_layer = attend(window, kv_layer, q * config.head_dim**-0.5, k, v)
    return linear(out, layer["o"], num_in_axes=len(layer["o"].shape) - 1, num_tokens=num_tokens), kv_layer


def _mlp(layer: Params, x: jax.Array, config: ModelConfig, num_tokens: jax.Array | None) -> jax.Array:
    activation = _ACTIVATIONS[config.activation]
    gate_up, gate_up_bias, down = (
        layer["gate_up"],
        layer.get("gate_up_bias"),
        layer["down"],
    )  # [2, F, D], [2, F], [D, F]

    def tokens_left(x: jax.Array) -> jax.Array:
        wide = linear(x, gate_up, gate_up_bias, num_tokens=num_tokens)  # [T, 2, F]
        return linear(activation(wide[:, 0]) * wide[:, 1], down, num_tokens=num_tokens)

    def weights_left(x: jax.Array) -> jax.Array:
        """The tokens stay columns between the products, so that nothing wide is transposed."""
        wide = weight_left(matrix, x).reshape(*gate_up.shape[:2], len(x))
        wide = wide if gate_up_bias is None else wide + gate_up_bias[..., None]
        return weight_left(down, activation(wide[0]) * wide[1], token_axis=1).T

    if isinstance(gate_up, PanelMatrix):
        if config.activation != "silu" or gate_up_bias is not None or not can_gate(gate_up):
            return tokens_left(x)
        h = gated_linear(x.astype(gate_up.dtype), gate_up, num_tokens)
        return linear(h, down, num_tokens=num_tokens)
    matrix = gate_up.reshape(-1, x.shape[1])
    return faster_form(x, tokens_left=tokens_left, weights_left=weights_left, weights=(matrix, down))
