"""Every tensor in its place, in every dtype and layout; one report of all that does not fit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError, WeightsError
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import is_spec
from jaxserve_checkpoints.convert import convert
from jaxserve_checkpoints.load import aligned_empty, load_model
from jaxserve_checkpoints.stacking import LayerStacks

KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
Folder = Callable[[str], Path]
Unfuse = Callable[[Any, ModelConfig], dict[str, np.ndarray]]


def rewrite(
    tiny: ModuleType, out: Path, family: str, tensors: dict[str, np.ndarray] | None = None, **config: Any
) -> Path:
    """A copy of a family's folder, in one file, with other tensors or other fields of config.json."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(tiny.FAMILIES[family] | config))
    tiny.write_safetensors(out / "model.safetensors", tiny.weights(family) if tensors is None else tensors)
    return out


@pytest.mark.parametrize("served", KINDS)
@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "smollm"])
def test_every_tensor_is_in_its_place(
    family: str, stored: str, served: str, tiny: ModuleType, tmp_path: Path, unfuse: Unfuse
) -> None:
    tensors = {name: tensor.astype(KINDS[stored]) for name, tensor in tiny.weights(family).items()}
    model = load_model(rewrite(tiny, tmp_path, family, tensors), dtype=served)
    specs = decoder_specs(model.config)
    jax.tree.map(
        lambda spec, array: (spec.shape, spec.dtype) == (array.shape, str(array.dtype)) or pytest.fail(str(spec)),
        specs,
        model.params,
        is_leaf=is_spec,
    )
    found = unfuse(model.params, model.config)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.astype(KINDS[served])
        assert (found[name].shape, found[name].tobytes()) == (expected.shape, expected.tobytes()), name


@pytest.mark.parametrize(("stored", "named"), [("bfloat16", "bfloat16"), ("float16", None), ("bfloat16", None)])
def test_auto_takes_the_dtype_of_the_checkpoint(
    stored: str, named: str | None, tiny: ModuleType, tmp_path: Path
) -> None:
    tensors = {name: tensor.astype(KINDS[stored]) for name, tensor in tiny.weights("llama2").items()}
    model = load_model(rewrite(tiny, tmp_path, "llama2", tensors, torch_dtype=named))
    assert model.config.dtype == stored
    assert model.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_sharded_index_gives_what_one_file_gives(tiny: ModuleType, tiny_folder: Folder, tmp_path: Path) -> None:
    sharded = load_model(tiny_folder("llama31"))
    assert len(list(sharded.folder.glob("*.safetensors"))) == 2
    single = load_model(rewrite(tiny, tmp_path, "llama31"))
    jax.tree.map(np.testing.assert_array_equal, sharded.params, single.params)


@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_stacked_layers_hold_what_each_layer_holds(family: str, tiny_folder: Folder, tmp_path: Path) -> None:
    """From both kinds of files."""
    convert(tiny_folder(family), tmp_path / "out", dtype="bfloat16")
    for source in (tiny_folder(family), tmp_path / "out"):
        apart = load_model(source, dtype="bfloat16")
        stacked = load_model(source, dtype="bfloat16", stacked_layers=True)
        assert (stacked.version, stacked.num_bytes) == (apart.version, apart.num_bytes)
        specs = decoder_specs(apart.config, stacked=True)
        assert jax.tree.map(lambda array: (array.shape, array.committed), stacked.params) == jax.tree.map(
            lambda spec: (spec.shape, True), specs, is_leaf=is_spec
        )
        for name, array in stacked.params["layers"].items():
            layers = b"".join(np.asarray(layer[name]).tobytes() for layer in apart.params["layers"])
            assert np.asarray(array).tobytes() == layers, name
        for name in apart.params.keys() - {"layers"}:
            np.testing.assert_array_equal(stacked.params[name], apart.params[name])


@pytest.mark.parametrize("kind", ["huggingface", "converted"])
def test_stacking_holds_a_few_arrays_beside_the_model(
    kind: str, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the layers and their stack."""
    config = tiny.FAMILIES["llama2"] | {"num_hidden_layers": 12, "vocab_size": 40}
    drawn = {name: tiny.draw(np.random.PCG64(1), dims, 0.0, 1.0) for name, dims, _, _ in tiny.tensor_specs(config)}
    folder = rewrite(tiny, tmp_path / "model", "llama2", drawn, **config)
    if kind == "converted":
        convert(folder, tmp_path / "out")
        folder = tmp_path / "out"
    held: list[int] = []
    put = LayerStacks.put

    def counted(*args: Any) -> None:
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        put(*args)

    monkeypatch.setattr(LayerStacks, "put", counted)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    model = load_model(folder, stacked_layers=True)
    layer = sum(array[0].nbytes for array in model.params["layers"].values())
    assert len(held) == 12 * len(model.params["layers"])
    assert max(held) - before <= model.num_bytes + 2 * layer
    assert 12 * layer > model.num_bytes / 2


def test_layers_with_different_windows_are_not_stacked(tiny: ModuleType, tmp_path: Path) -> None:
    """Refused before a weight is looked for."""
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    folder = rewrite(tiny, tmp_path, "qwen2", **mixed)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"attention windows differ \(none, 8\)"):
        load_model(folder, stacked_layers=True)


def test_tensors_are_those_that_the_safetensors_library_reads(tiny_folder: Folder, unfuse: Unfuse) -> None:
    model = load_model(tiny_folder("qwen2"))
    expected = load_file(model.folder / "model.safetensors")
    found = unfuse(model.params, model.config)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_large_matrices_are_turned_in_tiles(tiny: ModuleType, tmp_path: Path, unfuse: Unfuse) -> None:
    """Several tiles a side, with ragged ends, and a tensor that begins at an odd address."""
    shape = {"hidden_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 333}
    config = tiny.FAMILIES["llama2"] | shape | {"head_dim": 66, "vocab_size": 131}
    bits = np.random.PCG64(5)
    drawn = {name: tiny.draw(bits, dims, 0.0, 1.0) for name, dims, _, _ in tiny.tensor_specs(config)}
    folder = rewrite(tiny, tmp_path, "llama2", drawn, **config)
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    (folder / "model.safetensors").write_bytes((length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   ")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(raw[8 + length :])
    model = load_model(folder)
    for name, tensor in unfuse(model.params, model.config).items():
        np.testing.assert_array_equal(tensor, drawn[name])


def test_a_tied_model_s_copy_of_the_head_and_rope_buffers_are_ignored(tiny: ModuleType, tmp_path: Path) -> None:
    tensors = tiny.weights("llama32")
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    extra |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    model = load_model(rewrite(tiny, tmp_path, "llama32", tensors | extra))
    assert "lm_head" not in model.params


def test_one_report_of_all_that_does_not_fit(tiny: ModuleType, tmp_path: Path) -> None:
    tensors = tiny.weights("llama2")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 64), np.float32)
    with pytest.raises(WeightsError) as caught:
        load_model(rewrite(tiny, tmp_path, "llama2", tensors))
    assert str(caught.value).splitlines() == [
        "The weights do not fit config.json (LlamaForCausalLM, 2 layers):",
        "  missing (2): lm_head.weight; model.layers.1.mlp.up_proj.weight",
        "  unexpected (1): 'model.layers.0.self_attn.q_norm.weight'",
        "  ill-shaped (1): model.layers.0.self_attn.k_proj.weight is [32, 64] and should be [64, 64]",
    ]


def test_a_long_report_is_cut(tiny: ModuleType, tmp_path: Path) -> None:
    """Two layers of nine tensors are absent; ten names are enough to tell."""
    folder = rewrite(tiny, tmp_path, "llama2", num_hidden_layers=4)
    with pytest.raises(WeightsError, match=r"missing \(18\): (model\.layers\.2[^;]*; ){9}[^;]*; and 8 more$"):
        load_model(folder)


def test_a_quantised_tensor_is_reported_by_its_dtype(tiny: ModuleType, tmp_path: Path) -> None:
    folder = rewrite(tiny, tmp_path, "llama2")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(WeightsError, match=r"of an unread dtype \(1\): model.embed_tokens.weight is I32; F32, F16"):
        load_model(folder)


def test_shapes_are_refused_before_anything_is_allocated(tiny: ModuleType, tmp_path: Path) -> None:
    """A config that asks for 2^24 x 2^24 floats is answered from headers alone."""
    folder = rewrite(tiny, tmp_path, "llama2", hidden_size=2**24, intermediate_size=2**24)
    with pytest.raises(WeightsError, match=r"ill-shaped"):
        load_model(folder)


def test_values_beyond_float16_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tensors = tiny.weights("llama2")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 70_000
    folder = rewrite(tiny, tmp_path, "llama2", tensors)
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down_proj.weight has values beyond float16 .*bfloat16"):
        load_model(folder, dtype="float16")
    assert load_model(folder, dtype="bfloat16").config.dtype == "bfloat16"


def test_the_version_follows_weights_and_configuration(tiny: ModuleType, tmp_path: Path) -> None:
    tensors = tiny.weights("llama2")
    versions = [load_model(rewrite(tiny, tmp_path / "a", "llama2")).version]
    versions += [load_model(rewrite(tiny, tmp_path / "b", "llama2", rms_norm_eps=1e-6)).version]
    tensors["model.norm.weight"][0] += 1
    versions += [load_model(rewrite(tiny, tmp_path / "c", "llama2", tensors)).version]
    assert len(set(versions)) == 3
    assert load_model(tmp_path / "a").version == versions[0]


def test_generation_defaults_travel_with_the_model(tiny_folder: Folder) -> None:
    assert load_model(tiny_folder("llama31")).generation_defaults == {"temperature": 0.6, "top_p": 0.9}
    assert load_model(tiny_folder("llama2")).generation_defaults == {}


@pytest.mark.parametrize("wanted", ["float64", "fp8", "half"])
def test_an_unknown_dtype_is_refused(wanted: str, tiny_folder: Folder) -> None:
    with pytest.raises(ConfigError, match=rf"dtype must be auto, float32.*got '{wanted}'"):
        load_model(tiny_folder("llama2"), dtype=wanted)


def test_an_unknown_architecture_is_refused_by_name_before_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(
        UnsupportedModelError,
        match=r"MambaForCausalLM is not supported. Supported are: LlamaForCausalLM, MistralForCausalLM, "
        r"Qwen2ForCausalLM, Qwen3ForCausalLM\.",
    ):
        load_model(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_buffers_are_adopted_not_copied() -> None:
    """On a CPU the array that jax holds is the memory that the loader filled: the model is there once."""
    if jax.devices()[0].platform != "cpu":
        pytest.skip("only a CPU device can share the host's memory")
    buffer = aligned_empty((1000, 333), np.dtype(np.float32))
    buffer[:] = 1
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.make_array_from_callback(buffer.shape, where, lambda index: buffer)
    assert jax.block_until_ready(array).unsafe_buffer_pointer() == buffer.ctypes.data


_MESH = """
import json, sys
import jax, numpy as np
from jaxserve.parallel.mesh import make_mesh
from jaxserve_checkpoints.convert import convert
from jaxserve_checkpoints.load import load_model

mesh = make_mesh(2)
for folder in sys.argv[2:]:
    cut, whole = (load_model(folder, dtype=sys.argv[1], mesh=m) for m in (mesh, None))
    jax.tree.map(np.testing.assert_array_equal, cut.params, whole.params)
    layer = cut.params["layers"][0]
    names = ("qkv", "o", "gate_up", "down", "attn_norm")
    specs = {name: [*layer[name].sharding.spec, *[None] * layer[name].ndim][: layer[name].ndim] for name in names}
    shapes = {name: layer[name].addressable_shards[1].data.shape for name in ("qkv", "down")}
    print(json.dumps([specs, shapes]))
"""
_CUT = {"qkv": ["tp", None, None, None], "o": [None, "tp", None, None], "gate_up": [None, "tp", None]}
_CUT |= {"down": [None, "tp"], "attn_norm": [None]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_s_devices_each_read_their_part(dtype: str, tiny_folder: Folder, tmp_path: Path, repo: Path) -> None:
    """From safetensors and from a converted checkpoint alike."""
    folder, converted = tiny_folder("llama31"), tmp_path / "converted"
    convert(folder, converted, dtype=dtype)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(str(repo / part) for part in (".", "checkpoints")),
    }
    command = [sys.executable, "-c", _MESH, dtype, str(folder), str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[_CUT, {"qkv": [1, 4, 16, 64], "down": [64, 64]}]] * 2  # of [2, 4, 16, 64] and [64, 128]
