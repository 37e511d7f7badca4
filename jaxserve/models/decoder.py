"""The one decoder: every supported family is this function under a different `ModelConfig`.

It works on a ragged stream of tokens and does not know where keys and values are kept: `attend` does
(paged in `steps.py`, dense in training). The residual stream is float32; matrix products take the
weights' dtype and accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.config import ModelConfig
from jaxserve.layers.linear import faster_form, linear, weight_left
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import apply_rope, rope_tables

Params = dict[str, Any]
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
) -> tuple[Float[Array, "tokens hidden"], tuple[Any, ...]]:
    """Hidden states after the final norm, and the caches as `attend` left them.

    Args:
        params: the tree of `models.params.decoder_specs(config)`.
        kv: one cache a layer, handed to `attend` and rebound.
        tokens, positions: [T]; a token's position in its own sequence.
        max_model_len: what dynamic rope scaling is fixed at; the model's own maximum by default.
    """
    x = params["embed"][tokens].astype(jnp.float32)
    tables = rope_tables(positions, config.rope, config.head_dim, max_model_len or config.max_position)

    # Layers with the same window are the same program: traced and lowered once, inlined by the compiler.
    @partial(jax.jit, static_argnames="window")
    def run_layer(
        x: jax.Array, layer: Params, kv_layer: Any, tables: tuple[jax.Array, jax.Array], window: int | None
    ) -> tuple[jax.Array, Any]:
        h = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
        out, kv_layer = _attention(layer, h, tables, window, kv_layer, attend, config)
        x = x + out
        return x + _mlp(layer, rms_norm(x, layer["mlp_norm"], config.rms_norm_eps), config), kv_layer

    new_kv = []
    for layer, kv_layer, window in zip(params["layers"], kv, config.layer_windows, strict=True):
        x, kv_layer = run_layer(x, layer, kv_layer, tables, window)
        new_kv.append(kv_layer)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), tuple(new_kv)


def logits(params: Params, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    """float32 logits of each hidden state, by the head or the tied embedding."""
    if "lm_head" in params:
        return linear(hidden, params["lm_head"])
    embed = params["embed"]
    return jax.lax.dot_general(
        hidden.astype(embed.dtype), embed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _attention(
    layer: Params,
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    window: int | None,
    kv_layer: Any,
    attend: Attend,
    config: ModelConfig,
) -> tuple[jax.Array, Any]:
    num_tokens, num_groups = x.shape[0], config.num_groups
    qkv = linear(x, layer["qkv"], layer.get("qkv_bias"))  # [T, K, G + 2, H]
    q, k, v = qkv[:, :, :num_groups], qkv[:, :, num_groups], qkv[:, :, num_groups + 1]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    q = apply_rope(q.reshape(num_tokens, -1, config.head_dim), *tables).reshape(q.shape)
    k = apply_rope(k, *tables)
    out, kv_layer = attend(window, kv_layer, q * config.head_dim**-0.5, k, v)
    return linear(out, layer["o"], layer.get("o_bias"), num_in_axes=3), kv_layer


def _mlp(layer: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    activation = _ACTIVATIONS[config.activation]
    down, down_bias = layer["down"], layer.get("down_bias")
    gate_up, gate_up_bias = layer["gate_up"], layer.get("gate_up_bias")  # [2, F, hidden], [2, F]
    matrix = gate_up.reshape(-1, x.shape[1])

    def tokens_left(x: jax.Array) -> jax.Array:
        wide = linear(x, gate_up, gate_up_bias)  # [T, 2, F]
        return linear(activation(wide[:, 0]) * wide[:, 1], down, down_bias)

    def weights_left(x: jax.Array) -> jax.Array:
        """The tokens stay columns between the products, so that nothing wide is transposed."""
        wide = weight_left(matrix, x).reshape(*gate_up.shape[:2], len(x))
        wide = wide if gate_up_bias is None else wide + gate_up_bias[..., None]
        out = weight_left(down, activation(wide[0]) * wide[1], token_axis=1).T
        return out if down_bias is None else out + down_bias

    return faster_form(x, tokens_left=tokens_left, weights_left=weights_left, weights=(matrix, down))
