"""jaxserve: a JAX inference engine for large language models.

The public names below are imported when first used (PEP 562), so that `import jaxserve` costs nothing and
host code that lives under this package never pulls jax in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig, ModelConfig
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.errors import JaxserveError
    from jaxserve.llm import LLM
    from jaxserve.types import (
        BeamSearchOutput,
        BeamSearchParams,
        CompletionOutput,
        Delta,
        RequestOutput,
        SamplingParams,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Delta",
    "EngineConfig",
    "JaxserveError",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_MODULE_OF_NAME = {
    "LLM": "jaxserve.llm",
    "AsyncEngine": "jaxserve.engine.async_engine",
    "BeamSearchOutput": "jaxserve.types",
    "BeamSearchParams": "jaxserve.types",
    "CompletionOutput": "jaxserve.types",
    "Delta": "jaxserve.types",
    "EngineConfig": "jaxserve.config",
    "JaxserveError": "jaxserve.errors",
    "ModelConfig": "jaxserve.config",
    "RequestOutput": "jaxserve.types",
    "SamplingParams": "jaxserve.types",
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its module now."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}. It has: {', '.join(__all__)}.")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
