"""`python -m jaxserve.compile_check MODEL --topology v6e:2x4 ...`: will it fit and compile there? No TPU is needed."""

from __future__ import annotations

import sys

from jaxserve_server.compile_check import main

if __name__ == "__main__":
    sys.exit(main())
