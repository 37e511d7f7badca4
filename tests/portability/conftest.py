"""What must hold on every device. The tests in `on_eight_devices` need a process that simulates eight.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/portability/on_eight_devices
"""

from __future__ import annotations

import os

import pytest

# jax reads the number once, and everybody else's tests are of one device: `test_tensor_parallel` starts the process.
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
collect_ignore = [] if EIGHT_DEVICES in os.environ.get("XLA_FLAGS", "") else ["on_eight_devices"]


@pytest.fixture
def eight_devices() -> dict[str, str]:
    """The environment of a process with eight simulated devices.

    Programs are compiled as fast as can be. Eight devices of two cores wait for each other longer than XLA likes.
    """
    flags = (
        EIGHT_DEVICES,
        "--xla_backend_optimization_level=0",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    return os.environ | {"XLA_FLAGS": " ".join(flags)}
