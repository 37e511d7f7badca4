"""The engine's whole steps lowered for CUDA with the GPU kernels in them, on a machine without a GPU.

Two layers of Qwen3-0.6B and of Llama-3.1-8B at their own widths. ptxas and XLA's own compilation for a GPU do not run.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.accelerator_models import MODELS
from jaxserve.config import ModelConfig
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import map_specs
from jaxserve.state import StepShape, init_decode_state, init_kv_cache
from jaxserve.steps import step
from tests.portability.abstract_gpu import on_gpu

NUM_LAYERS, NUM_ROWS, BLOCK_SIZE, MAX_LEN = 2, 64, 16, 8192
QWEN3, LLAMA = (replace(MODELS[name], num_layers=NUM_LAYERS, layer_windows=()) for name in ("0.6B", "8B"))


def lowered(model: ModelConfig, num_tokens: int, max_steps: int, attention: Any) -> str:
    shape = StepShape(
        num_tokens, NUM_ROWS, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, min(128, num_tokens), 128, max_steps, attention
    )
    of = jax.ShapeDtypeStruct
    params = map_specs(lambda spec: of(spec.shape, jnp.dtype(spec.dtype)), decoder_specs(model))
    kv = jax.eval_shape(partial(init_kv_cache, model, 4096, BLOCK_SIZE, "bfloat16", as_bits=False))
    state = jax.eval_shape(partial(init_decode_state, NUM_ROWS, MAX_LEN // BLOCK_SIZE, model.vocab_size))
    function = partial(step, config=model, shape=shape, max_model_len=MAX_LEN)
    traced = jax.jit(function, donate_argnums=(1, 2)).trace(params, kv, state, of((shape.packed_len,), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("model", "num_tokens", "max_steps"),
    [(QWEN3, 64, 16), (QWEN3, 2048, 1), (LLAMA, 64, 1)],
    ids=["Qwen3-0.6B, 16 decode steps", "Qwen3-0.6B, mixed", "Llama-3.1-8B, decode"],
)
def test_a_whole_step_lowers_for_cuda_and_writes_its_cache_in_place(
    model: ModelConfig, num_tokens: int, max_steps: int
) -> None:
    text = lowered(model, num_tokens, max_steps, "gpu")
    # jax lowers layers that are the same once and calls that: a write, a fold over keys, and a merge of splits.
    assert len(re.findall(r"custom_call @mosaic_gpu\w*", text)) == 3
    calls = re.findall(r"call @run_layer\w*\(", text)
    assert len(calls) == NUM_LAYERS
    assert "mosaic_gpu" not in lowered(model, num_tokens, max_steps, "xla")
    pool = f"tensor<4096x{BLOCK_SIZE}x{model.num_kv_heads}x{2 * model.head_dim}xbf16>"
    donated = re.findall(rf"%arg\d+: {pool} {{[^}}]*tf.aliasing_output", text)
    assert len(donated) == NUM_LAYERS


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU has mma and cp.async since jax 0.11")
@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_a_whole_step_lowers_for_gpus_other_than_hopper(capability: str) -> None:
    with on_gpu(capability):
        text = lowered(QWEN3, 64, 1, "gpu")
    assert len(re.findall(r"custom_call @mosaic_gpu\w*", text)) == 3
    assert "mma.sync" in text
    assert "wgmma" not in text
