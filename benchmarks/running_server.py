"""A server started for a benchmark, and stopped after it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running_server(model: str, flags: list[str], *, ready_s: float = 600.0) -> Iterator[tuple[str, float]]:
    """Starts `python -m jaxserve.serve model flags` on a free port.

    Yields:
        The server's address, and the seconds from start to ready.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "jaxserve.serve", model, "--port", str(port), *flags]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            _wait_until_ready(process, url, log, ready_s)
            yield url, time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path, ready_s: float) -> None:
    deadline = time.perf_counter() + ready_s
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready after {ready_s} s:\n{log.read_text()[-4000:]}")
