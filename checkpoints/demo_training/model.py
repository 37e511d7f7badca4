"""The shapes of the two demo models, and the training loss over the engine's own decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from demo_training.packing import Batch
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params, forward, logits
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import init_arrays

VOCAB_SIZE = 2560
CONTEXT = 1024


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=32,
        max_position=CONTEXT,
        rms_norm_eps=1e-5,
        tied_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(3, 1),
    )


CHAT = _llama(hidden=256, ffn=576, layers=6, heads=8, kv_heads=4, vocab_size=VOCAB_SIZE)
DRAFT = _llama(hidden=128, ffn=384, layers=2, heads=4, kv_heads=2, vocab_size=VOCAB_SIZE)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters; what writes into the residual stream starts smaller, as in GPT-2."""
    params = init_arrays(decoder_specs(config), jax.random.key(seed))
    scale = (2 * config.num_layers) ** -0.5
    layers = tuple(layer | {name: layer[name] * scale for name in ("o", "down")} for layer in params["layers"])
    return params | {"layers": layers}


def num_parameters(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def batch_logits(
    params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array, config: ModelConfig
) -> jax.Array:
    """f32[rows * length, vocab]: the rows go through the decoder as one stream, attention stays within segments.

    Args:
        tokens, segments, positions: i32[rows, length], see `packing.Batch`.
    """
    rows, length = tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    bias = jnp.where(causal & (segments[:, :, None] == segments[:, None, :]), 0.0, -1e9)[:, None, None]

    def attend(_: int | None, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        q_BTKGH = q.reshape(rows, length, *q.shape[1:])
        k_BSKH, v_BSKH = (x.reshape(rows, length, *x.shape[1:]) for x in (k, v))
        probs = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) + bias, axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKH).reshape(q.shape), kv

    kv = (None,) * config.num_layers
    hidden, _ = forward(params, kv, tokens.reshape(-1), positions.reshape(-1), attend, config)
    return logits(params, hidden)


def predictions(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """f32[rows * length, vocab]: the logits of each next token."""
    tokens, segments, positions = (jnp.asarray(part) for part in batch[:3])
    return batch_logits(params, tokens[:, :-1], segments, positions, config)


def token_losses(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """f32[rows * length]: cross-entropy in nats of each next token."""
    scores = predictions(params, batch, config)
    targets = jnp.asarray(batch.tokens)[:, 1:].reshape(-1, 1)
    return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, targets, axis=-1)[:, 0]


def loss(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """Weighted mean cross-entropy of a batch."""
    weights = jnp.asarray(batch.weights).reshape(-1)
    return jnp.sum(token_losses(params, batch, config) * weights) / jnp.sum(weights)
