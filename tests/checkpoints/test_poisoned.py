"""A checkpoint is data: whatever lies in its folder, nothing of it is imported, unpickled or run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Loads argv[1] under an audit hook; prints what was opened below it, and what was imported or compiled.
_AUDITED = """
import json, sys

import jax.numpy, orbax.checkpoint
from jaxserve_checkpoints import load

folder, seen = sys.argv[1], {"open": [], "import": [], "exec": [], "other": []}

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(folder):
        seen["open"].append(arguments[0].removeprefix(folder + "/"))
    elif event == "import":
        seen["import"].append([arguments[0], arguments[1]])
    elif event == "exec":
        seen["exec"].append(arguments[0].co_filename)
    elif event.split(".")[0] in ("pickle", "marshal", "subprocess", "os.system", "ctypes", "socket"):
        seen["other"].append(event)

sys.addaudithook(hook)
try:
    load.load_model(folder)
    seen["result"] = "loaded"
except Exception as error:
    seen["result"] = f"{type(error).__name__}: {error}"
print(json.dumps(seen))
"""


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


def poison(folder: Path) -> None:
    """Everything that other loaders have run: modules, pickles under every usual name, a start-up file."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_evil", "configuration_evil", "__init__", "sitecustomize", "json", "numpy", "conftest"):
        (folder / f"{name}.py").write_text("open('exploded', 'w').close()")
    bomb = pickle.dumps(_Bomb())
    for name in ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "optimizer.pt", "scheduler.pt", "x.npy"):
        (folder / name).write_bytes(bomb)


def load_audited(folder: Path, repo: Path) -> dict[str, list]:
    """From an empty folder of its own: Python itself imports from the folder that it is started in."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repo), str(repo / "checkpoints")])}
    command = [sys.executable, "-c", _AUDITED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def poisoned(tiny: ModuleType, tmp_path: Path) -> Path:
    folder = tiny.make("llama31", tmp_path / "model")
    poison(folder)
    return folder


def test_only_json_and_safetensors_are_opened_and_nothing_is_run(poisoned: Path, repo: Path) -> None:
    seen = load_audited(poisoned, repo)
    assert seen["result"] == "loaded"
    assert seen["open"]
    assert all(name.endswith((".json", ".safetensors")) for name in seen["open"])
    assert not [name for name, path in seen["import"] if path and path.startswith(str(poisoned))]
    assert not [path for path in seen["exec"] if path.startswith(str(poisoned))]
    assert not seen["other"]
    assert not list(poisoned.parent.rglob("exploded"))


def test_pickled_weights_alone_are_refused_unopened(poisoned: Path, repo: Path) -> None:
    for path in [*poisoned.glob("*.safetensors"), *poisoned.glob("*.index.json")]:
        path.unlink()
    seen = load_audited(poisoned, repo)
    assert str(seen["result"]).startswith("WeightsError: model/ has its weights only as optimizer.pt, which jaxserve")
    assert set(seen["open"]) == {"config.json", "generation_config.json"}
    assert not list(poisoned.parent.rglob("exploded"))


def test_the_bomb_would_have_gone_off(poisoned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the two tests above can fail."""
    monkeypatch.chdir(poisoned)
    pickle.loads((poisoned / "pytorch_model.bin").read_bytes())
    assert (poisoned / "exploded").exists()
