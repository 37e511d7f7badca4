"""Which tiny models the tests are of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TOKENS = 16  # a step
# By family: kv heads for eight query heads, and what else differs from `scripts/make_tiny_models.py`.
FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama31": {"num_key_value_heads": 8, "num_hidden_layers": 2},
        "smollm": {"num_key_value_heads": 1, "hidden_size": 64, "num_hidden_layers": 2},
        "mistral": {"num_key_value_heads": 2, "vocab_size": 157, "num_hidden_layers": 2},  # padded
        "qwen2_window": {"num_key_value_heads": 4, "num_hidden_layers": 2},
        "qwen3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 163},  # padded
        "llama_bias": {"num_key_value_heads": 4},
    }
)
