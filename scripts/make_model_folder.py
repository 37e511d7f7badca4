"""Makes a Hugging Face folder with random weights in the shape of a known small model.

    python scripts/make_model_folder.py OUT SHAPE [--dtype float32|bfloat16] [--seed N] [--tiny]

For measuring: the speed of a model depends on its shape alone, and these are made in seconds, without a network and
the same on every machine. Weights are as in `make_tiny_models.py`, but for `gain`: logits are several units wide, and
greedy answers neither repeat themselves nor hang on rounding.

The tokenizer is the demo model's with the vocabulary filled up: every id of the model is a token with text, so that
whatever is generated can be streamed. No text is encoded into one of those added, because no merge leads there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from make_tiny_models import Config, draw, tensor_specs, write_safetensors

DEMO = Path(__file__).parents[1] / "checkpoints" / "jaxserve_checkpoints" / "demo" / "chat"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_COMMON: Config = {
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
_QWEN: Config = _COMMON | {
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
SHAPES: Mapping[str, Config] = {
    "smollm2-135m": _COMMON
    | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "mlp_bias": False}
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0},
    "qwen2.5-0.5b": {key: value for key, value in _QWEN.items() if key != "attention_bias"}
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 24}
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768},
    "qwen3-0.6b": _QWEN
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_window_layers": 28}
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
}


def tiny(config: Config) -> Config:
    """The same family in a size for tests: two layers, heads of 16, a vocabulary slightly larger than the demo's."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    small = {"vocab_size": 2600, "hidden_size": 16 * heads, "intermediate_size": 96, "num_hidden_layers": 2}
    return config | small | {"head_dim": 16, "num_key_value_heads": kv_heads}


def make(shape: str, folder: Path, *, dtype: str = "float32", seed: int = 0, is_tiny: bool = False) -> Path:
    """Writes the folder and returns it.

    Args:
        shape: a key of `SHAPES`.
        dtype: what the weights are stored in; a key of `DTYPES`.
        seed: another seed, other weights.
        is_tiny: the family in a size for tests.
    """
    config = (tiny(SHAPES[shape]) if is_tiny else SHAPES[shape]) | {"torch_dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [3, 1], "pad_token_id": 1})
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    fill_vocabulary(tokenizer["model"]["vocab"], config["vocab_size"])
    _write_json(folder / "tokenizer.json", tokenizer)
    named = json.loads((DEMO / "tokenizer_config.json").read_text())
    _write_json(folder / "tokenizer_config.json", named | {"model_max_length": config["max_position_embeddings"]})
    bits = np.random.PCG64([seed, *shape.encode(), is_tiny])
    tensors = {
        name: draw(bits, size, gain(name) * centre, gain(name) * spread).astype(DTYPES[dtype])
        for name, size, centre, spread in tensor_specs(config)
    }
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def gain(name: str) -> float:
    """What a tensor of `make_tiny_models.py` is multiplied with, so that thirty such layers stay a calm function.

    Without it, float32 rounding moves the logits of SmolLM2-135M's shape by 1.7e-5 of a unit on average, where the mean
    gap of the two likeliest tokens is 0.7: of 64 greedy answers of 64 tokens, one would differ between two engines
    about every tenth time. With milder queries and keys, and layers that add less the later they come, it is 2.4e-6.
    """
    layer, _, inner = name.removeprefix("model.layers.").partition(".")
    if inner == "self_attn.v_proj.bias":
        return 0.05  # the same in every value: a mean over many keys would be nothing else, and answers repeat a token
    if inner.startswith(("self_attn.q_", "self_attn.k_")):
        return 0.5
    if inner.startswith(("self_attn.o_proj", "mlp.down_proj")):
        return 1 / (1 + int(layer))
    return 1.0


def fill_vocabulary(vocab: dict[str, int], size: int) -> None:
    """Adds words " w2560", " w2561" … in the spelling of a byte-level vocabulary, until it has `size` tokens."""
    for token_id in range(len(vocab), size):
        word = f"Ġw{token_id}"
        assert word not in vocab
        vocab[word] = token_id


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model folder with random weights.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="the family in a size for tests")
    options = parser.parse_args()
    make(options.shape, options.out, dtype=options.dtype, seed=options.seed, is_tiny=options.tiny)
    print(options.out)


if __name__ == "__main__":
    main()
