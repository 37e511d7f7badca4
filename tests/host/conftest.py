"""The simulation of the host's side, shared by the tests of the scheduler and of the cache."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SIMULATION = Path(__file__).parent / "simulation"


@pytest.fixture(scope="session")
def echo() -> ModuleType:
    """The package `simulation` beside this file."""
    name = "simulation"
    if name not in sys.modules:
        places = [str(SIMULATION)]
        spec = importlib.util.spec_from_file_location(
            name, SIMULATION / "__init__.py", submodule_search_locations=places
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its own modules look it up
        spec.loader.exec_module(module)
    return sys.modules[name]
