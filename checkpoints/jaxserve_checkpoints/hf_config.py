"""`config.json` and `generation_config.json` to `ModelConfig`, by an explicit schema.

Owns what a field means in each family and what is refused. It knows nothing of weights. No code of a
checkpoint is ever run: `auto_map` is not in the schema, so it is ignored where the architecture is one of
ours, and the architecture is refused by name where it is not.

Source: the config classes of transformers 5 (`models/{llama,mistral,qwen2,qwen3}/configuration_*.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from jaxserve.config import DType, ModelConfig
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxserve_checkpoints.hf_rope import RopeFields, context_length, rope_config

MAX_JSON_BYTES = 16 * 2**20
ACTIVATIONS: Mapping[str, Literal["silu", "gelu", "gelu_tanh"]] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)

_Schema = TypeVar("_Schema", bound=msgspec.Struct)

# Bounds that keep a hostile config from making us allocate: far above any dense model that exists.
_Layers = Annotated[int, Meta(ge=1, le=4096)]
_Heads = Annotated[int, Meta(ge=1, le=65_536)]
_Width = Annotated[int, Meta(ge=1, le=2**24)]
_Tokens = Annotated[int, Meta(ge=1, le=2**30)]
_TokenIds = int | list[int] | None


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: how it differs from the others, and the defaults of its config class."""

    model_type: str
    defaults: Mapping[str, Any]
    biases: Literal["none", "qkv", "attention_bias"]  # "attention_bias": the field says, for q, k, v and o
    mlp_bias: bool = False  # the field `mlp_bias` is honoured
    qk_norm: bool = False
    window: Literal["none", "all_layers", "layer_types"] = "none"


_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA = _COMMON | {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048}
_LLAMA |= {"bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = _LLAMA | {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
_MISTRAL |= {"sliding_window": 4096}
_QWEN = _COMMON | {"vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
_QWEN |= {"num_key_value_heads": 32, "sliding_window": 4096}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family("llama", _LLAMA, "attention_bias", mlp_bias=True),
        "MistralForCausalLM": Family("mistral", _MISTRAL, "none", window="all_layers"),
        "Qwen2ForCausalLM": Family("qwen2", _QWEN, "qkv", window="layer_types"),
        "Qwen3ForCausalLM": Family(
            "qwen3", _QWEN | {"head_dim": 128}, "attention_bias", qk_norm=True, window="layer_types"
        ),
    }
)
# Fields that change the model's arithmetic in ways we do not have, and the values that mean "off".
CONFIG_FILE = "config.json"
_OFF: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "quantization_config": (None, {}),
        "partial_rotary_factor": (None, 1),
        "rope_interleaved": (None, False),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "no_rope_layers": (None, []),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
    }
)


class HFConfig(msgspec.Struct):
    """The fields of `config.json` that are read. Others are ignored, as transformers ignores them."""

    architectures: list[str] | None = None
    model_type: str | None = None
    vocab_size: _Width | UnsetType = UNSET
    hidden_size: _Width | UnsetType = UNSET
    intermediate_size: _Width | UnsetType = UNSET
    num_hidden_layers: _Layers | UnsetType = UNSET
    num_attention_heads: _Heads | UnsetType = UNSET
    num_key_value_heads: _Heads | UnsetType | None = UNSET
    head_dim: _Heads | UnsetType | None = UNSET
    max_position_embeddings: _Tokens | UnsetType = UNSET
    original_max_position_embeddings: _Tokens | None = None
    rms_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: _Tokens | UnsetType | None = UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_theta: Annotated[float, Meta(gt=0)] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    bos_token_id: int | UnsetType | None = UNSET
    eos_token_id: _TokenIds | UnsetType = UNSET
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: Any = None
    partial_rotary_factor: float | None = None
    rope_interleaved: bool | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    no_rope_layers: list[int] | None = None
    is_encoder_decoder: bool | None = None
    add_cross_attention: bool | None = None


class GenerationConfig(msgspec.Struct):
    """The fields of `generation_config.json` that are read."""

    bos_token_id: int | UnsetType | None = UNSET
    eos_token_id: _TokenIds | UnsetType = UNSET
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_config(folder: Path, *, dtype: str = "auto", stored_dtype: str | None = None) -> ModelConfig:
    """The model that a Hugging Face folder's JSON files describe.

    Args:
        dtype: of the weights as served; "auto" takes the checkpoint's.
        stored_dtype: what "auto" falls back on when config.json names no dtype, as early ones do not.

    Raises:
        UnsupportedModelError: an architecture or feature that is not implemented; named, with its value.
        CheckpointError: a file that is absent, is not JSON or breaks the schema.
    """
    fields = _read_json(folder / CONFIG_FILE, HFConfig)
    generation = _read_generation(folder)
    name, family = _family(fields)
    for field, off in _OFF.items():
        if (value := getattr(fields, field)) not in off:
            raise _unsupported(field, value, f"{name} is served without it")
    served = _dtype(dtype, fields, stored_dtype)
    try:
        return _model_config(name, family, fields, generation, served)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _model_config(
    name: str, family: Family, fields: HFConfig, generation: GenerationConfig, dtype: DType
) -> ModelConfig:
    get = _getter(fields, family)
    num_layers, num_heads, vocab_size = get("num_hidden_layers"), get("num_attention_heads"), get("vocab_size")
    rope = rope_config(_rope_fields(fields), fields.rope_theta, get("max_position_embeddings"))
    max_position = context_length(rope, get("max_position_embeddings"))
    biased = family.biases == "attention_bias" and fields.attention_bias
    head_dim = get("head_dim") or get("hidden_size") // num_heads
    if not head_dim:
        raise CheckpointError(f"config.json: hidden_size={get('hidden_size')} is less than {num_heads} heads.")
    return ModelConfig(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=get("hidden_size"),
        intermediate_size=get("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.rms_norm_eps,
        activation=_activation(fields.hidden_act),
        rope=rope,
        layer_windows=_windows(name, family, fields, get("sliding_window"), num_layers, max_position),
        qkv_bias=biased or family.biases == "qkv",
        o_bias=biased,
        mlp_bias=family.mlp_bias and fields.mlp_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=fields.tie_word_embeddings,
        bos_token_id=_first_set(generation.bos_token_id, fields.bos_token_id, get("bos_token_id")),
        eos_token_ids=_eos_token_ids(generation.eos_token_id, fields.eos_token_id, get("eos_token_id"), vocab_size),
        dtype=dtype,
    )


def generation_defaults(folder: Path) -> dict[str, int | float]:
    """The sampling defaults that a model's authors ship, by SamplingParams' names.

    `max_new_tokens` becomes `max_tokens`, as with vLLM's `--generation-config auto`; `do_sample` is not
    read, as there. Empty without a `generation_config.json`.
    """
    generation = _read_generation(folder)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: getattr(generation, name) for name in names} | {"max_tokens": generation.max_new_tokens}
    return {name: value for name, value in found.items() if value is not None}


def _read_generation(folder: Path) -> GenerationConfig:
    path = folder / "generation_config.json"
    return _read_json(path, GenerationConfig) if path.exists() else GenerationConfig()


def _read_json(path: Path, schema: type[_Schema]) -> _Schema:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} has more than {MAX_JSON_BYTES} bytes.")
        return msgspec.json.decode(path.read_bytes(), type=schema)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent.name}/ has no {path.name}: it is not a model's folder.") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid: {str(error)[:200]}") from None


def _family(fields: HFConfig) -> tuple[str, Family]:
    """The first supported architecture; without `architectures`, the one of `model_type`."""
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    names = fields.architectures or [by_type.get(fields.model_type or "", f"model_type {fields.model_type!r}")]
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    raise UnsupportedModelError(
        f"The architecture {', '.join(name[:100] for name in names)} is not supported. Supported are: "
        f"{', '.join(FAMILIES)}."
    )


def _getter(fields: HFConfig, family: Family) -> Any:
    """Reads a field; where the file does not have it, the family's default."""

    def get(name: str) -> Any:
        value = getattr(fields, name)
        return family.defaults.get(name) if value is UNSET else value

    return get


def _unsupported(field: str, value: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {field}={str(value)[:200]} is not supported; {why}.")


def _rope_fields(fields: HFConfig) -> RopeFields:
    """`rope_scaling` (transformers 4) goes before `rope_parameters` (5), as in the reference."""
    name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    raw = dict(getattr(fields, name) or {})
    if raw and all(isinstance(value, dict) for value in raw.values()):
        first, *others = raw.values()  # one entry a layer type
        if any(other != first for other in others):
            raise _unsupported(name, raw, "all layers must share one rope")
        raw = dict(first)
    if fields.original_max_position_embeddings is not None:
        raw["original_max_position_embeddings"] = fields.original_max_position_embeddings
    try:
        return msgspec.convert(raw, RopeFields)
    except msgspec.ValidationError as error:
        raise UnsupportedModelError(f"config.json: {name} is not supported: {error}") from None


def _activation(name: str) -> Literal["silu", "gelu", "gelu_tanh"]:
    if name not in ACTIVATIONS:
        raise _unsupported("hidden_act", name, f"supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(
    name: str, family: Family, fields: HFConfig, window: int | None, num_layers: int, max_position: int
) -> tuple[int | None, ...]:
    """How far back each layer looks; None for a window that never closes."""
    if window is not None and window >= max_position:
        window = None
    if family.window == "layer_types" and fields.layer_types is not None:
        return _typed_windows(fields.layer_types, window if fields.use_sliding_window else None, num_layers)
    if fields.layer_types and len(set(fields.layer_types)) > 1:
        raise _unsupported("layer_types", fields.layer_types, f"{name} has layers of one kind")
    match family.window:
        case "none":
            return (None,) * num_layers
        case "all_layers":
            return (window,) * num_layers
        case "layer_types":
            window = window if fields.use_sliding_window else None
            return tuple(window if layer >= fields.max_window_layers else None for layer in range(num_layers))


def _typed_windows(kinds: list[str], window: int | None, num_layers: int) -> tuple[int | None, ...]:
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        why = f"it must name full_attention or sliding_attention for each of {num_layers} layers"
        raise _unsupported("layer_types", kinds, why)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _first_set(*values: int | UnsetType | None) -> int | None:
    """The first value that a file gives; null counts as nothing."""
    return next((value for value in values if isinstance(value, int)), None)


def _eos_token_ids(
    generation: _TokenIds | UnsetType, config: _TokenIds | UnsetType, default: _TokenIds, vocab_size: int
) -> tuple[int, ...]:
    """Both files' ids, generation_config's first; the family's default only where neither file speaks."""
    given = [value for value in (generation, config) if value is not UNSET] or [default]
    ids: list[int] = []
    for value in given:
        ids += [] if value is None else [value] if isinstance(value, int) else cast(list[int], value)
    if outside := [token for token in ids if not 0 <= token < vocab_size]:
        raise CheckpointError(
            f"eos_token_id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1}). "
            "Correct config.json or generation_config.json."
        )
    return tuple(dict.fromkeys(ids))


def _dtype(wanted: str, fields: HFConfig, stored: str | None) -> DType:
    if wanted not in ("auto", *get_args(DType)):
        raise ConfigError(f"dtype must be auto, {', '.join(get_args(DType))}; got {wanted!r}.")
    if wanted == "auto":
        wanted = (fields.dtype or fields.torch_dtype or stored or "float32").removeprefix("torch.")
    if wanted not in get_args(DType):
        raise _unsupported("dtype", wanted, "choose one with --dtype float32, bfloat16 or float16")
    return cast(DType, wanted)
