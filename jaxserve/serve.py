"""`python -m jaxserve.serve [MODEL] ...`: the server's command line."""

from __future__ import annotations

import sys

from jaxserve_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
