"""`python -m jaxserve.serve`: parse, then load and serve.

Nothing heavy is imported before the command line is known to be good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError, JaxserveError
from jaxserve_server.flags import Options, is_loopback, parse_options

if TYPE_CHECKING:
    import asyncio

    from jaxserve_server.lifecycle import ServerSettings
    from jaxserve_server.status import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal. Returns the exit code: 0 after a drain, 1 if the model cannot be served.

    Exits with 2 upon a usage error.
    """
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
    except ConfigError as exc:  # of EngineConfig, whose bounds the flags do not repeat
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return serve(options)


def serve(options: Options) -> int:
    """Loads the model of `options` and serves it."""
    from jaxserve_server.lifecycle import Supervisor
    from jaxserve_server.routes import api_routes
    from jaxserve_server.startup_log import configure_logging, log_banner

    def load(loop: asyncio.AbstractEventLoop) -> Loaded:
        from jaxserve_server.loading import load  # 0.3 s; the port is open meanwhile

        return load(options, loop)

    configure_logging(options.uvicorn_log_level)
    log_banner(options)
    try:
        return Supervisor(server_settings(options), load, api_routes()).run()
    except JaxserveError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1


def server_settings(options: Options) -> ServerSettings:
    """The process' settings that `options` ask for."""
    from jaxserve_server.app import LOCAL_NAMES, AppSettings
    from jaxserve_server.auth import ApiKeys
    from jaxserve_server.lifecycle import ServerSettings

    hosts: tuple[str, ...] | None = options.allowed_hosts
    if not hosts:
        hosts = LOCAL_NAMES if is_loopback(options.host) else None
    elif "*" in hosts:
        hosts = None
    return ServerSettings(
        host=options.host,
        port=options.port,
        app=AppSettings(
            keys=ApiKeys(options.api_key),
            allowed_hosts=hosts,
            root_path=options.root_path.strip("/"),
            log_requests=not options.disable_log_requests,
        ),
        shutdown_timeout_s=options.shutdown_timeout,
        uvicorn_log_level=options.uvicorn_log_level,
        log_stats=not options.disable_log_stats,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        refresh_certificates=options.enable_ssl_refresh,
    )
