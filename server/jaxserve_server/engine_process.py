"""Starts the engine's process and brings it to readiness; ends it.

The process is a fresh interpreter: nothing of this one is forked. It is born with one end of a socket pair, which
nobody else can connect to. Free of jax.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxserve.config import EngineLimits
from jaxserve.errors import EngineDeadError
from jaxserve_server import wire
from jaxserve_server.flags import API_KEY_VARIABLE
from jaxserve_server.remote_engine import RemoteEngine
from jaxserve_server.status import ManagedEngine

STOP_S = 10.0  # a device call that is stuck is not waited for longer
END_S = 5.0  # between the socket's end and the process'
WORKER = ("-m", "jaxserve_server.engine_worker")
# What the interpreter was told, besides -W, and its child must be told too.
INTERPRETER_FLAGS = {"no_site": "-S", "no_user_site": "-s", "dont_write_bytecode": "-B", "dev_mode": "-Xdev"}
SHIELDED = (signal.SIGINT, signal.SIGTERM)


class ReadyEngine(NamedTuple):
    engine: ManagedEngine
    limits: EngineLimits
    system_fingerprint: str


class Launch(Protocol):
    """An engine on its way to readiness, wherever it runs. The methods block; each is called once, in this order."""

    def read_model(self) -> wire.ModelRead:
        """Reads the weights.

        Raises:
            CheckpointError, ConfigError: they cannot be served.
        """
        ...

    def finish(self) -> ReadyEngine:
        """Compiles, and begins to serve.

        Raises:
            ConfigError: the sizes do not fit the device.
        """
        ...

    def abandon(self) -> None:
        """Ends what has begun, after another's failure."""
        ...


class EngineProcess:
    """The engine's process, and the socket to it.

    Args:
        arguments: of the interpreter; the socket's descriptor is added to them.
    """

    def __init__(self, arguments: Sequence[str] = WORKER) -> None:
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, *interpreter_flags(), *arguments, str(theirs.fileno())]
        # The terminal's Ctrl-C, and a service manager's SIGTERM, reach both processes; when the engine ends is the
        # server's to say, which drains first. A blocked signal stays so in the child, from its first instruction.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        try:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, and arguments of our own
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=child_environment()
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def stop(self) -> None:
        """Waits for its end, which has been asked for; kills it if it does not come."""
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()

    def kill(self) -> None:
        self.process.kill()

    def describe_end(self) -> str:
        """How it ended. Blocks until it has, for seconds at most."""
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "its socket is closed, it still runs"
        if code >= 0:
            return f"exit code {code}"
        reason = f"killed by {signal.Signals(-code).name}"
        return f"{reason}; was memory short?" if -code == signal.SIGKILL else reason


def interpreter_flags() -> list[str]:
    """This interpreter's own flags, so that the child finds the same modules and warns of the same things."""
    flags = [flag for name, flag in INTERPRETER_FLAGS.items() if getattr(sys.flags, name)]
    return [*flags, "-P", *(f"-W{option}" for option in sys.warnoptions), *["-O"] * sys.flags.optimize]


def child_environment() -> dict[str, str]:
    """This environment without the keys, with this process' import path: the child must import the very same files."""
    kept = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    return kept | {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}


class RemoteLaunch:
    """Starts an engine in a process of its own. Used in a thread beside the event loop that will serve.

    Args:
        loop: the server's event loop, which runs.
    """

    def __init__(self, start: wire.Start, loop: asyncio.AbstractEventLoop, arguments: Sequence[str] = WORKER) -> None:
        self._process = EngineProcess(arguments)
        connecting = RemoteEngine.connect(self._process.socket, self._process, start)
        self._engine = asyncio.run_coroutine_threadsafe(connecting, loop).result()

    def read_model(self) -> wire.ModelRead:
        with self._explained():
            return self._engine.model_read.result()

    def finish(self) -> ReadyEngine:
        with self._explained():
            ready = self._engine.ready.result()
        return ReadyEngine(self._engine, ready.limits, ready.system_fingerprint)

    def abandon(self) -> None:
        self._engine.shutdown(at_once=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says with a death how the process ended."""
        try:
            yield
        except EngineDeadError as exc:
            raise EngineDeadError(f"{exc} ({self._process.describe_end()})") from exc
