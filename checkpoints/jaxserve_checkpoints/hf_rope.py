"""The rope part of `config.json` to `RopeConfig`: both spellings, five kinds, every factor.

Source: transformers 5 `modeling_rope_utils.py`; yarn is arXiv:2309.00071.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast, get_args

import msgspec
from msgspec import Meta

from jaxserve.config import RopeConfig
from jaxserve.errors import UnsupportedModelError

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
_Positive = Annotated[float, Meta(gt=0)]


class RopeFields(msgspec.Struct, forbid_unknown_fields=True):
    """`rope_parameters`, or `rope_scaling` where the kind may be called `type`.

    A field that is not here is refused: a rope that is nearly right gives text that is nearly right.
    `finetuned` is a remark of early yarn checkpoints and changes nothing.
    """

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    factor: Annotated[float, Meta(ge=1)] | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=1)] | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float | None = None
    finetuned: bool | None = None


def rope_config(fields: RopeFields, theta: float | None, max_position_embeddings: int) -> RopeConfig:
    """How positions become rotations.

    Args:
        theta: config.json's own `rope_theta`, which one among the rope's fields overrides.
        max_position_embeddings: the trained context where the rope's fields do not give it.

    Raises:
        UnsupportedModelError: another kind, a partial rotation, or a kind without its factors.
    """
    kind = fields.rope_type or fields.type or "default"
    if kind not in get_args(Kind):
        raise UnsupportedModelError(
            f"config.json: rope type {kind[:100]!r} is not supported. Supported are: {', '.join(get_args(Kind))}."
        )
    if fields.partial_rotary_factor not in (None, 1):
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor={fields.partial_rotary_factor} is not supported; only 1 is."
        )
    theta = fields.rope_theta or theta or 10_000.0
    trained = fields.original_max_position_embeddings or max_position_embeddings
    match kind:
        case "linear":
            return RopeConfig(theta=theta, kind=kind, factor=_need(fields, kind, "factor"))
        case "dynamic":
            # The reference stretches from max_position_embeddings, whatever else is given.
            factor = _need(fields, kind, "factor")
            return RopeConfig(theta=theta, kind=kind, factor=factor, original_max_position=max_position_embeddings)
        case "llama3":
            low, high = (_need(fields, kind, name) for name in ("low_freq_factor", "high_freq_factor"))
            if low >= high:
                raise UnsupportedModelError(
                    f"config.json: low_freq_factor={low} must be below high_freq_factor={high}."
                )
            factor = _need(fields, kind, "factor")
            return RopeConfig(
                theta=theta,
                kind=kind,
                factor=factor,
                original_max_position=trained,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "yarn":
            return _yarn(fields, theta, trained, max_position_embeddings)
        case _:
            return RopeConfig(theta=theta)


def context_length(rope: RopeConfig, max_position_embeddings: int) -> int:
    """The longest context, in tokens, that the stretched rope is meant for.

    vLLM's rule: yarn stretches its original context; linear and dynamic stretch
    `max_position_embeddings`; llama3's `max_position_embeddings` is the stretched length already.
    """
    match rope.kind:
        case "linear" | "dynamic":
            return int(max_position_embeddings * rope.factor)
        case "yarn":
            return int(cast(int, rope.original_max_position) * rope.factor)
        case _:
            return max_position_embeddings


def _yarn(fields: RopeFields, theta: float, trained: int, max_position_embeddings: int) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=max_position_embeddings / trained if fields.factor is None else fields.factor,
        original_max_position=trained,
        beta_fast=fields.beta_fast or 32.0,
        beta_slow=fields.beta_slow or 1.0,
        attention_factor=fields.attention_factor,
        mscale=fields.mscale,
        mscale_all_dim=fields.mscale_all_dim,
        truncate=fields.truncate,
    )


def _need(fields: RopeFields, kind: str, name: str) -> float:
    value = getattr(fields, name)
    if value is None:
        raise UnsupportedModelError(f"config.json: rope type {kind!r} needs {name}, which is missing.")
    return value
