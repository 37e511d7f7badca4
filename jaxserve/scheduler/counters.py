"""What a scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.scheduler.decision import Victim
from jaxserve.scheduler.plan import Preempted
from jaxserve.scheduler.sequences import Sequence


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

    def count_preemptions(self, victims: tuple[Victim, ...], preempted: tuple[Preempted, ...]) -> None:
        """Notes who gave way, and how."""
        for victim, gone in zip(victims, preempted, strict=True):
            self.swap_preemptions += gone.swapped
            self.recompute_preemptions += not gone.swapped
            self.host_full += victim.host_full

    def count_hits(self, sequence: Sequence, num_stored: int, *, caches: bool) -> None:
        """Notes, of a sequence that enters for the first time, what the prefix cache spared it."""
        if sequence.num_cached_tokens >= 0:
            return
        num_prompt = len(sequence.request.prompt_token_ids)
        sequence.num_cached_tokens = 0
        if sequence.index == 0 and sequence.request.reads_cache and caches:
            # Of a prompt that is cached as a whole, the last token is still computed, for its logits.
            sequence.num_cached_tokens = min(num_stored, num_prompt - 1)
            self.prefix_queries += num_prompt
            self.prefix_hits += sequence.num_cached_tokens
