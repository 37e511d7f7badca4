"""What config.json and generation_config.json mean, and what is refused with the field and its value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve_checkpoints.hf_config import HFConfig, generation_defaults, read_config

Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a Llama config with some fields changed, and a generation config if given."""

    def read(generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **fields}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_config(tmp_path)

    return read


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM is not supported. Supported are: LlamaFor"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"architectures": None}, "model_type None is not supported"),
        ({"architectures": [], "model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] is not supported"),
        ({"hidden_act": "relu"}, "hidden_act=relu is not supported; supported are silu"),
        ({"dtype": "float64"}, "dtype=float64 is not supported; choose one with --dtype"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported. Supported are: default"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor, which is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mrope_section": [1]}}, "unknown field `mrope_section`"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling is not supported: .*>= 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}},
            "all layers must share one rope",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "LlamaForCausalLM has layers of one kind"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2, "layer_types": ["full_attention"]},
            "for each of 2 layers",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            r"layer_types=\['linear_attention'\] is not supported",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_field_and_value(
    fields: dict[str, Any], message: str, read: Read
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"Expected `int` <= 4096 - at `\$.num_hidden_layers`"),
        ({"hidden_size": 0}, "`int` >= 1"),
        ({"hidden_size": "64"}, "Expected `int`, got `str`"),
        ({"vocab_size": None}, "Expected `int`, got `null`"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "Expected `bool`"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "head_dim=3 must be even"),
        ({"hidden_size": 4}, "hidden_size=4 is less than 32 heads"),
        ({"eos_token_id": 32_000}, r"eos_token_id 32000 is outside the vocabulary \(0 to 31999\)"),
        ({"eos_token_id": [2, -1]}, "eos_token_id -1 is outside"),
    ],
)
def test_what_is_malformed_is_refused(fields: dict[str, Any], message: str, read: Read) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**fields)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vocab_size": NaN}', "[" * 100_000, "\ufeff{}"])
def test_what_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid"):
        read_config(tmp_path)


@given(
    st.dictionaries(
        st.sampled_from(HFConfig.__struct_fields__),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
        | st.lists(st.integers(), max_size=2) | st.just(["Qwen2ForCausalLM"])
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.integers() | st.text()),
    )
)  # fmt: skip
def test_no_config_gives_anything_but_a_model_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]} | fields))
    try:
        config = read_config(folder)
    except CheckpointError:
        return
    assert 1 <= config.num_layers == len(config.layer_windows)
    assert config.num_heads == config.num_kv_heads * config.num_groups


def test_model_type_speaks_where_architectures_are_absent(read: Read) -> None:
    assert read(architectures=None, model_type="qwen3").architecture == "Qwen3ForCausalLM"


def test_auto_map_is_ignored_where_the_architecture_is_ours(read: Read) -> None:
    assert read(auto_map={"AutoModelForCausalLM": "evil.Model"}) == read()


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, (9, 7)),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (9, 7, 8)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({}, {"eos_token_id": 9}, (9,)),  # the family's default, 2, is a word of this vocabulary
        ({}, {}, (2,)),
        ({}, None, (2,)),
    ],
)
def test_end_of_sequence_ids_are_both_files_together(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...], read: Read
) -> None:
    assert read(generation, **config).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [({"bos_token_id": 5}, None, 5), ({"bos_token_id": 5}, {"bos_token_id": 6}, 6), ({}, {}, 1)],
)
def test_beginning_of_sequence(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: int, read: Read
) -> None:
    assert read(generation, **config).bos_token_id == expected


@pytest.mark.parametrize(
    ("fields", "rope", "max_position"),
    [
        ({"max_position_embeddings": 2048}, RopeConfig(), 2048),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4}},
            RopeConfig(kind="linear", factor=4.0),
            8192,
        ),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "dynamic", "type": "x", "factor": 2}},
            RopeConfig(kind="dynamic", factor=2.0, original_max_position=2048),
            4096,
        ),
        (
            {
                "max_position_embeddings": 131_072,
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=8192),
            131_072,
        ),
        (
            {
                "max_position_embeddings": 40_960,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            },
            RopeConfig(kind="yarn", factor=4.0, original_max_position=32_768),
            131_072,
        ),
        (
            {
                "max_position_embeddings": 8192,
                "original_max_position_embeddings": 2048,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 3e4,
                    "factor": None,
                    "attention_factor": 0.5,
                    "beta_fast": 20,
                    "beta_slow": 2,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.7,
                    "truncate": False,
                },
            },
            RopeConfig(
                theta=3e4,
                kind="yarn",
                factor=4.0,
                original_max_position=2048,
                attention_factor=0.5,
                beta_fast=20.0,
                beta_slow=2.0,
                mscale=1.0,
                mscale_all_dim=0.7,
                truncate=False,
            ),
            8192,
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 7.0}}},
            RopeConfig(theta=7.0),
            2048,
        ),
    ],
)
def test_rope_in_both_spellings(fields: dict[str, Any], rope: RopeConfig, max_position: int, read: Read) -> None:
    config = read(**fields)
    assert config.rope == rope
    assert config.max_position == max_position


def test_a_window_that_never_closes_is_no_window(read: Read) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 2}
    assert read(**mistral, sliding_window=4096, max_position_embeddings=4096).layer_windows == (None, None)
    assert read(**mistral, sliding_window=4095, max_position_embeddings=4096).layer_windows == (4095, 4095)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")],
)
def test_activations(name: str, ours: str, read: Read) -> None:
    assert read(hidden_act=name).activation == ours


@pytest.mark.parametrize(
    ("fields", "wanted", "stored", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", "float16", "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "auto", None, "float16"),
        ({"torch_dtype": "torch.float16"}, "auto", None, "float16"),
        ({}, "auto", "float16", "float16"),
        ({}, "auto", None, "float32"),
        ({"dtype": "float64"}, "bfloat16", None, "bfloat16"),
    ],
)
def test_dtype(
    fields: dict[str, Any], wanted: str, stored: str | None, expected: str, tmp_path: Path, read: Read
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **fields}))
    assert read_config(tmp_path, dtype=wanted, stored_dtype=stored).dtype == expected


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    shipped = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "max_new_tokens": 99, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped | {"_from_model_config": True}))
    assert generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 99}
    (tmp_path / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid"):
        generation_defaults(tmp_path)
