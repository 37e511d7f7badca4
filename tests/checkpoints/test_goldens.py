"""What we read of each family gives the reference implementation's logits, tokens and rope tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jaxserve.config import ModelConfig
from jaxserve.layers.rope import rope_frequencies
from jaxserve_checkpoints.hf_config import read_config
from jaxserve_checkpoints.load import load_model

FAMILIES = (
    "llama2",
    "llama3",
    "llama31",
    "llama32",
    "smollm",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "llama_bias",
    "rope_linear",
    "rope_dynamic",
    "rope_yarn",
    "rope_yarn_mscale",
    "rope_yarn_factor",
)
Golden = Callable[[str], Mapping[str, np.ndarray]]


def test_every_family_has_a_golden(tiny: ModuleType) -> None:
    assert {*FAMILIES, "long"} == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", [*FAMILIES, "long"])
def test_weights_are_the_ones_the_golden_is_of(family: str, tiny_folder: Callable[[str], Path], golden: Golden) -> None:
    digest = hashlib.sha256()
    for path in sorted(tiny_folder(family).glob("*.safetensors")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == str(golden(family)["weights_sha256"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_the_reference_s(
    family: str,
    tiny_folder: Callable[[str], Path],
    golden: Golden,
    numpy_logits: Callable[[Any, ModelConfig, np.ndarray], np.ndarray],
) -> None:
    model = load_model(tiny_folder(family))
    expected = golden(family)
    ends = np.cumsum(expected["prompt_lens"])
    for end, length, greedy in zip(ends, expected["prompt_lens"], expected["greedy"], strict=True):
        prompt = expected["prompts"][end - length : end]
        logits = numpy_logits(model.params, model.config, np.concatenate([prompt, greedy[:-1]]))
        # The bound; float64 here against the reference's float32 measures 1e-5.
        np.testing.assert_allclose(logits[:length], expected["logits"][end - length : end], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(logits[length - 1 :].argmax(axis=-1), greedy)


@pytest.mark.parametrize(
    "case",
    [
        "default",
        "default_64",
        "linear",
        "dynamic",
        "dynamic_inactive",
        "llama3",
        "llama32",
        "yarn",
        "yarn_mscale",
        "yarn_full",
    ],
)
def test_rope_of_published_models_as_far_as_position_131071(case: str, tmp_path: Path, golden: Golden) -> None:
    expected = golden("rope")
    assert case in expected["cases"]
    (tmp_path / "config.json").write_text(str(expected[f"{case}.config"]))
    config = read_config(tmp_path)
    inv_freq, scaling = rope_frequencies(config.rope, config.head_dim, int(expected[f"{case}.seq_len"]) or 131_072)
    # Both compute in float32, where power functions differ in the last bit: two roundings of 1.2e-7.
    np.testing.assert_allclose(inv_freq, expected[f"{case}.inv_freq"], rtol=2.4e-7, atol=0)
    assert scaling == pytest.approx(float(expected[f"{case}.attention_scaling"]), rel=1e-6)
    angles = expected["positions"][:, None] * np.tile(inv_freq.astype(np.float64), 2)
    # The frequency's error and the rounding of position x frequency, both growing with the angle, and cos's own.
    bound = (angles * 3e-7 + 2e-7) * scaling
    assert np.all(np.abs(np.cos(angles) * scaling - expected[f"{case}.cos"]) <= bound)
    assert np.all(np.abs(np.sin(angles) * scaling - expected[f"{case}.sin"]) <= bound)


def test_config_classes_understand_the_same(config_goldens: list[dict[str, Any]], tmp_path: Path) -> None:
    for case in config_goldens:
        (tmp_path / "config.json").write_text(json.dumps(case["config"]))
        config = read_config(tmp_path)
        found = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": list(config.eos_token_ids),
            "windows": list(config.layer_windows),
            "rope_theta": config.rope.theta,
            "rope_type": config.rope.kind,
            "qkv_bias": config.qkv_bias,
            "o_bias": config.o_bias,
            "mlp_bias": config.mlp_bias,
        }
        assert found == case["resolved"], case["config"]
