"""What several tests of the device's half share."""

from __future__ import annotations

import jax
import pytest

from jaxserve.ops import paged_attention


@pytest.fixture
def long_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms of attention, those too that programs for short contexts are spared."""
    monkeypatch.setattr(paged_attention, "_LONG_CONTEXT", 0)
    jax.clear_caches()  # what was traced with another bound
