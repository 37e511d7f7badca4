"""The built wheel, and a server of the demo model that runs from it: started once for all tests here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

READY_S = 300.0  # two busy cores compile slowly; an idle machine needs a tenth of it
FLAGS = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16"]  # few programs to compile


@pytest.fixture(scope="session")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(repo)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import path that holds the wheel's files and nothing else."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def wheel_environment(unpacked: Path) -> dict[str, str]:
    """For `python -S`: the wheel before the dependencies. Without site no .pth file is read, so an editable
    install of the tree stays invisible: what the wheel lacks is missing."""
    dependencies = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    paths = os.pathsep.join([str(unpacked), *dependencies])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXSERVE_", "PYTHON"))}
    return kept | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "HOME": str(unpacked.parent)}


@pytest.fixture(scope="session")
def compiled_ahead(unpacked: Path, wheel_environment: dict[str, str]) -> str:
    """What `jaxserve.compile` printed, with the flags that the wheel's server has."""
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-m", "jaxserve.compile", *FLAGS, "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        check=False,
        env=wheel_environment,
        cwd=unpacked.parent,
        timeout=READY_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel_log(unpacked: Path) -> Path:
    """What the wheel's server writes."""
    return unpacked.parent / "server.log"


@pytest.fixture(scope="session")
def wheel_server(
    unpacked: Path, wheel_environment: dict[str, str], wheel_log: Path, compiled_ahead: str
) -> Iterator[str]:
    """The address of a server that runs from the unpacked wheel; SIGTERM must end it with status 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = wheel_log
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "jaxserve.serve", "--port", str(port), *FLAGS],
            env=wheel_environment,
            cwd=unpacked.parent,
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # nobody listens yet
        time.sleep(0.1)
    raise AssertionError(f"not ready after {READY_S} s:\n{log.read_text()}")
