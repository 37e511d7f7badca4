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
from jaxserve.models.params import are_in_panels, are_stacked
from jaxserve.parallel.axis import ONE_DEVICE, Axis
from pallas_kernels.linear.api import PanelMatrix, can_gate, gated_linear, take_rows
from pallas_kernels.rms_norm.api import add_rms_norm

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


class Heads(NamedTuple):
    """A layer's product before attention, and what makes heads of it, for an `attend` that does all that at once.

    Attributes:
        qkv: [T, K, G + 2, H] float32 of each kv head's queries, key and value.
        layer: with qkv_bias, q_norm and k_norm, where the model has them.
        tables: cos and sin of each token.
    """

    qkv: jax.Array
    layer: Params
    tables: tuple[jax.Array, jax.Array]


# (the layer's window, its cache, its heads) -> (out [T, K, G, H], cache)
AttendHeads = Callable[[int | None, Any, Heads], tuple[jax.Array, Any]]

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
    attend_heads: AttendHeads | None = None,
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
        attend_heads: takes the place of `attend`, and with it rotation and norms of heads go.
        axis: the devices that parameters and caches are cut over; then these are one device's parts of them, and the
            hidden states are whole on every device.
    """
    embed, in_panels = params["embed"], are_in_panels(params)
    x = take_rows(embed, tokens, num_tokens) if isinstance(embed, PanelMatrix) else axis.lookup(embed, tokens)
    x = x.astype(jnp.float32)
    tables = rope_tables(positions, config.rope, config.head_dim, max_model_len or config.max_position)

    norm, eps = (partial(_add_norm, config=config, num_tokens=num_tokens if in_panels else None), config.rms_norm_eps)

    # Layers with the same window are the same program: traced and lowered once, inlined by the compiler.
    @partial(jax.jit, static_argnames="window")
    def run_layer(
        x: jax.Array,
        h: jax.Array | None,
        layer: Params,
        next_norm: jax.Array | None,
        kv_layer: Any,
        tables: tuple[jax.Array, jax.Array],
        window: int | None,
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """The residual stream, and normalised for what comes next if that has its norm made here."""
        h = rms_norm(x, layer["attn_norm"], eps) if h is None else h
        out, kv_layer = _attention(layer, h, tables, window, kv_layer, attend, attend_heads, config, num_tokens)
        x, h = norm(x, _whole(out, layer.get("o_bias"), axis), layer["mlp_norm"])
        out = _whole(_mlp(layer, h, config, num_tokens), layer.get("down_bias"), axis)
        return (x + out, None, kv_layer) if next_norm is None else (*norm(x, out, next_norm), kv_layer)

    layers, final_norm = params["layers"], params["final_norm"]
    if are_stacked(params):
        x, caches = _run_stacked(run_layer, x, layers, kv, tables, config)
        return rms_norm(x, final_norm, eps), caches
    new_kv, h, next_norms = [], None, (None,) * config.num_layers
    if in_panels:  # one kernel adds and normalises. XLA:CPU's bits hang on what a norm is fused with: there it stays
        _, h = norm(x, None, layers[0]["attn_norm"])
        next_norms = (*(layer["attn_norm"] for layer in layers[1:]), final_norm)
    for layer, next_norm, kv_layer, window in zip(layers, next_norms, kv, config.layer_windows, strict=True):
        x, h, kv_layer = run_layer(x, h, layer, next_norm, kv_layer, tables, window)
        new_kv.append(kv_layer)
    return rms_norm(x, final_norm, eps) if h is None else h, tuple(new_kv)


def _run_stacked(
    run_layer: Callable, x: jax.Array, layers: Params, kv: tuple[Any, ...], tables: Any, config: ModelConfig
) -> tuple[jax.Array, tuple[Any, ...]]:
    """All layers in one loop."""
    (caches,), (window,) = kv, set(config.layer_windows)

    def run_next(carry: tuple[jax.Array, Any], layer: tuple[jax.Array, Params]) -> tuple[tuple[jax.Array, Any], None]:
        (x, caches), (index, weights) = carry, layer
        x, _, (caches, _) = run_layer(x, None, weights, None, OneOf(caches, index), tables, window)
        return (x, caches), None

    stack = (jnp.arange(config.num_layers, dtype=jnp.int32), layers)
    (x, caches), _ = jax.lax.scan(run_next, (x, caches), stack)
    return x, (caches,)


def logits(
    params: Params, hidden: Float[Array, "tokens hidden"], num_tokens: Int[Array, "1"] | None = None
) -> Float[Array, "tokens vocab"]:
    """float32 logits of each hidden state, by the head or the tied embedding, or by one device's part of it.

    Args:
        num_tokens: how many, at the beginning, are wanted; those of the others may be anything. None for all.
    """
    if "lm_head" in params:
        return linear(hidden, params["lm_head"], num_tokens=num_tokens)
    embed = params["embed"]
    if isinstance(embed, PanelMatrix):
        return linear(hidden, embed, num_tokens=num_tokens)
    return jax.lax.dot_general(
        hidden.astype(embed.dtype), embed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _add_norm(
    x: jax.Array,
    delta: jax.Array | None,
    weight: jax.Array,
    *,
    config: ModelConfig,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a layer's part, and that normalised; with a number of tokens, by the CPU's kernel."""
    if num_tokens is not None:
        return add_rms_norm(x, delta, weight, num_tokens, eps=config.rms_norm_eps, dtype=config.dtype)
    x = x if delta is None else x + delta
    return x, rms_norm(x, weight, config.rms_norm_eps)


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
    attend_heads: AttendHeads | None,
    config: ModelConfig,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, Any]:
    o, num_ins = layer["o"], len(layer["o"].shape) - 1
    if attend_heads is not None:
        qkv = linear(x, layer["qkv"], num_tokens=num_tokens)
        out, kv_layer = attend_heads(window, kv_layer, Heads(qkv, layer, tables))
        return linear(out, o, num_in_axes=num_ins, num_tokens=num_tokens), kv_layer
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
    return linear(out, o, num_in_axes=num_ins, num_tokens=num_tokens), kv_layer


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
        if config.activation != "silu" or gate_up_bias is not None or not can_gate(gate_up.outs):
            return tokens_left(x)
        h = gated_linear(x.astype(gate_up.dtype), gate_up, num_tokens)
        return linear(h, down, num_tokens=num_tokens)
    matrix = gate_up.reshape(-1, x.shape[1])
    return faster_form(x, tokens_left=tokens_left, weights_left=weights_left, weights=(matrix, down))
