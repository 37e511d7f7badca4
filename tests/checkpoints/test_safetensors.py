"""Files that lie, are cut, or have bytes too many are refused, by name and with clean errors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from jaxserve.errors import WeightsError
from jaxserve_checkpoints.load import load_model
from jaxserve_checkpoints.safetensors import INDEX_FILE, SINGLE_FILE, MappedFiles, read_folder, read_header

Entry = dict[str, Any]


def build(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (bytes, or made JSON) and, if given, a false header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int, stop: int, dtype: str = "F32", shape: list[Any] | None = None) -> Entry:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_reference_library_reads(tiny_folder: Callable[[str], Path]) -> None:
    path = tiny_folder("llama2") / SINGLE_FILE
    tensors = read_header(path)
    with safe_open(path, framework="np") as reference, MappedFiles(tensors) as files:
        assert set(reference.keys()) == set(tensors)
        for name, info in tensors.items():
            np.testing.assert_array_equal(files.array(info), reference.get_tensor(name))


def test_views_of_a_mapped_file_cannot_be_written_to(tiny_folder: Callable[[str], Path]) -> None:
    tensors = read_folder(tiny_folder("llama2"))
    with MappedFiles(tensors) as files, pytest.raises(ValueError, match="read-only"):
        files.array(tensors["model.norm.weight"])[0] = 1


GOOD = {"a": entry(0, 8), "b": entry(8, 20)}


def test_the_crafted_base_is_sound(tmp_path: Path) -> None:
    tensors = read_header(build(tmp_path / "f", {"__metadata__": {"x": "y"}, **GOOD}, bytes(20)))
    assert [info.shape for info in tensors.values()] == [(2,), (3,)]


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        pytest.param(GOOD, bytes(19), None, "is truncated", id="truncated"),
        pytest.param(GOOD, bytes(21), None, "belong to no tensor", id="trailing junk"),
        pytest.param(GOOD, bytes(20), 2**63, "header claims 9223372036854775808 bytes", id="giant header"),
        pytest.param(GOOD, bytes(20), 10**8 + 1, "header claims 100000001 bytes", id="header over the bound"),
        pytest.param(GOOD, bytes(20), 5, "header is not valid", id="short header"),
        pytest.param(b"[1]", b"", None, "it is not an object", id="list"),
        pytest.param(b"\xff\xfe", b"", None, "header is not valid", id="not utf-8"),
        pytest.param(b"[" * 200_000, b"", None, "header is not valid", id="deep"),
        pytest.param(b'{"a":1,"a":2}', b"", None, "a name occurs twice", id="duplicate name"),
        pytest.param({"a": entry(0, 8), "b": entry(4, 16)}, bytes(16), None, "overlaps", id="overlap"),
        pytest.param({"a": entry(0, 8), "b": entry(12, 24)}, bytes(24), None, "leaves a hole", id="hole"),
        pytest.param({"a": entry(4, 12)}, bytes(12), None, "leaves a hole", id="hole at the beginning"),
        pytest.param({"a": entry(0, 2**40)}, bytes(8), None, "is truncated", id="out of range"),
        pytest.param({"a": entry(8, 0, shape=[2])}, bytes(8), None, "hole", id="backwards"),
        pytest.param({"a": entry(-8, 0, shape=[2])}, bytes(8), None, "overlaps", id="negative offset"),
        pytest.param({"a": entry(0, 8, shape=[3])}, bytes(8), None, r"8 bytes for shape \[3\] of F32", id="size"),
        pytest.param({"a": entry(0, 8, shape=[-1, -2])}, bytes(8), None, "impossible shape", id="negative shape"),
        pytest.param({"a": entry(0, 8, shape=[2**62, 8])}, bytes(8), None, "8 bytes for shape", id="overflow"),
        pytest.param({"a": entry(0, 8, "F33")}, bytes(8), None, "unknown dtype 'F33'", id="dtype"),
        pytest.param({"a": entry(0, 8, shape=["2"])}, bytes(8), None, "header is not valid", id="shape of text"),
        pytest.param({"a": entry(0, 8) | {"x": 1}}, bytes(8), None, "header is not valid", id="unknown field"),
        pytest.param({"a": {"dtype": "F32"}}, bytes(8), None, "header is not valid", id="missing field"),
        pytest.param({"__metadata__": {"a": 1}}, b"", None, "header is not valid", id="metadata"),
    ],
)
def test_a_header_that_lies_is_refused(
    header: Any, data: bytes, length: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(build(tmp_path / "model.safetensors", header, data, length))
    assert str(caught.value).startswith("model.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_stump_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\1" * size)
    with pytest.raises(WeightsError, match="truncated or is not safetensors"):
        read_header(tmp_path / "model.safetensors")


def test_every_truncation_of_a_model_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama2"), tmp_path / "cut")
    raw = (tmp_path / "cut" / SINGLE_FILE).read_bytes()
    for kept in np.linspace(0, len(raw) - 1, 50).astype(int):
        (tmp_path / "cut" / SINGLE_FILE).write_bytes(raw[:kept])
        with pytest.raises(WeightsError, match=r"^model\.safetensors"):
            load_model(tmp_path / "cut")


def test_mutated_headers_give_clean_errors_only(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """2,000 mutations of up to four bytes of header: each is refused as WeightsError or harmless."""
    shutil.copytree(tiny_folder("rope_yarn"), tmp_path / "fuzz")
    path = tmp_path / "fuzz" / SINGLE_FILE
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    draws = np.random.default_rng(3)
    refused = 0
    for _ in range(2000):
        changed = bytearray(raw)
        for at in draws.integers(0, end, draws.integers(1, 5)):
            changed[at] = draws.integers(0, 256)
        with path.open("r+b") as file:
            file.write(changed[:end])
        try:
            model = load_model(tmp_path / "fuzz")
        except WeightsError:
            refused += 1
        else:  # the metadata, white space, or two equal tensors that changed places
            assert model.num_bytes == len(raw) - end
    assert refused > 1800


@pytest.fixture
def sharded(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("qwen3"), tmp_path / "sharded"))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names 'model-00002-of-00002\.safetensors', which is not in sharded/"):
        read_folder(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "x.bin",
        "a\0.safetensors",
        "./model.safetensors",
    ],
)
def test_an_index_cannot_point_out_of_its_folder(name: str, sharded: Path) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(b"")
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(WeightsError, match=r"only \*.safetensors beside the index are read"):
        read_folder(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update({"model.norm.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(WeightsError, match=r"holds 'model.norm.weight', which .* places in 'model-00001"):
        read_folder(sharded)


def test_a_tensor_that_no_shard_holds_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update({"model.ghost.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(WeightsError, match=r"places 'model.ghost.weight' in model-00001.* does not hold it"):
        read_folder(sharded)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match="is not a valid index"):
        read_folder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_a_folder_without_safetensors_is_refused_with_the_remedy(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copy(tiny_folder("llama2") / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="holds no weights"):
        load_model(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(WeightsError, match=rf"only as {name}, .* Convert the model to safetensors"):
        load_model(tmp_path)
