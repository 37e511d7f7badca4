"""Writes the parity goldens of `tests/checkpoints/goldens/` with the reference implementation.

    python scripts/make_goldens.py [--out FOLDER] [NAME ...]

Run it with an interpreter that has torch and transformers 5; nothing that is installed or tested by
default has them. float32, eager attention, no KV cache: each greedy token comes from a full recomputation.

A family's file, `FAMILY.npz`:
    prompts          i32[total]      the prompts, one after another
    prompt_lens      i32[prompts]    1, 5, 17 and 70 tokens: beyond windows, contexts and several KV blocks
    logits           f32[total, V]   after each prompt token, each prompt alone
    greedy           i32[prompts, 32]  greedy continuation, end-of-sequence ignored
    min_margin       f32             smallest lead of a greedy token over the runner-up
    weights_sha256   str             of the family's safetensors files, in the order of their names
`long.npz` has one prompt of 131,072 tokens (u8), `positions`, `logits` after those positions, and `greedy`.
`rope.npz` has for each CASE: CASE.config (JSON), CASE.seq_len (for dynamic, else 0), CASE.inv_freq,
CASE.attention_scaling, and CASE.cos and CASE.sin, f32[positions, head_dim], at `positions`.
`config.json` lists config.json contents with few fields, and what the config and model classes make of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROOT = Path(__file__).resolve().parents[1]
PROMPT_LENS = (1, 5, 17, 70)
NUM_GREEDY = 32
# A greedy token that leads by less than this could fall to rounding; such prompts are drawn again.
MIN_MARGIN = 0.02
LONG_LEN = 131_072
LONG_POSITIONS = (0, 1, 8_191, 8_192, 65_535, 131_070, 131_071)
ROPE_POSITIONS = (0, 1, 8_191, 131_071)

_BIG = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131_072}
# The parameters of published models, whose far ends matter: Llama 3.1, Llama 3.2, Qwen2.5, DeepSeek, ...
ROPE_CASES: dict[str, dict[str, Any]] = {
    "default": _BIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "default_64": _BIG | {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "linear": _BIG | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}},
    "dynamic": _BIG
    | {"max_position_embeddings": 4096, "seq_len": 131_072}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}},
    "dynamic_inactive": _BIG
    | {"max_position_embeddings": 4096, "seq_len": 4096}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}},
    "llama3": _BIG
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "llama32": _BIG
    | {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": _BIG
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        }
    },
    "yarn_mscale": _BIG
    | {
        "head_dim": 64,
        "max_position_embeddings": 163_840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    },
    "yarn_full": _BIG
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        }
    },
}


_LLAMA, _MISTRAL = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["MistralForCausalLM"]}
_QWEN2, _QWEN3 = {"architectures": ["Qwen2ForCausalLM"]}, {"architectures": ["Qwen3ForCausalLM"]}
# Defaults, and the fields that defaults depend on.
CONFIG_CASES: tuple[dict[str, Any], ...] = (
    _LLAMA,
    _LLAMA | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": None, "head_dim": None},
    _LLAMA | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24},
    _LLAMA | {"attention_bias": True, "mlp_bias": True, "eos_token_id": [5, 9], "bos_token_id": None},
    _LLAMA | {"rope_theta": 250000.0, "eos_token_id": None, "tie_word_embeddings": True},
    _LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}, "rope_theta": 9000.0},
    _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 9000.0},
    _MISTRAL,
    _MISTRAL | {"sliding_window": None, "num_key_value_heads": 4, "num_hidden_layers": 3},
    _MISTRAL | {"sliding_window": 100, "num_hidden_layers": 3, "head_dim": 64},
    _QWEN2,
    _QWEN2 | {"use_sliding_window": True, "num_hidden_layers": 30},
    _QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "num_hidden_layers": 4},
    _QWEN2 | {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2, "num_hidden_layers": 4},
    _QWEN2
    | {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 2}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    _QWEN3,
    _QWEN3 | {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "attention_bias": True},
)


def load_tiny_models() -> Any:
    """The script beside this one, as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_models", ROOT / "scripts" / "make_tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(folder: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """f32[tokens, V], from one forward pass without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def continue_greedily(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """The greedy tokens and the smallest lead among them."""
    tokens, margin = list(prompt), float("inf")
    for _ in range(num_tokens):
        best = torch.topk(logits_of(model, tokens)[-1], 2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], margin


def draw_prompt(model: Any, length: int, draws: np.random.Generator) -> tuple[list[int], list[int], float]:
    """A random prompt whose greedy continuation has no near ties."""
    for _ in range(200):
        prompt = draws.integers(0, model.config.vocab_size, length).tolist()
        greedy, margin = continue_greedily(model, prompt, NUM_GREEDY)
        if margin >= MIN_MARGIN:
            return prompt, greedy, margin
    raise SystemExit(f"no prompt of {length} tokens has a margin of {MIN_MARGIN}")


def family_golden(folder: Path) -> dict[str, Any]:
    model = reference(folder, "eager")
    draws = np.random.default_rng(7)
    drawn = [draw_prompt(model, length, draws) for length in PROMPT_LENS]
    prompts, greedy, margins = zip(*drawn, strict=True)
    logits = torch.cat([logits_of(model, prompt) for prompt in prompts]).numpy()
    distinct = {token for tokens in greedy for token in tokens}
    print(f"  logits {logits.std():.2f} wide, margin {min(margins):.3f}, {len(distinct)} distinct tokens")
    return {
        "prompts": np.concatenate(prompts).astype(np.int32),
        "prompt_lens": np.array(PROMPT_LENS, np.int32),
        "logits": logits,
        "greedy": np.array(greedy, np.int32),
        "min_margin": np.float32(min(margins)),
        "weights_sha256": weights_sha256(folder),
    }


def long_golden(folder: Path) -> dict[str, Any]:
    """One prompt over the whole context; fused attention, as eager's scores would take 137 GB a layer."""
    model = reference(folder, "sdpa")
    prompt = np.random.default_rng(11).integers(0, model.config.vocab_size, LONG_LEN)
    cache = transformers.DynamicCache(config=model.config)
    hidden = model.model(torch.tensor(prompt)[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
    logits = model.lm_head(hidden[list(LONG_POSITIONS)])
    greedy, margins = [], []
    step = logits[-1]
    for _ in range(8):
        best = torch.topk(step, 2)
        margins.append(float(best.values[0] - best.values[1]))
        greedy.append(int(best.indices[0]))
        step = model(torch.tensor([[greedy[-1]]]), past_key_values=cache, use_cache=True).logits[0, -1]
    print(f"  logits {logits.std():.2f} wide, margin {min(margins):.3f}")
    return {
        "prompt": prompt.astype(np.uint8),
        "positions": np.array(LONG_POSITIONS, np.int32),
        "logits": logits.numpy(),
        "greedy": np.array(greedy, np.int32),
        "min_margin": np.float32(min(margins)),
        "weights_sha256": weights_sha256(folder),
    }


def rope_golden() -> dict[str, Any]:
    found: dict[str, Any] = {"positions": np.array(ROPE_POSITIONS, np.int32), "cases": np.array(list(ROPE_CASES))}
    for name, case in ROPE_CASES.items():
        fields = {key: value for key, value in case.items() if key != "seq_len"}
        config = LlamaConfig(**json.loads(json.dumps(fields)))
        rope_type = config.rope_parameters["rope_type"]
        if rope_type == "default":
            inv_freq, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=case.get("seq_len"))
        # What LlamaRotaryEmbedding.forward does with them.
        angles = torch.tensor(ROPE_POSITIONS)[:, None].float() * inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        found |= {
            f"{name}.config": json.dumps(fields | {"architectures": ["LlamaForCausalLM"]}),
            f"{name}.seq_len": np.int32(case.get("seq_len", 0)),
            f"{name}.inv_freq": inv_freq.numpy(),
            f"{name}.attention_scaling": np.float32(scaling),
            f"{name}.cos": (angles.cos() * scaling).numpy(),
            f"{name}.sin": (angles.sin() * scaling).numpy(),
        }
    return found


def config_golden() -> list[dict[str, Any]]:
    cases = []
    for case in CONFIG_CASES:
        family = case["architectures"][0].removesuffix("ForCausalLM")
        config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(case)))
        # One layer of the real model says where biases are; the meta device allocates nothing.
        with torch.device("meta"):
            small = getattr(transformers, f"{family}Config")(**case | {"num_hidden_layers": 1, "layer_types": None})
            layer = getattr(transformers, f"{family}Model")(small).layers[0]
        heads = config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        eos = config.eos_token_id
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        resolved = {name: getattr(config, name) for name in names.split()} | {
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": [] if eos is None else [eos] if isinstance(eos, int) else eos,
            "windows": [window if kind == "sliding_attention" else None for kind in kinds],
            "rope_theta": config.rope_parameters["rope_theta"],
            "rope_type": config.rope_parameters["rope_type"],
            "qkv_bias": layer.self_attn.q_proj.bias is not None,
            "o_bias": layer.self_attn.o_proj.bias is not None,
            "mlp_bias": layer.mlp.gate_proj.bias is not None,
        }
        cases.append({"config": case, "resolved": resolved})
    return cases


@torch.no_grad()
def main() -> None:
    tiny = load_tiny_models()
    names = [*tiny.FAMILIES, "rope", "config"]
    parser = argparse.ArgumentParser(description="Write the parity goldens.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "checkpoints" / "goldens")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made_by = {"made_by": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names or names:
            print(name)
            if name == "config":
                lines = ",\n".join(json.dumps(case) for case in config_golden())
                (options.out / "config.json").write_text(f"[\n{lines}\n]\n")
                continue
            if name == "rope":
                golden = rope_golden()
            else:
                folder = tiny.make(name, Path(scratch) / name)
                golden = long_golden(folder) if name == "long" else family_golden(folder)
            np.savez_compressed(options.out / f"{name}.npz", **golden, **made_by)


if __name__ == "__main__":
    main()
