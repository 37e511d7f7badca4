"""A converted checkpoint is what was converted, whole and untouched, or it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.errors import CheckpointError, ConfigError, ManifestError
from jaxserve_checkpoints import manifest, orbax
from jaxserve_checkpoints.convert import convert, main
from jaxserve_checkpoints.load import load_model
from jaxserve_checkpoints.source import MANIFEST_FILE

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def converted_once(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(shutil.copytree(tiny_folder("llama31"), tmp_path_factory.mktemp("source") / "model"))
    (source / "tokenizer.json").write_text('{"not": "read here"}')
    (source / "LICENSE").write_text("terms")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(source, out, dtype="bfloat16")
    return out


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(converted_once, tmp_path / "out"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("family", ["llama31", "qwen3", "smollm"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_gives_the_same_model(family: str, dtype: str, tiny_folder: Folder, tmp_path: Path) -> None:
    first = convert(tiny_folder(family), tmp_path / "out", dtype=dtype)
    second = load_model(tmp_path / "out")
    assert second.config == first.config
    assert second.generation_defaults == first.generation_defaults
    assert second.num_bytes == first.num_bytes

    def same(a: jax.Array, b: jax.Array) -> None:
        assert (a.dtype, a.committed) == (b.dtype, b.committed)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, first.params, second.params)
    assert load_model(tmp_path / "out").version == second.version


def test_holds_what_serving_needs_and_no_code(converted_once: Path) -> None:
    top = {path.name for path in converted_once.iterdir()}
    assert top == {"params", "config.json", "generation_config.json", "tokenizer.json", "LICENSE", "manifest.json"}


def test_the_manifest_is_of_every_file(converted_once: Path) -> None:
    document = json.loads((converted_once / MANIFEST_FILE).read_text())
    found = {path.relative_to(converted_once).as_posix(): path for path in files_of(converted_once)}
    del found[MANIFEST_FILE]
    assert document["files"].keys() == found.keys()
    for name, path in found.items():
        content = path.read_bytes()
        assert document["files"][name] == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_one_flipped_bit_anywhere_is_refused_by_the_file_s_name(converted: Path) -> None:
    """Each file's first and last bit, 100 random bits of the manifest and 200 of the rest."""
    draws = np.random.default_rng(17)
    files = files_of(converted)
    sizes = np.array([path.stat().st_size for path in files])
    flips = [(index, bit) for index, size in enumerate(sizes) for bit in (0, size * 8 - 1)]
    chosen = draws.choice(len(files), 200, p=sizes / sizes.sum())
    chosen = [*chosen, *[files.index(converted / MANIFEST_FILE)] * 100]
    flips += [(index, int(draws.integers(0, sizes[index] * 8))) for index in chosen]
    manifest.verify(converted)
    for index, bit in flips:
        path = files[index]
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
        with pytest.raises(ManifestError) as caught:
            load_model(converted)
        assert path.relative_to(converted).as_posix() in str(caught.value)
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
    assert load_model(converted).num_bytes > 0


def test_a_manifest_that_was_only_reformatted_is_refused(converted: Path) -> None:
    path = converted / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(ManifestError, match=r"manifest\.json is damaged: it does not match its own digest"):
        load_model(converted)


def test_a_missing_file_is_named(converted: Path) -> None:
    (converted / "generation_config.json").unlink()
    with pytest.raises(ManifestError, match=r"generation_config\.json is missing \(1 such files\)"):
        load_model(converted)


def test_a_foreign_file_is_named(converted: Path) -> None:
    (converted / "params" / "x.orbax-checkpoint-tmp-1").mkdir()
    (converted / "params" / "x.orbax-checkpoint-tmp-1" / "data").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"params/x\.orbax-checkpoint-tmp-1/data is not in manifest\.json"):
        load_model(converted)


def test_a_truncated_file_is_told_by_its_size(converted: Path) -> None:
    path = max(files_of(converted / "params"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ManifestError, match=rf"{path.name} has \d+ bytes; manifest.json says"):
        load_model(converted)


def test_links_are_refused(converted: Path) -> None:
    path = converted / "tokenizer.json"
    path.rename(converted.parent / "tokenizer.json")
    path.symlink_to(converted.parent / "tokenizer.json")
    with pytest.raises(ManifestError, match=r"tokenizer\.json is a link"):
        load_model(converted)


def test_a_conversion_that_did_not_finish_is_refused(converted: Path) -> None:
    (converted / MANIFEST_FILE).unlink()
    with pytest.raises(ManifestError, match=r"out/ has no manifest\.json: its conversion did not finish"):
        load_model(converted)


def test_another_dtype_than_the_converted_one_is_refused(converted_once: Path) -> None:
    with pytest.raises(ConfigError, match="was converted to bfloat16; it cannot be served as float32"):
        load_model(converted_once, dtype="float32")
    assert load_model(converted_once, dtype="bfloat16").config.dtype == "bfloat16"


def test_parameters_of_another_configuration_are_refused(converted: Path) -> None:
    """Whole by its manifest, yet config.json does not describe its arrays."""
    fields = json.loads((converted / "config.json").read_text()) | {"intermediate_size": 96}
    (converted / "config.json").write_text(json.dumps(fields))
    shapes = json.loads((converted / MANIFEST_FILE).read_text())["parameters"]
    (converted / MANIFEST_FILE).unlink()
    manifest.write(converted, "bfloat16", {name: tuple(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=r"not those of config\.json.*first difference: layers\.0\.down"):
        load_model(converted)


def test_an_existing_folder_is_only_replaced_if_converted_and_forced(tiny_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_folder("llama2"), out)
    with pytest.raises(CheckpointError, match=r"out exists\. Choose another folder, or replace it with --force"):
        convert(tiny_folder("qwen2"), out)
    convert(tiny_folder("qwen2"), out, force=True)
    assert load_model(out).config.architecture == "Qwen2ForCausalLM"
    source = Path(shutil.copytree(tiny_folder("llama2"), tmp_path / "source"))
    with pytest.raises(CheckpointError, match="is not a converted checkpoint, so it is never replaced"):
        convert(source, source, force=True)
    assert load_model(source).config.architecture == "LlamaForCausalLM"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failure_leaves_nothing_behind(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    convert(tiny_folder("llama2"), tmp_path / "out")
    before = files_of(tmp_path)
    monkeypatch.setattr(orbax, "save", full)
    with pytest.raises(OSError, match="disk full"):
        convert(tiny_folder("qwen2"), tmp_path / "out", force=True)
    with pytest.raises(OSError, match="disk full"):
        convert(tiny_folder("qwen2"), tmp_path / "new")
    assert files_of(tmp_path) == before
    assert load_model(tmp_path / "out").config.architecture == "LlamaForCausalLM"


def test_the_command(tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_folder("qwen3")), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "Qwen3ForCausalLM, bfloat16, 0." in capsys.readouterr().out
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*arguments, "--force"]) == 0
