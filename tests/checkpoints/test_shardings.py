"""Logical axes over a mesh: cut where the table says, refused where they do not divide."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.rules import partition_spec, shardings
from jaxserve.parallel.specs import ArraySpec

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
)


def test_only_vocabulary_ffn_and_kv_heads_are_cut() -> None:
    spec = ArraySpec((6, 8, 10, 12, 14), "float32", ("vocab", "embed", "ffn", None, "kv_heads"))
    assert partition_spec(spec) == PartitionSpec("tp", None, "tp", None, "tp")


def test_a_decoder_over_two_devices() -> None:
    placed = shardings(decoder_specs(CONFIG), AbstractMesh((2,), ("tp",)))
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(placed))
    assert placed["embed"].spec == PartitionSpec("tp", None)
    assert placed["layers"][0]["qkv"].shard_shape((2, 4, 8, 32)) == (1, 4, 8, 32)
    assert placed["layers"][0]["mlp_norm"].is_fully_replicated


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_heads=2 cannot be divided over 4 devices\. Choose .* that divides 2"):
        shardings(decoder_specs(CONFIG), AbstractMesh((4,), ("tp",)))


def test_a_mesh_of_the_devices_there_are() -> None:
    assert make_mesh().shape == {"tp": len(jax.local_devices())}
    assert make_mesh(1).devices.tolist() == [jax.local_devices()[0]]


@pytest.mark.parametrize("count", [0, -1, 1000])
def test_a_mesh_of_other_devices_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"{count} devices were asked for, and \d+ \w+ device\(s\) are there"):
        make_mesh(count)
