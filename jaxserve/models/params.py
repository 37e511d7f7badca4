"""The spec tree of the one decoder: every parameter's name, shape, axes and layout.

Matrices are `[out, in]` in every dtype. XLA:CPU's fast 16-bit dot contracts the last axes of both operands
(238 against 37 GFLOP/s at 32 rows). Its float32 dot is a tenth to a quarter faster over `[in, out]` at 4 to 32
rows and no faster from 48 rows on, but there its bits change with the number of rows; over `[out, in]` they are
the same from two rows up. Elsewhere the compiler chooses layouts itself.

Fused tensors keep what belongs to one kv head together, so that sharding `kv_heads` (or `ffn`) over a
mesh axis needs no reshuffling: `qkv` holds, per kv head, its G query heads, then k, then v; `gate_up`
holds gate (0) and up (1).

Over more devices than there are kv heads, each kv head is held by several, which share its query heads: the tree is
that of a model with one kv head a device, some of which are equal. A vocabulary that does not divide is padded with
rows that nothing reads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.parallel.rules import check_divides
from jaxserve.parallel.specs import ArraySpec, map_specs
from pallas_kernels.linear.api import PanelMatrix, to_panels


def decoder_specs(config: ModelConfig, num_devices: int = 1, *, stacked: bool = False) -> dict[str, Any]:
    """The tree of ArraySpec for `config`.

    Args:
        num_devices: that the model will be cut over; what is theirs together is what is said here.
        stacked: "layers" is one dict, its arrays with all layers along a first axis.

    Returns:
        {"embed": [V, D], "layers": (one dict a layer, ...), "final_norm": [D], "lm_head": matrix}
        with `lm_head` absent when the embedding is tied.

    Raises:
        ConfigError: the model cannot be cut over so many devices.
    """
    check_divides(config, num_devices)
    c = config
    vocab = c.vocab_size + -c.vocab_size % num_devices
    layer = _layer_specs(c, c.num_kv_heads_over(num_devices), flat_heads=stacked)
    specs: dict[str, Any] = {
        "embed": ArraySpec((vocab, c.hidden_size), c.dtype, ("vocab", "embed")),
        "layers": _stacked(layer, c.num_layers) if stacked else (layer,) * c.num_layers,
        "final_norm": ArraySpec((c.hidden_size,), c.dtype, ("embed",), "ones"),
    }
    if not c.tied_embeddings:
        specs["lm_head"] = _matrix(c, (c.hidden_size,), ("embed",), (vocab,), ("vocab",))
    return specs


class LayersChoice(NamedTuple):
    """Whether layers are stacked, and why."""

    stacked: bool
    reason: str


def choose_layers(config: ModelConfig, asked: bool | None) -> LayersChoice:
    """Whether the layers of a model are stacked. Its loader and its engine ask the same.

    Args:
        asked: `EngineConfig.stacked_layers`.

    Raises:
        ConfigError: stacked layers were asked for, and they are not all one program.
    """
    if not asked:
        return LayersChoice(False, "the default" if asked is None else "asked for")
    if len(set(config.layer_windows)) > 1:
        found = ", ".join("none" if w is None else str(w) for w in dict.fromkeys(config.layer_windows))
        raise ConfigError(
            f"stacked_layers cannot be had: the layers' attention windows differ ({found}), and those of a stack run "
            "as one program. Set stacked_layers to False (--no-stacked-layers)."
        )
    return LayersChoice(True, "asked for")


def are_stacked(params: dict[str, Any]) -> bool:
    """Whether parameters, or their specs, are those of stacked layers."""
    return isinstance(params["layers"], dict)


def are_in_panels(params: dict[str, Any]) -> bool:
    """Whether parameters lie as the CPU's kernels read them (`in_panels`)."""
    return isinstance(params["embed"], PanelMatrix)


def in_panels(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters of one device, layers not stacked, each matrix in panels.

    Donates: params. Each matrix is freed as soon as it has been turned.
    """

    def turn(name: str, array: jax.Array) -> Any:
        if array.ndim < 2 or name.endswith("bias"):
            return array
        num_in_axes = array.ndim - 1 if name == "o" else 1
        turned = jax.block_until_ready(to_panels(array, num_in_axes=num_in_axes))
        array.delete()
        return turned

    layers = tuple({name: turn(name, array) for name, array in layer.items()} for layer in params["layers"])
    return {name: layers if name == "layers" else turn(name, array) for name, array in params.items()}


def check_stacked(params: dict[str, Any], config: ModelConfig, asked: bool | None) -> None:
    """Whether parameters are of the form that `choose_layers` has for an engine's.

    Raises:
        ConfigError: they are of the other one.
    """
    wanted = choose_layers(config, asked).stacked
    if are_stacked(params) != wanted:
        found = "stacked" if are_stacked(params) else "not stacked"
        raise ConfigError(
            f"The parameters' layers are {found} and stacked_layers={asked}. "
            f"Load them with load_model(..., stacked_layers={wanted})."
        )


def _stacked(layer: dict[str, ArraySpec], num_layers: int) -> dict[str, ArraySpec]:
    return map_specs(lambda s: replace(s, shape=(num_layers, *s.shape), axes=("layers", *s.axes)), layer)


def _layer_specs(c: ModelConfig, num_kv: int, *, flat_heads: bool) -> dict[str, ArraySpec]:
    """Of one layer. With `flat_heads` the heads that `o` takes are one axis: a TPU's tiles of [G, H] hold G rows where
    eight fit, and a product in a loop does not read such a slice in place (a third of a layer's cycles on a v6e)."""
    num_groups = c.num_heads // num_kv
    heads = (num_kv, num_groups + 2, c.head_dim)
    head_axes = ("kv_heads", None, "head_dim")
    outs = ((num_kv, num_groups, c.head_dim), head_axes)
    if flat_heads:
        outs = ((math.prod(outs[0]),), ("kv_heads",))
    specs = {
        "attn_norm": ArraySpec((c.hidden_size,), c.dtype, ("embed",), "ones"),
        "qkv": _matrix(c, (c.hidden_size,), ("embed",), heads, head_axes),
        "o": _matrix(c, *outs, (c.hidden_size,), ("embed",)),
        "mlp_norm": ArraySpec((c.hidden_size,), c.dtype, ("embed",), "ones"),
        "gate_up": _matrix(c, (c.hidden_size,), ("embed",), (2, c.intermediate_size), (None, "ffn")),
        "down": _matrix(c, (c.intermediate_size,), ("ffn",), (c.hidden_size,), ("embed",)),
    }
    if c.qk_norm:
        specs["q_norm"] = ArraySpec((c.head_dim,), c.dtype, ("head_dim",), "ones")
        specs["k_norm"] = ArraySpec((c.head_dim,), c.dtype, ("head_dim",), "ones")
    if c.qkv_bias:
        specs["qkv_bias"] = ArraySpec(heads, c.dtype, head_axes, "zeros")
    if c.o_bias:
        specs["o_bias"] = ArraySpec((c.hidden_size,), c.dtype, ("embed",), "zeros")
    if c.mlp_bias:
        specs["gate_up_bias"] = ArraySpec((2, c.intermediate_size), c.dtype, (None, "ffn"), "zeros")
        specs["down_bias"] = ArraySpec((c.hidden_size,), c.dtype, ("embed",), "zeros")
    return specs


def _matrix(
    c: ModelConfig,
    ins: tuple[int, ...],
    in_axes: tuple[str | None, ...],
    outs: tuple[int, ...],
    out_axes: tuple[str | None, ...],
) -> ArraySpec:
    return ArraySpec(outs + ins, c.dtype, out_axes + in_axes)
