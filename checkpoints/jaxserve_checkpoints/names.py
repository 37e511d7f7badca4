"""The one table of Hugging Face tensor names and their places in our parameter tree.

Owns names, shapes and views; reads no file and touches no array. Hugging Face stores a matrix `[out, in]`;
a fused leaf of ours holds several of them (`jaxserve.models.params`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.parallel.specs import ArraySpec

Part = Literal["all", "q", "k", "v", "gate", "up"]
TreePath = tuple[str | int, ...]

# name -> (our leaf, which part of it, how many leading axes of the leaf's [out..., in...] shape are outputs).
# The names of a layer follow "model.layers.N.".
TOP: Mapping[str, tuple[str, Part, int]] = {
    "model.embed_tokens.weight": ("embed", "all", 1),
    "model.norm.weight": ("final_norm", "all", 1),
    "lm_head.weight": ("lm_head", "all", 1),
}
LAYER: Mapping[str, tuple[str, Part, int]] = {
    "input_layernorm.weight": ("attn_norm", "all", 1),
    "self_attn.q_proj.weight": ("qkv", "q", 3),
    "self_attn.k_proj.weight": ("qkv", "k", 3),
    "self_attn.v_proj.weight": ("qkv", "v", 3),
    "self_attn.q_proj.bias": ("qkv_bias", "q", 3),
    "self_attn.k_proj.bias": ("qkv_bias", "k", 3),
    "self_attn.v_proj.bias": ("qkv_bias", "v", 3),
    "self_attn.q_norm.weight": ("q_norm", "all", 1),
    "self_attn.k_norm.weight": ("k_norm", "all", 1),
    "self_attn.o_proj.weight": ("o", "all", 1),
    "self_attn.o_proj.bias": ("o_bias", "all", 1),
    "post_attention_layernorm.weight": ("mlp_norm", "all", 1),
    "mlp.gate_proj.weight": ("gate_up", "gate", 2),
    "mlp.up_proj.weight": ("gate_up", "up", 2),
    "mlp.gate_proj.bias": ("gate_up_bias", "gate", 2),
    "mlp.up_proj.bias": ("gate_up_bias", "up", 2),
    "mlp.down_proj.weight": ("down", "all", 1),
    "mlp.down_proj.bias": ("down_bias", "all", 1),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one Hugging Face tensor goes.

    Attributes:
        name: the tensor's full name.
        shape: the shape that it must have in the file.
        index: of the leaf, as it is stored: the part that the tensor fills.
        view_shape: `tensor.reshape(view_shape)` has the order of `leaf[index]`, and copies nothing.
        copies: how many entries of `leaf[index]` along its first axis are each of the tensor's: over more devices than
            kv heads, several hold one. Entries past the tensor's last are padding.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]
    view_shape: tuple[int, ...]
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of our tree and the tensors that fill it."""

    path: TreePath
    spec: ArraySpec
    places: tuple[Place, ...]


def leaves(specs: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[Leaf]:
    """Every leaf of a decoder's spec tree with its places, in the order of the model's layers.

    Args:
        specs: over as many devices as there are.
        stored: the same model's on one device.
    """
    yield from _group(specs, stored, TOP, (), "")
    for number, (layer, on_one) in enumerate(zip(specs["layers"], stored["layers"], strict=True)):
        yield from _group(layer, on_one, LAYER, ("layers", number), f"model.layers.{number}.")


def is_ignorable(name: str, *, tied: bool) -> bool:
    """Whether a tensor that no place asks for may stand in a checkpoint.

    Rope frequencies were saved as buffers by early exports and are computed from the config here; a tied
    model's head is the embedding, whatever copy of it was saved.
    """
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _group(
    specs: Mapping[str, Any],
    stored: Mapping[str, Any],
    table: Mapping[str, tuple[str, Part, int]],
    path: TreePath,
    prefix: str,
) -> Iterator[Leaf]:
    places: dict[str, list[Place]] = {}
    for name, (leaf, part, num_outs) in table.items():
        if leaf in specs:
            place = _place(prefix + name, specs[leaf].shape, stored[leaf].shape, part, num_outs)
            places.setdefault(leaf, []).append(place)
    assert places.keys() == specs.keys() - {"layers"}, f"no Hugging Face name for {specs.keys() - places.keys()}"
    for leaf, found in places.items():
        yield Leaf((*path, leaf), specs[leaf], tuple(found))


def _place(name: str, shape: tuple[int, ...], stored: tuple[int, ...], part: Part, num_outs: int) -> Place:
    index = _part_index(part, num_groups=shape[1] - 2 if part in ("q", "k", "v") else 0)
    outs = _indexed_shape(shape[:num_outs], index)
    if part in ("k", "v", "all"):  # fewer kv heads than devices; a vocabulary without its padding
        outs = (stored[0], *outs[1:])
    file_shape = (math.prod(outs), math.prod(shape[num_outs:])) if num_outs < len(shape) else (math.prod(outs),)
    copies = shape[0] // stored[0] if part in ("k", "v") else 1
    return Place(name, file_shape, index, outs + shape[num_outs:], copies)


def _part_index(part: Part, num_groups: int) -> tuple[int | slice, ...]:
    match part:
        case "all":
            return ()
        case "q":
            return (slice(None), slice(0, num_groups))
        case "k":
            return (slice(None), num_groups)
        case "v":
            return (slice(None), num_groups + 1)
        case "gate":
            return (0,)
        case "up":
            return (1,)


def _indexed_shape(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of an array of `shape` after `[index]`."""
    kept = []
    for axis, size in enumerate(shape):
        at = index[axis] if axis < len(index) else slice(None)
        if isinstance(at, slice):
            kept.append(len(range(*at.indices(size))))
    return tuple(kept)
