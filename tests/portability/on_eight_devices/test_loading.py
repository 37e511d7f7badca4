"""Loading to a mesh: a device's own slices and nothing else, bytes that fall as 1 / N, sizes that are refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.errors import ConfigError
from jaxserve.llm import LLM
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.mesh import bytes_on_each, make_mesh, mesh_for
from jaxserve.types import SamplingParams
from jaxserve_checkpoints import load, orbax
from jaxserve_checkpoints.convert import convert
from jaxserve_checkpoints.load import LoadedModel, load_model
from jaxserve_checkpoints.manifest import Manifest
from jaxserve_server import precompile

from .families import FAMILIES

Loaded = Callable[[str, int], LoadedModel]


def bytes_of(tree: Any, device: int) -> int:
    """What the shards on one device take."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[device])


def whole(params: Any, model: Any) -> dict[str, np.ndarray]:
    """Each kv head's part and the real vocabulary, whatever they were cut, copied and padded to."""
    num_kv, groups = model.num_kv_heads, model.num_groups
    found: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name, array = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
        kind = name.rpartition(".")[2]
        if kind in ("qkv", "qkv_bias"):
            copies = len(array) // num_kv
            queries = array[:, :-2].reshape(num_kv, groups, *array.shape[2:])
            for index, part in ((-2, "k"), (-1, "v")):
                same = array[:, index].reshape(num_kv, copies, *array.shape[2:])
                assert (same == same[:, :1]).all(), f"{name}: copies that differ"
                found[f"{name}.{part}"] = same[:, 0]
            found[f"{name}.q"] = queries
        elif kind == "o":
            found[name] = array.reshape(len(array), num_kv, groups, -1)
        elif kind in ("embed", "lm_head"):
            assert not array[model.vocab_size :].any()
            found[name] = array[: model.vocab_size]
        else:
            found[name] = array
    return found


def assert_same(params: Any, other: Any, model: Any) -> None:
    one, two = whole(params, model), whole(other, model)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("family", ["llama31", "smollm", "mistral", "qwen2_window", "llama_bias"])
def test_the_parts_are_the_whole(loaded: Loaded, family: str, size: int) -> None:
    assert_same(loaded(family, size).params, loaded(family, 1).params, loaded(family, 1).config)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_on_each_device_fall_as_one_to_n(loaded: Loaded, family: str) -> None:
    """All but the norms and the biases of o and down, which are whole; kv heads, where they are copies; and padding."""
    config, one = loaded(family, 1).config, loaded(family, 1).params
    norms = sum(leaf.nbytes for leaf in jax.tree.leaves(one) if leaf.ndim == 1)
    head_bytes = 4 * config.num_layers * config.head_dim * (config.hidden_size + int(config.qkv_bias))
    for size in (2, 4, 8):
        params = loaded(family, size).params
        copied = 2 * head_bytes * (max(config.num_kv_heads, size) - config.num_kv_heads)
        tables = 1 if config.tied_embeddings else 2
        padding = 4 * tables * config.hidden_size * (-config.vocab_size % size)
        expected = norms + (bytes_of(one, 0) - norms + copied + padding) // size
        assert [bytes_of(params, device) for device in range(8)] == [expected] * size + [0] * (8 - size)
        assert bytes_on_each(params) == expected


def test_the_cache_is_cut_by_heads(core_of: Callable) -> None:
    one = core_of("llama31", 1).runner._kv
    for size in (2, 8):
        kv = core_of("llama31", size).runner._kv
        assert [bytes_of(kv, device) for device in range(size)] == [bytes_of(one, 0) // size] * size
    copied = core_of("smollm", 8).runner._kv  # one kv head: a copy of it on each
    assert {bytes_of(copied, device) for device in range(8)} == {bytes_of(core_of("smollm", 1).runner._kv, 0)}


@pytest.mark.parametrize(("family", "size"), [("llama31", 8), ("llama31", 2), ("mistral", 8), ("llama_bias", 4)])
def test_safetensors_are_read_by_slices(
    folder_of: Callable[[str], Path], loaded: Loaded, monkeypatch: pytest.MonkeyPatch, family: str, size: int
) -> None:
    """Every byte that is copied out of the files becomes one of a device's own; the files' whole is never taken."""
    lock, copied = threading.Lock(), []
    copy = load._copy

    def counting(target: np.ndarray, tensor: np.ndarray) -> None:
        with lock:
            copied.append(tensor.nbytes)
        copy(target, tensor)

    monkeypatch.setattr(load, "_copy", counting)
    params = load_model(folder_of(family), mesh=mesh_for(size)).params
    leaves = jax.tree.leaves(params)
    cut = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    once = sum(leaf.nbytes for leaf in leaves if leaf.is_fully_replicated)  # handed to all devices from one buffer
    config = loaded(family, 1).config
    tables = 1 if config.tied_embeddings else 2
    padding = 4 * tables * config.hidden_size * (-config.vocab_size % size)
    assert sum(copied) == sum(size * leaf.addressable_shards[0].data.nbytes for leaf in cut) + once - padding
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert max(copied) <= largest


@pytest.mark.parametrize("family", ["llama31", "smollm", "mistral", "llama_bias"])
def test_a_converted_checkpoint_is_restored_to_any_mesh(
    folder_of: Callable[[str], Path], loaded: Loaded, tmp_path: Path, family: str
) -> None:
    convert(folder_of(family), tmp_path / "converted")
    config = loaded(family, 1).config
    for size in (1, 2, 8):
        restored = load_model(tmp_path / "converted", mesh=mesh_for(size)).params
        assert_same(restored, loaded(family, 1).params, config)
        wanted = loaded(family, size).params
        assert jax.tree.map(lambda x: (x.shape, x.sharding), restored) == jax.tree.map(
            lambda x: (x.shape, x.sharding), wanted
        )


@pytest.mark.parametrize(("saved_from", "to"), [(4, 2), (2, 8), (8, 1)])
def test_parameters_saved_from_one_mesh_are_restored_to_another(
    loaded: Loaded, tmp_path: Path, saved_from: int, to: int
) -> None:
    saved = loaded("llama31", saved_from)
    orbax.save(tmp_path, saved.params)
    manifest = Manifest("", "float32", orbax.shapes(decoder_specs(saved.config)))
    assert_same(orbax.restore(tmp_path, saved.config, mesh_for(to), manifest), saved.params, saved.config)


def config_alone(folder: Path, source: Path, **changes: Any) -> Path:
    """A folder with a configuration and no weights at all."""
    folder.mkdir()
    content = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "size", "fitting"),
    [
        ({}, 3, "1, 2, 4, 8"),
        ({}, 6, "1, 2, 4, 8"),
        ({"num_key_value_heads": 2, "num_attention_heads": 6, "intermediate_size": 96}, 4, "1, 2, 6"),
        ({"num_key_value_heads": 3, "num_attention_heads": 6, "intermediate_size": 96}, 2, "1, 3, 6"),
        ({"intermediate_size": 132}, 8, "1, 2, 4"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_before_a_weight_is_read(
    folder_of: Callable[[str], Path], tmp_path: Path, changes: dict, size: int, fitting: str
) -> None:
    folder = config_alone(tmp_path / "model", folder_of("llama31"), **changes)
    said = rf"tensor_parallel_size={size} does not divide .* Choose one of {fitting}\."
    with pytest.raises(ConfigError, match=said):
        load_model(folder, mesh=make_mesh(size))
    with pytest.raises(ConfigError, match=said):
        LLM(str(folder), tensor_parallel_size=size)


def test_more_devices_than_there_are_is_refused(tmp_path: Path) -> None:
    said = r"16 devices were asked for, and 8 cpu device\(s\) are there\. .* between 1 and 8\. XLA_FLAGS="
    with pytest.raises(ConfigError, match=said):
        LLM(str(tmp_path / "nothing"), tensor_parallel_size=16)


def test_parameters_on_other_devices_than_asked_for_are_refused(loaded: Loaded) -> None:
    model = loaded("llama31", 2)
    for size in (1, 4):
        with pytest.raises(
            ConfigError, match=rf"lie on 2 device\(s\) and tensor_parallel_size={size}\. Load them with"
        ):
            EngineCore(model.config, model.params, EngineConfig(tensor_parallel_size=size))


def test_a_compiled_model_starts_over_two_devices_and_says_what_it_says_on_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The packaged draft model, by the command line and by the offline facade."""
    tmp_path.chmod(0o700)
    # Exact has one program of steps.
    sizes: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 2, "max_model_len": 64, "swap_space": 0}
    folder = str(tmp_path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    flags += ["--exact", "--dtype=float32", f"--compilation-cache-dir={folder}", "-tp=2"]
    assert precompile.main(["demo-draft", *flags]) == 0
    assert " compiled and 0 there already" in capsys.readouterr().out
    said = []
    for size in (1, 2):
        sizes |= {"tensor_parallel_size": size, "compilation_cache_dir": folder, "exact": True, "dtype": "float32"}
        llm = LLM("demo-draft", **sizes)
        num_loaded = llm._core.runner.compiled.num_loaded
        assert (num_loaded == len(llm._core.runner.compiled.compile_s)) == (size == 2)
        (output,) = llm.generate("The moon is", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        said.append(output.outputs[0].text)
    assert said[0] == said[1]
