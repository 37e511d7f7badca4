"""Makes a Hugging Face folder with random weights in the shape of a known small model.

    python scripts/make_model_folder.py OUT SHAPE [--dtype float32|bfloat16] [--seed N] [--tiny] [--repeat]

For measuring: the speed of a model depends on its shape alone, and these are made in seconds, without a network and
the same on every machine. Weights are as in `make_tiny_models.py`, but for `gain`: logits are several units wide, and
greedy answers neither repeat themselves nor hang on rounding. `--repeat` draws 16 Mi values and lays them out again and
again, from another place in each tensor: 16 GB of bfloat16 in half a minute instead of five. Speed is the same, greedy
answers may not be as well apart.

The tokenizer is the demo model's with the vocabulary filled up: every id of the model is a token with text, so that
whatever is generated can be streamed. No text is encoded into one of those added, because no merge leads there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
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
_LLAMA3: Config = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
REPEATED = 2**24  # values drawn for `--repeat`
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
    "llama-3.2-1b": _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
    "llama-3.1-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    | {"rope_scaling": _LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False},
}


def tiny(config: Config) -> Config:
    """The same family in a size for tests: two layers, heads of 16, a vocabulary slightly larger than the demo's."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    small = {"vocab_size": 2600, "hidden_size": 16 * heads, "intermediate_size": 96, "num_hidden_layers": 2}
    return config | small | {"head_dim": 16, "num_key_value_heads": kv_heads}


def make(
    shape: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    is_tiny: bool = False,
    repeats: bool = False,
) -> Path:
    """Writes the folder and returns it.

    Args:
        shape: a key of `SHAPES`.
        dtype: what the weights are stored in; a key of `DTYPES`.
        seed: another seed, other weights.
        is_tiny: the family in a size for tests.
        repeats: the same drawn values again and again.
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
    fill = repeating(bits, DTYPES[dtype]) if repeats else partial(draw, bits)
    tensors = {
        name: fill(size, gain(name) * centre, gain(name) * spread).astype(DTYPES[dtype], copy=False)
        for name, size, centre, spread in tensor_specs(config)
    }
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def repeating(bits: np.random.PCG64, dtype: np.dtype) -> Callable[[tuple[int, ...], float, float], np.ndarray]:
    """What `draw` does, in `dtype` and of values drawn once. Each tensor begins at another of them."""
    drawn = draw(bits, (REPEATED,), 0.0, 1.0)
    starts = itertools.count(0, 7_919_111)

    def fill(shape: tuple[int, ...], centre: float, spread: float) -> np.ndarray:
        count, start = math.prod(shape), next(starts) % REPEATED
        once = np.concatenate([drawn[start:], drawn[:start]])[:count] * np.float32(spread) + np.float32(centre)
        return np.resize(once.astype(dtype), shape)  # converted before it is repeated: 8B in seconds

    return fill


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
    parser.add_argument("--repeat", action="store_true", help="few values again and again: large models in seconds")
    options = parser.parse_args()
    tiny_or_not = {"is_tiny": options.tiny, "repeats": options.repeat}
    make(options.shape, options.out, dtype=options.dtype, seed=options.seed, **tiny_or_not)
    print(options.out)


if __name__ == "__main__":
    main()
