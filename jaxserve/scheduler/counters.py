"""What a scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What has happened since start.

    Attributes:
        swap_preemptions, recompute_preemptions: sequences that gave way, by means.
        host_full: of the latter, those that would have been swapped had host memory not been full.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        copied_blocks: copied because another sequence held them too.
    """

    swap_preemptions: int = 0
    recompute_preemptions: int = 0
    host_full: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    copied_blocks: int = 0
