"""Writes a demo model as the Hugging Face folder that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from demo_training.tokenizer import save_tokenizer
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params


def hf_tensors(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """float32 tensors under Hugging Face names, matrices as [out, in], queries in head order k * G + g."""
    groups, hidden = config.num_groups, config.hidden_size
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    for index, layer in enumerate(params["layers"]):
        qkv = np.asarray(layer["qkv"])  # [K, G + 2, H, D]
        parts = {
            "self_attn.q_proj": qkv[:, :groups],
            "self_attn.k_proj": qkv[:, groups],
            "self_attn.v_proj": qkv[:, groups + 1],
            "mlp.gate_proj": layer["gate_up"][0],
            "mlp.up_proj": layer["gate_up"][1],
        }
        named = {name: np.asarray(part).reshape(-1, hidden) for name, part in parts.items()}
        named["self_attn.o_proj"] = np.asarray(layer["o"]).reshape(hidden, -1)
        named["mlp.down_proj"] = np.asarray(layer["down"])
        named["input_layernorm"] = layer["attn_norm"]
        named["post_attention_layernorm"] = layer["mlp_norm"]
        tensors |= {f"model.layers.{index}.{name}.weight": array for name, array in named.items()}
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}


def read_params(folder: Path, config: ModelConfig) -> Params:
    """The float32 parameter tree of a folder that `write_folder` wrote."""
    found = {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}
    return {
        "embed": found["model.embed_tokens.weight"],
        "layers": tuple(_read_layer(found, f"model.layers.{index}", config) for index in range(config.num_layers)),
        "final_norm": found["model.norm.weight"],
    }


def _read_layer(found: dict[str, np.ndarray], prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    kv_heads, head_dim, hidden = config.num_kv_heads, config.head_dim, config.hidden_size

    def matrix(name: str) -> np.ndarray:
        return found[f"{prefix}.{name}.weight"]

    heads = [matrix(f"self_attn.{name}_proj").reshape(kv_heads, -1, head_dim, hidden) for name in "qkv"]
    return {
        "attn_norm": found[f"{prefix}.input_layernorm.weight"],
        "qkv": np.concatenate(heads, axis=1),
        "o": matrix("self_attn.o_proj").reshape(hidden, kv_heads, config.num_groups, head_dim),
        "mlp_norm": found[f"{prefix}.post_attention_layernorm.weight"],
        "gate_up": np.stack([matrix("mlp.gate_proj"), matrix("mlp.up_proj")]),
        "down": matrix("mlp.down_proj"),
    }


def hf_config(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "bfloat16",
    }


def write_folder(folder: Path, params: Params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """config.json, model.safetensors (bfloat16), the tokenizer's files and generation_config.json."""
    save_tokenizer(tokenizer, folder, config.max_position)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in hf_tensors(params, config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    _write_json(folder / "config.json", hf_config(config))
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    _write_json(folder / "generation_config.json", ends | sampling)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
