"""Makes a tiny random Hugging Face folder for each model family that is served.

    python scripts/make_tiny_models.py OUT [FAMILY ...]

The same bytes on every machine: weights are integers of the raw PCG64 stream (whose values numpy
guarantees, unlike those of its distributions) scaled by powers of two times one float32 factor, and the
safetensors file is written here. Needs numpy alone. The parity goldens in `tests/checkpoints/goldens/`
are of these weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]

_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Trained contexts are short (32 tokens) where rope is stretched, so that prompts of 70 reach beyond them.
FAMILIES: Mapping[str, Config] = {
    "llama2": _LLAMA,
    "llama3": _LLAMA
    | {"num_key_value_heads": 2, "rope_theta": 500000.0, "max_position_embeddings": 8192, "vocab_size": 192},
    "llama31": _LLAMA
    | {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE}
    | {"max_position_embeddings": 131072, "num_hidden_layers": 3, "eos_token_id": [2, 3, 4]},
    "llama32": _LLAMA
    | {"num_key_value_heads": 1, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "head_dim": 16},
    "smollm": _LLAMA
    | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    | {"intermediate_size": 192, "num_hidden_layers": 3, "rope_interleaved": False},
    "mistral": _LLAMA
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    | {"sliding_window": 16, "max_position_embeddings": 4096, "num_hidden_layers": 3},
    "qwen2": _LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    | {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}
    | {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 5},
    "qwen2_window": _LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    "qwen3": _LLAMA
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32}
    | {"rope_theta": 1000000.0, "attention_bias": False, "use_sliding_window": False, "sliding_window": None}
    | {"max_window_layers": 2, "rms_norm_eps": 1e-6},
    "llama_bias": _LLAMA
    | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "rope_linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 32},
    "rope_dynamic": _LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 256},
    "rope_yarn": _LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    | {"max_position_embeddings": 128},
    # transformers 5 writes one dict, theta and all.
    "rope_yarn_mscale": {key: value for key, value in _LLAMA.items() if not key.startswith("rope_")}
    | {"max_position_embeddings": 128}
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 20000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.2,
            "mscale_all_dim": 0.6,
            "truncate": False,
        }
    },
    "rope_yarn_factor": _LLAMA
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.8, "finetuned": True}}
    | {"original_max_position_embeddings": 32, "max_position_embeddings": 128},
    # Small enough to be run over its whole context of 131,072 tokens: 1.7e10 scores.
    "long": _LLAMA
    | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1, "head_dim": 16}
    | {"num_key_value_heads": 1, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    | {"rope_scaling": _LLAMA3_ROPE | {"original_max_position_embeddings": 8192}},
}
SHARDED = frozenset({"llama31", "qwen3"})  # written as two files and an index
GENERATION: Mapping[str, Config] = {
    "llama31": {"bos_token_id": 1, "eos_token_id": [3, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "qwen2": {"bos_token_id": 6, "eos_token_id": [7, 5], "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
}


def make(family: str, folder: Path) -> Path:
    """Writes the family's folder and returns it."""
    config = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if family in GENERATION:
        (folder / "generation_config.json").write_text(json.dumps(GENERATION[family], indent=2) + "\n")
    tensors = weights(family)
    if family not in SHARDED:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in members})
        weight_map |= dict.fromkeys(members, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def weights(family: str) -> dict[str, np.ndarray]:
    """Every tensor of the family, float32, by its Hugging Face name."""
    # The family's place in the alphabet would shift with new families; its name does not.
    bits = np.random.PCG64(int.from_bytes(family.encode(), "little"))
    return {name: draw(bits, shape, centre, spread) for name, shape, centre, spread in tensor_specs(FAMILIES[family])}


def draw(bits: np.random.PCG64, shape: tuple[int, ...], centre: float, spread: float) -> np.ndarray:
    """Uniform in centre ± spread, from the upper 24 bits of raw 64-bit words: exact in float32."""
    raw = bits.random_raw(math.prod(shape)) >> np.uint64(40)
    unit = raw.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (np.float32(centre) + unit * np.float32(spread)).reshape(shape)


def tensor_specs(c: Config) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, centre and spread of each tensor, in file order.

    A uniform spread of s has a deviation of s/√3. Matrices get √3 · gain / √inputs, so that activations keep
    their size; the head's gain makes logits several units wide, so that the largest stands apart.
    """
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    q_out, kv_out = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    qkv_bias = c.get("attention_bias") or c["model_type"] == "qwen2"

    def matrix(name: str, outs: int, ins: int, gain: float) -> tuple[str, tuple[int, ...], float, float]:
        return f"{name}.weight", (outs, ins), 0.0, gain * math.sqrt(3 / ins)

    # A tied embedding is also the head: its size sets the logits' width.
    tied_gain = 3.0 * math.sqrt(3 / hidden)
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden), 0.0, tied_gain if c["tie_word_embeddings"] else 1.0
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), 1.0, 0.5
        for name, outs, gain in (("q", q_out, 1.5), ("k", kv_out, 1.5), ("v", kv_out, 1.0)):
            yield matrix(f"{at}self_attn.{name}_proj", outs, hidden, gain)
            if qkv_bias:
                yield f"{at}self_attn.{name}_proj.bias", (outs,), 0.0, 0.5
        if c["model_type"] == "qwen3":
            yield at + "self_attn.q_norm.weight", (head_dim,), 1.2, 0.5
            yield at + "self_attn.k_norm.weight", (head_dim,), 1.2, 0.5
        yield matrix(at + "self_attn.o_proj", hidden, q_out, 1.0)
        if c.get("attention_bias"):
            yield at + "self_attn.o_proj.bias", (hidden,), 0.0, 0.5
        yield at + "post_attention_layernorm.weight", (hidden,), 1.0, 0.5
        for name, outs, ins in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            yield matrix(f"{at}mlp.{name}_proj", outs, ins, 1.5)
            if c.get("mlp_bias"):
                yield f"{at}mlp.{name}_proj.bias", (outs,), 0.0, 0.5
    yield "model.norm.weight", (hidden,), 1.0, 0.5
    if not c["tie_word_embeddings"]:
        yield matrix("lm_head", c["vocab_size"], hidden, 3.0)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32, float16 and bfloat16 arrays in the safetensors format."""
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": codes[str(tensor.dtype)], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tiny random models.")
    parser.add_argument("out", type=Path, help="a folder; each family gets one inside")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    options = parser.parse_args()
    for family in options.families or FAMILIES:
        print(make(family, options.out / family))


if __name__ == "__main__":
    main()
