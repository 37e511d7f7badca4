"""What is timed of whole steps, and under which settings of the engine. No jax: who plans must not hold the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.config import EngineConfig

SETTINGS = {"attention_backend": ("xla", "pallas"), "stacked_layers": (False, True)}  # fields that an engine may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is timed of a model.

    Attributes:
        batches: of decode steps, ascending.
        context: tokens of each sequence, the one that is fed included.
        loops: batches at which the loop is timed, too.
        prompt: tokens; 0 for no prefill.
        chunks: tokens of a chunk.
    """

    batches: tuple[int, ...] = (1, 64, 256)
    context: int = 1024
    loops: tuple[int, ...] = (1,)
    prompt: int = 8192
    chunks: tuple[int, ...] = (2048, 8192)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Plan:
        """A plan that was JSON in between."""
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        return cls(**values)

    def max_model_len(self, block_size: int) -> int:
        """With room for the loop's tokens, which are no more than a block's."""
        return -(-max(self.prompt, self.context + block_size) // 1024) * 1024

    def blocks(self, batch: int, block_size: int) -> int:
        """Of the pool, the null block included."""
        each = -(-self.context // block_size) + 1
        return max(batch * each, self.max_model_len(block_size) // block_size) + 1


SMALL_PLAN = Plan(batches=(1,), context=48, prompt=64, chunks=(16,))


def settings_of_the_engine() -> dict[str, tuple[Any, ...]]:
    """The settings that this engine's configuration has, and their values."""
    known = {field.name for field in fields(EngineConfig)}
    return {name: values for name, values in SETTINGS.items() if name in known}
