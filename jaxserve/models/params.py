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

from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.parallel.rules import check_divides
from jaxserve.parallel.specs import ArraySpec


def decoder_specs(config: ModelConfig, num_devices: int = 1) -> dict[str, Any]:
    """The tree of ArraySpec for `config`.

    Args:
        num_devices: that the model will be cut over; what is theirs together is what is said here.

    Returns:
        {"embed": [V, D], "layers": (one dict a layer, ...), "final_norm": [D], "lm_head": matrix}
        with `lm_head` absent when the embedding is tied.

    Raises:
        ConfigError: the model cannot be cut over so many devices.
    """
    check_divides(config, num_devices)
    c = config
    vocab = c.vocab_size + -c.vocab_size % num_devices
    num_kv = c.num_kv_heads_over(num_devices)
    specs: dict[str, Any] = {
        "embed": ArraySpec((vocab, c.hidden_size), c.dtype, ("vocab", "embed")),
        "layers": tuple(_layer_specs(c, num_kv) for _ in range(c.num_layers)),
        "final_norm": ArraySpec((c.hidden_size,), c.dtype, ("embed",), "ones"),
    }
    if not c.tied_embeddings:
        specs["lm_head"] = _matrix(c, (c.hidden_size,), ("embed",), (vocab,), ("vocab",))
    return specs


def _layer_specs(c: ModelConfig, num_kv: int) -> dict[str, ArraySpec]:
    num_groups = c.num_heads // num_kv
    heads = (num_kv, num_groups + 2, c.head_dim)
    head_axes = ("kv_heads", None, "head_dim")
    out_heads = (num_kv, num_groups, c.head_dim)
    specs = {
        "attn_norm": ArraySpec((c.hidden_size,), c.dtype, ("embed",), "ones"),
        "qkv": _matrix(c, (c.hidden_size,), ("embed",), heads, head_axes),
        "o": _matrix(c, out_heads, head_axes, (c.hidden_size,), ("embed",)),
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
