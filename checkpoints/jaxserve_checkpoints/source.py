"""What a model's name means: the packaged demo, a folder, or a repository of the Hugging Face hub.

Owns names and downloads; opens no weights. Nothing but JSON, safetensors and jinja templates is ever
downloaded: no code, no pickles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from jaxserve.errors import CheckpointError

PACKAGED: Mapping[str, str] = MappingProxyType({"demo": "chat", "demo-draft": "draft"})
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")
MANIFEST_FILE = "manifest.json"
PARAMS_FOLDER = "params"
_REPOSITORY = re.compile(r"(?P<id>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>\w[\w./-]{0,199}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is.

    Attributes:
        name: as it was asked for.
        kind: "converted" is what `jaxserve_checkpoints.convert` writes.
    """

    name: str
    folder: Path
    kind: Literal["huggingface", "converted"]


def resolve(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Source:
    """The folder that `name` means, downloaded first if it is a hub repository.

    Args:
        name: "demo", "demo-draft", a folder, or `org/name`, `org/name@revision`. A folder called demo is
            reached as ./demo.
        revision: of a hub repository: a branch, tag or commit.
        weights: False leaves a repository's weights where they are.

    Raises:
        CheckpointError: no such folder, or the hub does not give it (offline, absent, gated).
    """
    text = str(name)
    if text in PACKAGED:
        return _local(text, Path(__file__).parent / "demo" / PACKAGED[text])
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _local(text, folder)
    match = _REPOSITORY.fullmatch(text)
    if folder.exists() or match is None or isinstance(name, Path):
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{text} {state}. Give a model's folder, a Hugging Face name such as Qwen/Qwen3-0.6B, "
            f"or {' or '.join(PACKAGED)}."
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise CheckpointError(f"{text} and revision {revision!r} disagree. Give one of them.")
    return _local(text, _download(match["id"], revision or match["revision"], weights=weights))


def _local(name: str, folder: Path) -> Source:
    if not folder.is_dir():
        raise CheckpointError(f"The packaged model {name!r} is missing from this installation.")
    converted = (folder / MANIFEST_FILE).exists() or (folder / PARAMS_FOLDER).is_dir()
    return Source(name, folder, "converted" if converted else "huggingface")


def _download(repository: str, revision: str | None, *, weights: bool) -> Path:
    # Imported here: it takes a third of a second, and a local folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [pattern for pattern in DOWNLOADED if weights or not pattern.endswith(".safetensors")]
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        reason = "its owner asks you to accept terms first: do so on the hub, then set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private and HF_TOKEN does not open it"
    except RevisionNotFoundError:
        reason = "the repository has no such revision"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "it is not in the local cache and the hub cannot be reached (offline?)"
    except Exception as error:
        # The hub's client lets errors of its HTTP library through, and that library has changed once.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise CheckpointError(
        f"{repository}{at} could not be downloaded: {reason}. A folder that you have downloaded elsewhere "
        f"is served by its path; {repository!r} is not a folder here."
    )
