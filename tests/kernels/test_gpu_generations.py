"""Which GPUs have kernels: others are refused by name, with the reason and what would help."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_generations
from pallas_kernels.gpu_generations import AMPERE, BLACKWELL, GENERATIONS, HOPPER, generation_here, uncovered_device
from pallas_kernels.mosaic_gpu_move import move
from pallas_kernels.ragged_paged_attention.tuning_gpu import check_tiles, default_tiles


def gpu(capability: str) -> Any:
    return SimpleNamespace(platform="gpu", compute_capability=capability)


def here(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            gpu("7.5"),
            r"compute capability is 7\.5: the kernels have 8\.0, 8\.6, 8\.9, 9\.0, 10\.0, 10\.3, 12",
        ),
        (gpu("11.0"), r"compute capability is 11\.0: the kernels have"),
        (SimpleNamespace(platform="cuda"), "compute capability is unknown"),
        (SimpleNamespace(platform="cpu"), "the device is cpu: the kernels are for NVIDIA GPUs of compute capability 8"),
    ],
)
def test_other_devices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, device: Any, message: str):
    here(monkeypatch, device)
    ids = jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="block_copy: " + message):
        move(jnp.zeros((2, 128)), None, ids, ids + 1, interpret=False, name="block_copy")
    assert uncovered_device(device) is not None


@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0", "12.0"])
def test_other_generations_than_hopper_need_a_jax_that_has_their_instructions(
    monkeypatch: pytest.MonkeyPatch, capability: str
):
    monkeypatch.setattr(gpu_generations, "_HAS_MMA", True)
    assert uncovered_device(gpu(capability)) is None
    monkeypatch.setattr(gpu_generations, "_HAS_MMA", False)
    assert uncovered_device(gpu("9.0")) is None
    name = GENERATIONS[capability].name
    expected = rf"compute capability is {capability} \({name}\) and jax {jax.__version__}: .* need jax 0\.11"
    here(monkeypatch, gpu(capability))
    with pytest.raises(ValueError, match="kv_write: " + expected):
        generation_here("kv_write", interpreted=False)


def test_kernels_are_those_of_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch):
    assert generation_here("kv_write", interpreted=False) is HOPPER, "a program may be lowered where no GPU is"
    monkeypatch.setattr(gpu_generations, "_HAS_MMA", True)
    here(monkeypatch, gpu("10.0"))
    assert generation_here("kv_write", interpreted=False) is BLACKWELL
    assert generation_here("kv_write", interpreted=True) is HOPPER


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bfloat16_fits_every_gpu(capability: str, head_dim: int):
    generation = GENERATIONS[capability]
    tiles = default_tiles(head_dim, "bfloat16", "bfloat16", generation)
    check_tiles(tiles, head_dim, "bfloat16", "bfloat16", generation)
    assert tiles.kv_tile == default_tiles(head_dim, "bfloat16", "bfloat16").kv_tile


def test_float32_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no ring fits 166912 bytes of shared memory at head_dim 128, float32"):
        default_tiles(128, "float32", "float32", AMPERE)


def test_fp8_is_refused_where_no_instruction_reads_it():
    tiles = default_tiles(128, "bfloat16", "float8_e4m3fn", AMPERE)
    message = "the cache holds float8_e4m3fn: an Ampere GPU has no instruction .* 8.9 and later .* in bfloat16"
    with pytest.raises(ValueError, match=message):
        check_tiles(tiles, 128, "bfloat16", "float8_e4m3fn", AMPERE)
    ada = GENERATIONS["8.9"]
    check_tiles(default_tiles(128, "bfloat16", "float8_e4m3fn", ada), 128, "bfloat16", "float8_e4m3fn", ada)
