"""Greedy text by recomputing the whole sequence for each token: slow, simple, independent of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from demo_training.model import batch_logits
from demo_training.tokenizer import Renderer
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params


@partial(jax.jit, static_argnames="config")
def _next_token(params: Params, tokens: jax.Array, last: jax.Array, config: ModelConfig) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    scores = batch_logits(params, tokens, jnp.ones_like(tokens), positions, config)
    return jnp.argmax(scores[last])


def greedy(params: Params, ids: list[int], config: ModelConfig, max_new: int, stop: Iterable[int]) -> list[int]:
    """The tokens that follow `ids`, the end token excluded."""
    stop, made = set(stop), []
    width = -(-(len(ids) + max_new) // 128) * 128
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    for last in range(len(ids) - 1, len(ids) + max_new - 1):
        token = int(_next_token(params, tokens, np.int32(last), config))
        if token in stop:
            break
        made.append(token)
        tokens[0, last + 1] = token
    return made


def answer(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, messages: list[dict[str, str]], max_new: int = 200
) -> str:
    """The greedy reply to a chat; "…" at its end says that it did not end by itself."""
    renderer = Renderer(tokenizer)
    ids = renderer.chat_ids(messages, add_generation_prompt=True)
    made = greedy(params, ids, config, max_new, renderer.eos_ids)
    return tokenizer.decode(made) + ("…" if len(made) == max_new else "")
