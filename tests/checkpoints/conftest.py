"""The tiny models and two oracles: a plain numpy forward pass, and the way back to Hugging Face tensors.

Both are written from the published definitions, in float64 and without any code of the loader.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import ModelConfig
from jaxserve.layers.rope import rope_frequencies

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def tiny(repo: Path) -> ModuleType:
    """`scripts/make_tiny_models.py`."""
    spec = importlib.util.spec_from_file_location("make_tiny_models", repo / "scripts" / "make_tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made once; not to be written to."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(family: str) -> Path:
        return root / family if (root / family).exists() else tiny.make(family, root / family)

    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """The arrays of one golden file."""

    def read(name: str) -> Mapping[str, np.ndarray]:
        with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def config_goldens() -> list[dict[str, Any]]:
    """config.json contents and how the reference's config classes understand them."""
    return json.loads((GOLDENS / "config.json").read_text())


@pytest.fixture(scope="session")
def numpy_logits() -> Callable[[Any, ModelConfig, np.ndarray], np.ndarray]:
    """(parameters of our tree, config, tokens[T]) -> float64 logits[T, V]."""
    return _logits


@pytest.fixture(scope="session")
def unfuse() -> Callable[[Any, ModelConfig], dict[str, np.ndarray]]:
    """(parameters of our tree, config) -> every tensor by its Hugging Face name, `[out, in]`."""
    return lambda params, config: dict(_unfuse(params, config))


def _unfuse(params: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    groups = config.num_groups
    params = jax.tree.map(np.asarray, params)

    def out_in(matrix: np.ndarray, num_ins: int) -> np.ndarray:
        """[outs..., ins...], with the inputs flattened."""
        return matrix.reshape(*matrix.shape[: matrix.ndim - num_ins], -1)

    yield "model.embed_tokens.weight", params["embed"]
    yield "model.norm.weight", params["final_norm"]
    if "lm_head" in params:
        yield "lm_head.weight", out_in(params["lm_head"], 1)
    for number, layer in enumerate(params["layers"]):
        at = f"model.layers.{number}."
        qkv = out_in(layer["qkv"], 1)
        for name, part in (("q", qkv[:, :groups]), ("k", qkv[:, groups]), ("v", qkv[:, groups + 1])):
            yield f"{at}self_attn.{name}_proj.weight", part.reshape(-1, config.hidden_size)
        if "qkv_bias" in layer:
            bias = layer["qkv_bias"]
            for name, part in (("q", bias[:, :groups]), ("k", bias[:, groups]), ("v", bias[:, groups + 1])):
                yield f"{at}self_attn.{name}_proj.bias", part.reshape(-1)
        gate_up = out_in(layer["gate_up"], 1)
        yield f"{at}self_attn.o_proj.weight", out_in(layer["o"], 3)
        yield f"{at}mlp.gate_proj.weight", gate_up[0]
        yield f"{at}mlp.up_proj.weight", gate_up[1]
        yield f"{at}mlp.down_proj.weight", out_in(layer["down"], 1)
        vectors = {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
        vectors |= {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
        vectors |= {"o_bias": "self_attn.o_proj.bias", "down_bias": "mlp.down_proj.bias"}
        for leaf, name in vectors.items():
            if leaf in layer:
                yield at + name, layer[leaf]
        if "gate_up_bias" in layer:
            yield f"{at}mlp.gate_proj.bias", layer["gate_up_bias"][0]
            yield f"{at}mlp.up_proj.bias", layer["gate_up_bias"][1]


def _logits(params: Any, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    w = {name: tensor.astype(np.float64) for name, tensor in _unfuse(params, config)}
    inv_freq, scaling = rope_frequencies(config.rope, config.head_dim, len(tokens))
    angles = np.arange(len(tokens))[:, None] * np.concatenate([inv_freq, inv_freq]).astype(np.float64)
    cos, sin = np.cos(angles)[:, None] * scaling, np.sin(angles)[:, None] * scaling
    x = w["model.embed_tokens.weight"][tokens]
    for number in range(config.num_layers):
        layer = {name.removeprefix(f"model.layers.{number}."): value for name, value in w.items()}
        x = x + _attention(layer, _norm(x, layer["input_layernorm.weight"], config), cos, sin, number, config)
        x = x + _mlp(layer, _norm(x, layer["post_attention_layernorm.weight"], config), config)
    x = _norm(x, w["model.norm.weight"], config)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _norm(x: np.ndarray, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def _linear(layer: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0.0)


def _attention(
    layer: dict[str, np.ndarray], x: np.ndarray, cos: np.ndarray, sin: np.ndarray, number: int, config: ModelConfig
) -> np.ndarray:
    length, half = len(x), config.head_dim // 2
    q, k, v = (_linear(layer, f"self_attn.{name}_proj", x).reshape(length, -1, config.head_dim) for name in "qkv")
    if config.qk_norm:
        q, k = _norm(q, layer["self_attn.q_norm.weight"], config), _norm(k, layer["self_attn.k_norm.weight"], config)
    q, k = (y * cos + np.concatenate([-y[..., half:], y[..., :half]], axis=-1) * sin for y in (q, k))
    k, v = (np.repeat(y, config.num_groups, axis=1) for y in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(config.head_dim)
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    window = config.layer_windows[number] or length
    scores = np.where((back >= 0) & (back < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return _linear(layer, "self_attn.o_proj", np.einsum("nts,snh->tnh", weights, v).reshape(length, -1))


def _mlp(layer: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig) -> np.ndarray:
    gate = _linear(layer, "mlp.gate_proj", x)
    match config.activation:
        case "silu":
            gate = gate / (1 + np.exp(-gate))
        case "gelu_tanh":
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        case "gelu":
            gate = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    return _linear(layer, "mlp.down_proj", gate * _linear(layer, "mlp.up_proj", x))
