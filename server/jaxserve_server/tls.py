"""Certificates that change while the server runs."""

from __future__ import annotations

import logging
import os
import ssl

logger = logging.getLogger("jaxserve.server")


class CertificateWatch:
    """Reloads a TLS context's certificate when its files have changed. Open connections keep the old one."""

    def __init__(self, context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
        self._context = context
        self._certfile = certfile
        self._keyfile = keyfile
        self._seen = self._signature()

    def refresh(self) -> bool:
        """Whether a changed certificate was loaded. A pair that does not fit is left for the next call."""
        try:
            signature = self._signature()
            if signature == self._seen:
                return False
            # A context of its own first: a key that does not fit would leave the live one half changed.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certfile, self._keyfile)
            self._context.load_cert_chain(self._certfile, self._keyfile)
        except (OSError, ssl.SSLError):
            logger.warning("the changed TLS certificate or key cannot be loaded; the old one stays in use")
            return False
        self._seen = signature
        logger.info("TLS certificate reloaded")
        return True

    def _signature(self) -> tuple[tuple[int, int, int], ...]:
        """What tells that a file was replaced or rewritten."""
        found = (os.stat(self._certfile), os.stat(self._keyfile))
        return tuple((entry.st_mtime_ns, entry.st_ino, entry.st_size) for entry in found)
