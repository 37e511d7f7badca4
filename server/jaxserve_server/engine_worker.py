"""The engine's process: reads the weights, steps, and serves one server over the socket that it was born with.

    python -m jaxserve_server.engine_worker DESCRIPTOR

Three threads: this one steps; one reads the socket, and ends the process when the server is gone; one writes what
the socket did not take at once, so that no step waits for a reader. And a fourth is heard once a second.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from jaxserve.engine.stream import Item
from jaxserve.errors import EngineError, JaxserveError, RequestError
from jaxserve.kernels_ahead import begin_kernels
from jaxserve_server import wire
from jaxserve_server.exit import leave_at_once
from jaxserve_server.startup_log import configure_logging, log_compiled

if TYPE_CHECKING:
    from jaxserve.engine.engine import EngineCore
    from jaxserve.engine.step_loop import StepLoop

HEARTBEAT_S = 1.0
FLUSH_S = 5.0  # for the last message to leave
READ_BYTES = 2**18

logger = logging.getLogger("jaxserve.server")


class Link:
    """This end of the socket. `send` never blocks; what the server does not take at once, a thread hands over.

    Nothing bounds what waits: it is at most what the open requests may still generate.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._unsent: deque[Any] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name="engine-write", daemon=True).start()

    def send(self, message: wire.FromEngine) -> None:
        """From any thread. Cost: 25 us with 64 deltas, a third of it the system's."""
        data = wire.frame(message, self._encoder)
        with self._changed:
            sent = 0 if self._unsent else self._send_now(data)
            if sent < len(data):
                self._unsent.append(memoryview(data)[sent:])
                self._changed.notify_all()

    def _send_now(self, data: bytearray) -> int:
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # the server is gone, which the reading thread sees, too
            return len(data)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._unsent:
                    self._changed.wait()
                data = self._unsent[0]
            try:
                self._sock.sendall(data)
            except OSError:
                return
            with self._changed:
                self._unsent.popleft()
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all is sent, for seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent, FLUSH_S)

    def messages(self) -> Iterator[Any]:
        """What the server sends, until it closes the socket or is gone.

        Raises:
            MalformedFrameError: what came is no message.
        """
        frames = wire.FrameReader(wire.FromServer)
        while data := self._receive():
            yield from frames.feed(data)

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(READ_BYTES)
        except OSError:
            return b""


class Worker:
    """Serves what the first message asks for, until the last one or the server's end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._start: wire.Start
        self._started = threading.Event()
        self._stopped = threading.Event()
        self._core: EngineCore
        self._loop: StepLoop | None = None

    def run(self) -> int:
        """Returns the exit code: 0 if the server asked for the end."""
        threading.Thread(target=self._read, name="engine-read", daemon=True).start()
        self._started.wait()
        configure_logging(self._start.log_level)
        try:
            error = self._serve()
        except JaxserveError as exc:
            error = exc
        except Exception as exc:
            logger.error("error: the model could not be loaded", exc_info=exc)
            error = EngineError("The model could not be loaded: see the traceback above.")
        if self._stopped.is_set():
            return 0
        self._link.send(wire.Failed(wire.pack_error(error)))
        self._link.flush()
        return 1

    def _serve(self) -> JaxserveError:
        """Loads and steps; returns why it ended."""
        begin_kernels(self._start.engine)
        gc.disable()  # importing and tracing make a million objects and hardly any garbage: 2 % of a first start
        from jaxserve.engine.engine import EngineCore  # jax: 1.5 s, in which the server's end is noticed already
        from jaxserve.engine.step_loop import StepLoop
        from jaxserve_server import engine_start

        start = self._start
        model = engine_start.read_weights(start)
        self._link.send(engine_start.model_read(model))
        self._core = core = EngineCore(model.config, model.params, start.engine, on_progress=log_compiled)
        fingerprint = engine_start.fingerprint(model, core.limits)
        del model  # the core has the weights
        engine_start.log_engine(start, core.limits, core.runner.kv_bytes, core.init_s)
        self._loop = loop = StepLoop(core, start.engine, self._deliver)
        gc.freeze()  # what is there stays: no collection looks through it again
        gc.enable()
        stats, metrics = wire.pack_stats(loop.stats()), core.metrics.state()
        self._link.send(wire.Ready(core.limits, fingerprint, stats, metrics))
        threading.Thread(target=self._beat, name="engine-heartbeat", daemon=True).start()
        return loop.run()

    def _deliver(self, items: list[tuple[int, Item]]) -> None:
        """One frame for all streams."""
        assert self._loop is not None
        packed = [wire.pack_item(number, item) for number, item in items]
        self._link.send(wire.Step(packed, wire.pack_stats(self._loop.stats())))

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            self._send_snapshot(None)

    def _send_snapshot(self, call: int | None) -> None:
        assert self._loop is not None
        self._link.send(wire.Snapshot(call, wire.pack_stats(self._loop.stats()), self._core.metrics.state()))

    def _read(self) -> None:
        """Serves the socket. Whatever ends this thread ends the process: nobody else would."""
        try:
            for message in self._link.messages():
                self._on_message(message)
            leave_at_once(0 if self._stopped.is_set() else 1)
        except BaseException as exc:
            logger.critical("the server's messages cannot be read", exc_info=exc)
            leave_at_once(1)

    def _on_message(self, message: wire.FromServer) -> None:
        loop = self._loop
        match message:
            case wire.Start():
                self._start = message
                self._started.set()
            case wire.Stop():
                self._stopped.set()
                if loop is None:  # it loads or compiles, which nobody can interrupt
                    leave_at_once(0)
                loop.stop()
            case wire.Add():
                self._add(message)
            case wire.Abort():
                assert loop is not None
                loop.abort(str(message.number), message.reason, message.index)
            case wire.ResetPrefixCache():
                assert loop is not None
                call = message.call
                loop.reset_prefix_cache(lambda count: self._link.send(wire.PrefixCacheReset(call, count)))
            case wire.Refresh():
                self._send_snapshot(message.call)

    def _add(self, message: wire.Add) -> None:
        """Checks a request, here and not in the thread that steps, and puts it in line."""
        from jaxserve.engine.step_loop import Arrival

        assert self._loop is not None
        prompt, params = message.token_ids, message.params
        try:
            admitted = self._core.check(prompt, params, message.cache_salt)
        except RequestError as error:
            self._deliver([(message.number, error)])
        except Exception as exc:  # a fault of ours ends this request, not all
            logger.error("a request could not be checked", exc_info=exc)
            self._deliver([(message.number, EngineError("The request could not be checked."))])
        else:
            self._loop.add(Arrival(str(message.number), message.number, admitted, params.num_sequences, len(prompt)))


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # when to end is the server's to say
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    return Worker(Link(sock)).run()


if __name__ == "__main__":
    # Threads read and write until the last moment, which the interpreter's end would trip over.
    leave_at_once(main())
