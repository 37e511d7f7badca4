"""What every test shares: a CPU device, shape checks on the device code, and the folder of outside data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Read by jax when it is first imported, here and in the subprocesses that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

REPO = Path(__file__).parents[1]
DEVICE_PACKAGES = ["jaxserve.layers", "jaxserve.models", "jaxserve.ops", "jaxserve.steps"]

# Annotations such as Float[Array, "rows heads head_dim"] are checked at every call, in tests only. Not in
# jaxserve.state: jax builds its pytrees with all kinds of leaves on the way.
install_import_hook(DEVICE_PACKAGES, "beartype.beartype")

# A first example that compiles or imports takes seconds: wall-clock deadlines would fail by chance.
settings.register_profile("jaxserve", deadline=None, print_blob=True)
settings.load_profile("jaxserve")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of this tree."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of traces, tokenizers and templates that are not part of the repository: JAXSERVE_DATA."""
    folder = Path(os.environ.get("JAXSERVE_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set JAXSERVE_DATA to the folder that holds traces/, tokenizers/ …")
    return folder
