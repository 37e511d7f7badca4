"""The wheel: four packages and nothing else at top level, and it serves the demo with no tree around it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx

PACKAGES = {"jaxserve", "pallas_kernels", "jaxserve_server", "jaxserve_checkpoints"}
MAX_WHEEL_BYTES = 14_000_000  # 12 MB of models, and the code


def test_top_level_is_the_four_packages(wheel: Path):
    top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1
    assert top - info == PACKAGES


def test_it_holds_the_demo_and_the_licence_but_no_training_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for model in ("chat", "draft"):
        files = {name.rpartition("/")[2] for name in names if name.startswith(f"jaxserve_checkpoints/demo/{model}/")}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}, model
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name or "demo_training" in name or "__pycache__" in name]
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_every_source_of_the_tree_is_in_it(wheel: Path, repo: Path):
    folders = [repo, repo, repo / "server", repo / "checkpoints"]
    packages = ["jaxserve", "pallas_kernels", "jaxserve_server", "jaxserve_checkpoints"]
    expected = {
        path.relative_to(folder).as_posix()
        for folder, package in zip(folders, packages, strict=True)
        for path in (folder / package).rglob("*.*")
        if path.suffix in (".py", ".cc", ".h")
    }
    assert "pallas_kernels/linear/kernel_cpu.cc" in expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_the_packages_come_from_the_wheel(unpacked: Path, wheel_environment: dict[str, str], repo: Path):
    code = f"""
import sys, {", ".join(sorted(PACKAGES))}
for name in {sorted(PACKAGES)}: print(sys.modules[name].__file__)
for path in sys.path: print("path", path)
"""
    command = [sys.executable, "-S", "-P", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=wheel_environment, cwd=unpacked.parent
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(str(unpacked))] == lines[:4]
    assert not {f"path {repo}", f"path {repo / 'server'}", f"path {repo / 'checkpoints'}"} & set(lines)


def test_it_serves_the_demo(wheel_server: str):
    models = httpx.get(f"{wheel_server}/v1/models").json()
    assert models["data"][0]["id"] == "demo"
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{wheel_server}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] >= 1


def test_a_server_compiles_nothing_that_was_compiled_ahead(compiled_ahead: str, wheel_server: str, wheel_log: Path):
    num_programs = int(re.search(r"^(\d+) programs, \1 compiled and 0 there already, in ", compiled_ahead, re.M)[1])
    assert len(re.findall(r"^\S+ +\d+\.\d\d s$", compiled_ahead, re.M)) == num_programs > 10
    assert re.search(r"holds \d+ files, \d+\.\d MB$", compiled_ahead.rstrip())
    assert f"{num_programs} programs: 0 compiled, {num_programs} loaded" in wheel_log.read_text()
    metrics = httpx.get(f"{wheel_server}/metrics").text
    assert re.search(r"^jaxserve:recompiles_after_ready_total(\{.*\})? 0(\.0)?$", metrics, re.M)
