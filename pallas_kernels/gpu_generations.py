"""Generations of NVIDIA GPUs that the kernels have, and which one a process has.

Products and copies are what sets them apart: wgmma is Hopper's alone and mma, Ampere's, is in every later one too; the
copy engine (TMA) came with Hopper, and before it a warpgroup's threads copy, by cp.async. Mosaic GPU has mma, cp.async
and what else Ampere needs since jax 0.11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import require

_KIB = 1024
_HAS_MMA = hasattr(plgpu, "mma")  # jax 0.11


@dataclass(frozen=True)
class Generation:
    """What a kernel needs to know of the GPUs that it is compiled for.

    Attributes:
        name: NVIDIA's.
        has_tma: whether the copy engine moves tiles between device and shared memory.
        has_wgmma: whether products are wgmma's; else they are mma's.
        converts_fp8: whether there are instructions that turn fp8 into 16 bits.
        shared_bytes: of one CTA, its barriers included.
        num_sms: of the part that is in servers, or of the largest.
    """

    name: str
    has_tma: bool
    has_wgmma: bool
    converts_fp8: bool
    shared_bytes: int
    num_sms: int


HOPPER = Generation("Hopper", True, True, True, 227 * _KIB, 132)  # H100 SXM, H200
AMPERE = Generation("Ampere", False, False, False, 163 * _KIB, 108)  # A100
BLACKWELL = Generation("Blackwell", True, False, True, 227 * _KIB, 148)  # B200

GENERATIONS = {
    "8.0": AMPERE,
    "8.6": Generation("Ampere", False, False, False, 99 * _KIB, 84),  # A40
    "8.9": Generation("Ada", False, False, True, 99 * _KIB, 142),  # L40S
    "9.0": HOPPER,
    "10.0": BLACKWELL,
    "10.3": BLACKWELL,
    "12.0": Generation("Blackwell", True, False, True, 99 * _KIB, 188),  # RTX PRO 6000
    "12.1": Generation("Blackwell", True, False, True, 99 * _KIB, 48),  # GB10
}


def uncovered_device(device: Any) -> str | None:
    """Why the GPU kernels cannot run on a device, as a sentence; None if they can."""
    known = ", ".join(GENERATIONS)
    if device.platform not in ("gpu", "cuda"):
        return f"the device is {device.platform}: the kernels are for NVIDIA GPUs of compute capability {known}"
    found = _capability_of(device)
    if found not in GENERATIONS:
        return f"compute capability is {found}: the kernels have {known}"
    generation = GENERATIONS[found]
    if not (generation is HOPPER or _HAS_MMA):
        what = f"compute capability is {found} ({generation.name}) and jax {jax.__version__}"
        return f"{what}: the kernels for GPUs other than Hopper need jax 0.11, whose Mosaic GPU has mma and cp.async"
    return None


def generation_here(name: str, *, interpreted: bool) -> Generation:
    """That of this process's GPU, or of the abstract device that a program is lowered for; Hopper where there is none.

    Args:
        name: the kernel's, for the message.

    Raises:
        ValueError: no kernel is for it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if _capability_of(device) == "unknown":
        device = jax.devices()[0] if jax.default_backend() == "gpu" else None
    if interpreted or device is None:
        return HOPPER
    reason = uncovered_device(device)
    require(reason is None, f"{name}: {reason}")
    return GENERATIONS[_capability_of(device)]


def _capability_of(device: Any) -> str:
    return str(getattr(device, "compute_capability", "unknown"))
