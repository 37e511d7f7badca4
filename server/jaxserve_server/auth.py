"""API keys: who may call anything but `/ping` and `/health`.

Default deny: the middleware wraps the whole application and reads `scope["path"]`, which comes from the
request line alone (CVE-2026-48746 was a path taken from the Host header). Only digests are kept, and they
are compared in constant time (CVE-2025-59425).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve_server.errors import ApiError, ErrorKind, error_response

PUBLIC_PATHS = frozenset({"/ping", "/health"})


class ApiKeys:
    """A set of keys, of which only the SHA-256 digests are held."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(digest(key.encode()) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, token: bytes) -> bool:
        """Whether `token` is a key. Takes the same time for every token of one length."""
        presented = digest(token)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(presented, known)
        return found


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def bearer_token(scope: Scope) -> bytes | None:
    """The token of the request's one `Authorization: Bearer` header; None if there is none, or two."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(b" ")
    token = token.strip(b" ")
    return token if scheme.lower() == b"bearer" and token else None


class Authentication:
    """Answers 401 to every request without a key, except to the public paths."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC_PATHS:
            token = bearer_token(scope)
            if token is None:
                await error_response(ApiError(ErrorKind.MISSING_API_KEY))(scope, receive, send)
                return
            if not self._keys.accept(token):
                await error_response(ApiError(ErrorKind.INVALID_API_KEY))(scope, receive, send)
                return
        await self._app(scope, receive, send)
