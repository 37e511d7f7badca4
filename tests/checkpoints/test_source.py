"""What a name means: packaged, a folder, or the hub; and what is never downloaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from jaxserve.errors import CheckpointError
from jaxserve_checkpoints.convert import convert
from jaxserve_checkpoints.source import DOWNLOADED, Source, resolve

Hub = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that gives an empty folder and keeps what it was asked."""
    asked: Hub = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(("name", "folder"), [("demo", "chat"), ("demo-draft", "draft")])
def test_the_packaged_models(name: str, folder: str) -> None:
    source = resolve(name)
    assert (source.folder.parent.name, source.folder.name, source.kind) == ("demo", folder, "huggingface")


def test_a_folder_is_itself(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_folder("llama2")
    assert resolve(folder) == Source(str(folder), folder, "huggingface")
    assert resolve(str(folder)) == resolve(folder)
    convert(folder, tmp_path / "out")
    assert resolve(tmp_path / "out").kind == "converted"


def test_a_folder_goes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").folder == Path("org/name")
    assert not hub


@pytest.mark.parametrize(
    ("name", "revision", "repository", "asked"),
    [
        ("org/name", None, "org/name", None),
        ("Qwen/Qwen2.5-0.5B_x", "v1", "Qwen/Qwen2.5-0.5B_x", "v1"),
        ("org/name@refs/pr/3", None, "org/name", "refs/pr/3"),
        ("org/name@main", "main", "org/name", "main"),
    ],
)
def test_a_hub_name_downloads_data_only(
    name: str, revision: str | None, repository: str, asked: str | None, hub: Hub
) -> None:
    assert resolve(name, revision=revision).folder.name == "snapshot"
    assert hub == [(repository, {"revision": asked, "allow_patterns": list(DOWNLOADED)})]
    for pattern in DOWNLOADED:
        assert not pattern.endswith((".py", ".bin", ".pt", ".pth", "*", ".model")), pattern


def test_two_revisions_that_disagree_are_refused(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="org/name@a and revision 'b' disagree"):
        resolve("org/name@a", revision="b")


@pytest.mark.parametrize("name", ["nothing", "./org/name", "/org/name", "a/b/c", "../x", "org/na me", "~/nothing-x"])
def test_what_is_neither_folder_nor_hub_name(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist. Give a model's folder, a Hugging Face name"):
        resolve(name)
    assert not hub


def test_a_path_is_never_asked_of_the_hub(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(Path("org/name"))
    assert not hub


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no network"), r"not in the local cache and the hub cannot be reached \(offline\?\)"),
        (ConnectionError("refused"), "ConnectionError: refused"),
    ],
)
def test_what_the_hub_does_not_give_is_a_checkpoint_error(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(CheckpointError, match=rf"^org/name at revision 'x' could not be downloaded: .*{reason}"):
        resolve("org/name", revision="x")


def test_an_absent_revision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, RevisionNotFoundError.__new__(RevisionNotFoundError))
    with pytest.raises(
        CheckpointError, match="at revision 'x' could not be downloaded: the repository has no such rev"
    ):
        resolve("org/name@x")


def test_offline_the_real_client_gives_a_clear_error(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own process: the client reads its environment when it is imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{repo}:{repo / 'checkpoints'}")
    code = "from jaxserve_checkpoints.source import resolve; resolve('org/name')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CheckpointError: org/name could not be downloaded: it is not in the local cache" in done.stderr
