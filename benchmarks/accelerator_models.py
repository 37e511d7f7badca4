"""Shapes of known models, random weights in them, and the least time that a step of theirs can take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator_timing import random_values
from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import ArraySpec, is_spec, tree_bytes

_LLAMA3_ROPE: dict[str, Any] = {"theta": 500_000.0, "kind": "llama3", "original_max_position": 8192}
_LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 128_256,
    "num_heads": 32,
    "num_kv_heads": 8,
    "max_position": 131_072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
MODELS = {
    "8B": ModelConfig(
        **_LLAMA,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        head_dim=128,
        rope=RopeConfig(**_LLAMA3_ROPE, factor=8.0),
    ),
    "1B": ModelConfig(
        **_LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        rope=RopeConfig(**_LLAMA3_ROPE, factor=32.0),
        tied_embeddings=True,
    ),
    "0.6B": ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_position=40_960,
        rope=RopeConfig(theta=1_000_000.0),
        qk_norm=True,
        tied_embeddings=True,
        dtype="bfloat16",
    ),
    "tiny": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position=1024,
        tied_embeddings=True,
        dtype="bfloat16",
    ),
}
FULL_NAMES = {"8B": "Llama-3.1-8B", "1B": "Llama-3.2-1B", "0.6B": "Qwen3-0.6B", "tiny": "tiny"}


def random_params(model: ModelConfig, seed: int, *, stacked: bool = False) -> Any:
    """Random weights on the device, tensor by tensor: nothing is held beside them. One program a shape.

    Args:
        stacked: each tensor of all layers in one.
    """
    leaves, tree = jax.tree.flatten(decoder_specs(model, stacked=stacked), is_leaf=is_spec)
    return tree.unflatten([_random(spec, seed + index) for index, spec in enumerate(leaves)])


def _random(spec: ArraySpec, seed: int) -> jax.Array:
    if spec.init != "normal":
        return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, spec.dtype)
    return _scaled(random_values(seed, spec.shape, spec.dtype))


@partial(jax.jit, donate_argnums=0)
def _scaled(array: jax.Array) -> jax.Array:
    return (array.astype(jnp.float32) * jnp.float32(0.02)).astype(array.dtype)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least seconds of a step.

    The weights, which are read once, or their products, whichever takes longer; then the keys and values. The phases
    follow one another; attention's operations in decode, activations and sampling count nothing.

    Attributes:
        head, body: weights of the output head and of all else that is multiplied. The input embedding is not read,
            but for a row a token; a tied one is the head.
    """

    model: ModelConfig
    bytes_s: float
    flops_s: float

    @property
    def head(self) -> int:
        return self.model.vocab_size * self.model.hidden_size

    @property
    def body(self) -> int:
        specs = decoder_specs(self.model)
        return (tree_bytes(specs) - tree_bytes([specs["embed"], specs.get("lm_head", [])])) // 2

    def decode_s(self, batch: int, num_keys: int) -> float:
        """Of a step of `batch` sequences that see `num_keys` keys together."""
        weights = self.body + self.head
        products_s = 2 * weights * batch / self.flops_s
        return (
            max(2 * weights / self.bytes_s, products_s)
            + num_keys * self.model.kv_bytes_per_token("bfloat16") / self.bytes_s
        )

    def prefill_s(self, tokens: int) -> float:
        """Of one prompt, whose last token is sampled after."""
        c = self.model
        attention = 2 * c.num_layers * c.num_heads * c.head_dim * tokens**2
        return (2 * self.body * tokens + 2 * self.head + attention) / self.flops_s


def needed_bytes(model: ModelConfig, num_blocks: int, block_size: int) -> int:
    """Weights and cache, and a tenth for what a step holds beside them."""
    held = tree_bytes(decoder_specs(model)) + num_blocks * block_size * model.kv_bytes_per_token("bfloat16")
    return math.ceil(1.1 * held)
