"""`Searches`: the beam searches that run, and how the host's tables follow the device's beams.

The device chooses each step's beams and lets its block tables follow; a step later the host learns which beam
continues which, and does the same to its own tables and counts.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler.beams import BeamSearch
from jaxserve.scheduler.finish import BeamAnswer, Hypothesis
from jaxserve.scheduler.sequences import Request, SequenceTable

EndedSearch = tuple[Request, tuple[Hypothesis, ...]]


class Searches:
    """Running beam searches, by request."""

    def __init__(self, sequences: SequenceTable, memory: KVMemory, eos_token_ids: tuple[int, ...]):
        self._sequences, self._memory, self._eos_token_ids = sequences, memory, eos_token_ids
        self._searches: dict[str, tuple[BeamSearch, np.ndarray]] = {}  # and the beams' rows, in order

    def start(self, rows: tuple[int, ...]) -> None:
        """Begins the search of these rows' request."""
        request = self._sequences.sequences[rows[0]].request
        search = BeamSearch.for_request(request, self._eos_token_ids)
        self._searches[request.request_id] = search, np.array(rows, np.intp)

    def end(self, request_id: str) -> None:
        """Forgets a request's search, if there is one."""
        self._searches.pop(request_id, None)

    def clear(self) -> None:
        """Forgets all."""
        self._searches.clear()

    def advance(
        self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, beams: np.ndarray, answer: BeamAnswer
    ) -> list[EndedSearch]:
        """Lets tables and searches follow a step; returns those that are over, whose rows are still held.

        Args:
            rows, positions, tokens: [S] the step's sampled rows, and where which token stands.
            beams: rows among them that are live beams, whole searches of them.
        """
        num_rows = self._sequences.num_rows
        place = np.full(num_rows, -1, np.intp)
        place[rows] = np.arange(len(rows))
        beam_of_row = np.zeros(num_rows, np.intp)
        ended = []
        for request in dict.fromkeys(s.request for s in self._sequences.sequences[beams]):
            search, group = self._searches[request.request_id]
            at = place[group]
            parents = answer.parents[at].astype(np.intp)
            beam_of_row[group] = np.arange(len(group))
            assert (self._sequences.sequences[parents] != None).all(), "a beam continues nobody's"  # noqa: E711
            self._memory.inherit(group, parents, int(positions[at[0]]) // self._memory.block_size)
            over = search.advance(
                beam_of_row[parents],
                tokens[at],
                answer.scores[at],
                answer.stop_tokens[at],
                answer.stop_scores[at],
            )
            if over:
                ended.append((request, search.hypotheses()))
        return ended
