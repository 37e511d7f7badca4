"""A server process from its first socket to its exit code: listen, load, serve, drain, stop.

The port is open before the model is loaded, so that probes get an answer (503) instead of a refused
connection; while the server drains it stays open for the same reason. Owns signals and deadlines. Knows
neither models nor routes: loading is a function that it calls in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
import uvloop
from starlette.routing import Route

from jaxserve.errors import ConfigError, JaxserveError
from jaxserve_server.app import Application, AppSettings, build_app
from jaxserve_server.exit import leave_at_once
from jaxserve_server.protocol import ConnectionLimits, timed_protocol
from jaxserve_server.startup_log import ThroughputLog, log_ready
from jaxserve_server.status import Loaded, Phase, ServerStatus
from jaxserve_server.tls import CertificateWatch

KEEP_ALIVE_S = 15  # longer than the 5 s after which httpx, and so the openai client, drops idle connections
REPORT_EVERY_S = 10.0
FLUSH_S = 1.0  # for the error events of requests that the drain has cut short
CLOSE_S = 2  # for connections to close once nothing is open
FORCED_EXIT_S = 1.5  # from the second signal
STUCK_EXIT_S = 15.0  # past the drain's deadline: a stuck device call cannot be cancelled
MAX_HEADER_BYTES = 64 * 1024

logger = logging.getLogger("jaxserve.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the operator decides about the process.

    Attributes:
        shutdown_timeout_s: what open requests are given to finish after SIGTERM; 0 ends them at once.
        port: 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    app: AppSettings = field(default_factory=AppSettings)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    shutdown_timeout_s: float = 30.0
    stall_after_s: float | None = None
    uvicorn_log_level: str = "info"
    log_stats: bool = True
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    refresh_certificates: bool = False


class QuietServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, which close the listener first.

    A subclass because `serve` has no switch for it, and this method is the documented place.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Supervisor:
    """Runs one server until a signal, and says with which exit code the process should end."""

    def __init__(
        self,
        settings: ServerSettings,
        load: Callable[[asyncio.AbstractEventLoop], Loaded],
        api_routes: Sequence[Route],
    ) -> None:
        """`load` is called in a thread, with the event loop that will serve."""
        self._settings = settings
        self._load = load
        self._status = ServerStatus()
        if settings.stall_after_s is not None:
            self._status.stall_after_s = settings.stall_after_s
        self._application: Application = build_app(api_routes, self._status, settings.app)
        self._server = QuietServer(self._uvicorn_config())
        self._loop: asyncio.AbstractEventLoop
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._loader = threading.Thread(target=self._load_in_thread, name="load-model", daemon=True)
        self._loading: asyncio.Future[Loaded]
        self._deadlines: list[threading.Timer] = []

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT. Returns 0 after a drain, 1 if the model could not be served.

        Ends the process itself if something hangs, or if the model is still being loaded.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        listener = listen(self._settings.host, self._settings.port)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self._loop = runner.get_loop()
            handlers = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
            try:
                code = runner.run(self._main(listener))
            finally:
                for sig, handler in handlers.items():
                    signal.signal(sig, handler)
                for deadline in self._deadlines:
                    deadline.cancel()
        if self._loader.is_alive():
            leave_at_once(code)  # a thread inside XLA does not survive the interpreter's end
        return code

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            self._application.asgi,
            http=timed_protocol(settings.connections),  # pyright: ignore[reportArgumentType] - any factory will do
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=settings.uvicorn_log_level,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )

    async def _main(self, listener: socket.socket) -> int:
        url = self._url(listener)
        logger.info("listening on %s, loading the model", url)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        stopped = asyncio.create_task(self._stop.wait())
        self._loading = self._loop.create_future()
        self._loader.start()
        try:
            await asyncio.wait({self._loading, serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not self._loading.done():
                self._status.phase = Phase.DRAINING
                return 0
            if not self._publish():
                return 1
            log_ready(
                self._application.routes,
                url,
                self._loading.result().serving.model_name,
                with_key=bool(self._settings.app.keys),
            )
            reporting = asyncio.create_task(self._report(self._loading.result()))
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            reporting.cancel()
            await self._drain()
            return 0 if stopped.done() else 1
        finally:
            stopped.cancel()
            self._server.should_exit = True
            await serving
            self._abort_connections()
            await self._stop_engine()

    def _load_in_thread(self) -> None:
        try:
            loaded = self._load(self._loop)
        except BaseException as exc:
            self._hand_over(lambda failure=exc: self._loading.set_exception(failure))
        else:
            self._hand_over(lambda: self._loading.set_result(loaded))

    def _hand_over(self, settle: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped meanwhile
            self._loop.call_soon_threadsafe(settle)

    def _publish(self) -> bool:
        """Opens the server for requests. False, with a line that says why, if loading has failed."""
        failure = self._loading.exception()
        if failure is None:
            self._application.inner.state.serving = self._loading.result().serving
            self._status.publish(self._loading.result())
            return True
        if isinstance(failure, JaxserveError):
            logger.error("error: %s", failure)
        else:
            logger.error("error: the model could not be loaded", exc_info=failure)
        return False

    async def _report(self, loaded: Loaded) -> None:
        """Every 10 s: the throughput line, and a look at the certificate's files."""
        throughput = ThroughputLog(loaded.engine.metrics, loaded.engine.stats, time.monotonic())
        certificates = self._certificates()
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            await loaded.engine.refresh()
            line = throughput.line(time.monotonic())
            if line is not None and self._settings.log_stats:
                logger.info(line)
            if certificates is not None:
                certificates.refresh()

    def _certificates(self) -> CertificateWatch | None:
        settings, context = self._settings, self._server.config.ssl
        if not settings.refresh_certificates or context is None:
            return None
        assert settings.ssl_certfile is not None
        assert settings.ssl_keyfile is not None
        return CertificateWatch(context, settings.ssl_certfile, settings.ssl_keyfile)

    async def _drain(self) -> None:
        """New requests get 503; open ones end by themselves, or with an error when the time is over."""
        self._status.phase = Phase.DRAINING
        timeout_s = self._settings.shutdown_timeout_s
        self._exit_at_latest(timeout_s + STUCK_EXIT_S)
        logger.info("draining: %d requests open, up to %g s", len(self._status.open_requests), timeout_s)
        idle = asyncio.create_task(self._status.wait_idle())
        force = asyncio.create_task(self._force.wait())
        await asyncio.wait({idle, force}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            logger.warning("draining: time is over, ending %d requests with an error", self._status.expire_open())
            await asyncio.wait({idle}, timeout=FLUSH_S)
        if force.done():
            self._server.force_exit = True
            self._abort_connections()
        idle.cancel()
        force.cancel()

    def _abort_connections(self) -> None:
        """Drops the connections of clients that do not take what was sent to them."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]

    async def _stop_engine(self) -> None:
        if self._loading.done() and self._loading.exception() is None:
            await asyncio.to_thread(self._loading.result().engine.shutdown)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._stop.is_set():
            self._loop.call_soon_threadsafe(self._stop.set)
        else:
            self._exit_at_latest(FORCED_EXIT_S)
            self._loop.call_soon_threadsafe(self._force.set)

    def _exit_at_latest(self, seconds: float) -> None:
        """Ends the process in `seconds` with exit code 1, unless `run` has returned: a stuck device call hangs."""
        deadline = threading.Timer(seconds, leave_at_once, (1,))
        deadline.daemon = True
        deadline.start()
        self._deadlines.append(deadline)

    def _url(self, listener: socket.socket) -> str:
        host, port = listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"{'https' if self._settings.ssl_certfile else 'http'}://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Without SO_REUSEPORT: two servers on one port by mistake would share its requests.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    listener: socket.socket | None = None
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(infos, key=lambda info: info[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {exc.strerror or exc}. Choose another --host or --port."
        ) from None
    return listener
