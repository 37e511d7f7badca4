"""What the README shows is run as it stands there; only the server's address is replaced by a test's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def blocks(repo: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of the README."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (repo / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def the_block(blocks: list[tuple[str, str]], language: str, holding: str) -> str:
    (block,) = (text for lang, text in blocks if lang == language and holding in text)
    return block


def run_python(repo: Path, *arguments: str) -> str:
    paths = os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_streams(blocks: list[tuple[str, str]], wheel_server: str):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    command = the_block(blocks, "bash", "curl").replace(ADDRESS, wheel_server)
    assert wheel_server in command
    answer = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True).stdout
    assert answer.count("data: ") > 10
    assert answer.rstrip().endswith("data: [DONE]")


def test_the_openai_client_streams(blocks: list[tuple[str, str]], wheel_server: str, repo: Path):
    code = the_block(blocks, "python", "OpenAI(").replace(ADDRESS, wheel_server)
    assert wheel_server in code
    assert len(run_python(repo, "-c", code).split()) >= 3


def test_the_library_generates(blocks: list[tuple[str, str]], repo: Path):
    lines = run_python(repo, "-c", the_block(blocks, "python", "LLM(")).splitlines()
    assert any(line.startswith("Once upon a time → ") and len(line) > 25 for line in lines)
    assert lines[-1].strip()


def test_every_make_target_exists(repo: Path):
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (repo / "README.md").read_text()))
    assert {"serve", "test"} <= named <= targets


def test_every_flag_exists(repo: Path):
    help_text = run_python(repo, "-m", "jaxserve.serve", "--help")
    text = (repo / "README.md").read_text()
    named = set(re.findall(r'ARGS="[^"]*?(--[a-z-]+)', text)) | set(re.findall(r"`(--[a-z-]+)`", text))
    assert named
    assert not {flag for flag in named if flag not in help_text}


def test_every_path_in_it_exists(repo: Path):
    text = (repo / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    assert linked
    assert not [name for name in linked if not (repo / name).exists()]


def test_the_tree_in_it_is_the_tree(blocks: list[tuple[str, str]], repo: Path):
    """Every folder and file that the tree names exists, and nothing at top level is left out."""
    named, parent = [], ""
    for line in the_block(blocks, "text", "jaxserve/").splitlines():
        first = line.split()[0]
        parent = parent if line.startswith(" ") else first
        siblings = re.findall(r"(\w+\.py)\b", line)[first.endswith(".py") :]
        folder = first.rpartition("/")[0]
        named.append(parent + first if line.startswith(" ") else first)
        named += [f"{parent}{folder}/{name}" if line.startswith(" ") else f"{first}{name}" for name in siblings]
    missing = [name for name in named if not (repo / name).exists()]
    assert not missing
    top = {path.name for path in repo.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert top - {"dist", "build"} <= {name.partition("/")[0] for name in named} | {"__pycache__"}
