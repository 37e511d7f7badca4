"""`scripts/make_model_folder.py`: folders for measuring, which load and whose every token has text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.text.tokenizer import Tokenizer
from jaxserve_checkpoints.load import load_model
from jaxserve_checkpoints.safetensors import read_header

Make = Callable[..., Path]
SHAPES = {
    "smollm2-135m": "llama",
    "qwen2.5-0.5b": "qwen2",
    "qwen3-0.6b": "qwen3",
    "llama-3.2-1b": "llama",
    "llama-3.1-8b": "llama",
}


@pytest.fixture
def make(repo: Path, tmp_path: Path) -> Make:
    def run(shape: str, *flags: str, name: str = "model") -> Path:
        script = repo / "scripts" / "make_model_folder.py"
        subprocess.run([sys.executable, script, tmp_path / name, shape, "--tiny", *flags], check=True)
        return tmp_path / name

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_loads_and_all_its_tokens_have_text(make: Make, repo: Path, shape: str) -> None:
    folder = make(shape)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == SHAPES[shape]
    loaded = load_model(str(folder))
    assert (loaded.config.dtype, loaded.config.vocab_size) == ("float32", config["vocab_size"])
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == config["vocab_size"]
    assert all(tokenizer.decode([token]) for token in range(4, config["vocab_size"]))
    demo = Tokenizer.from_folder(repo / "checkpoints" / "jaxserve_checkpoints" / "demo" / "chat")
    text = "A cat sat on w2560 mats, w2599."
    assert tokenizer.encode(text) == demo.encode(text)


def test_weights_are_drawn_from_shape_and_seed(make: Make) -> None:
    first, again = make("smollm2-135m", name="first"), make("smollm2-135m", name="again")
    other = make("smollm2-135m", "--seed", "1", name="other")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_bfloat16_is_the_same_weights_rounded(make: Make) -> None:
    whole, half = make("qwen3-0.6b", name="whole"), make("qwen3-0.6b", "--dtype", "bfloat16", name="half")
    assert {info.dtype for info in read_header(half / "model.safetensors").values()} == {"BF16"}
    rounded, stored = load_model(str(whole), dtype="bfloat16"), load_model(str(half))
    jax.tree.map(np.testing.assert_array_equal, rounded.params, stored.params)


def test_repeated_weights_differ_from_tensor_to_tensor(make: Make) -> None:
    folder = make("llama-3.1-8b", "--repeat", "--dtype", "bfloat16")
    layers = load_model(str(folder)).params["layers"]
    first, second = (np.asarray(layer["down"], np.float32) for layer in layers)
    assert np.isfinite(first).all()
    assert 0.3 < first.std() / (1.5 / 96**0.5) < 3
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
