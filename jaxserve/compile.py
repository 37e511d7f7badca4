"""`python -m jaxserve.compile [MODEL] ...`: compiles what `jaxserve.serve` with the same flags will load."""

from __future__ import annotations

import sys

from jaxserve_server.precompile import main

if __name__ == "__main__":
    sys.exit(main())
