"""`Decision`: what the planner wants of the next step, as a frozen value, before it has any effect.

It names sequences, rows and counts. Which blocks a row gets follows when `Scheduler.commit` carries it out: to
foretell them would take a second copy of the pool's order of eviction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Victim:
    """A row that gives way.

    Attributes:
        row: the row.
        swaps: its blocks go to host memory; otherwise what the cache does not keep is computed again.
        host_full: swapping would have been cheaper, but host memory is full.
    """

    row: int
    swaps: bool
    host_full: bool


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A waiting sequence that gets a row.

    Attributes:
        sequence: who.
        row: which.
        shared: int32[h] blocks that exist and that it will share: a cached prefix, all blocks of the sibling that it
            forks from, or what is left on the device of its own.
        num_stored: its first tokens whose KV it need not compute.
        num_taken: free blocks that it takes before its first chunk: cached ones that it shares, and those that
            it restores from host memory.
        fork_of: row of the sibling that it forks from, or -1.
        num_reserved: if it will be protected, the blocks that are reserved for it; -1 if it will not be.
    """

    sequence: Sequence
    row: int
    shared: np.ndarray
    num_stored: int
    num_taken: int
    fork_of: int = -1
    num_reserved: int = -1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens of a row that are fed.

    Attributes:
        row, start, length: which tokens.
        samples: a token is sampled after the last of them.
        stored: it is one token, whose KV is in the cache.
        num_blocks, num_new_blocks: columns of the row's table in use before, and those that the chunk adds.
    """

    row: int
    start: int
    length: int
    samples: bool
    stored: bool
    num_blocks: int
    num_new_blocks: int


class Decision(NamedTuple):
    """The next step.

    Attributes:
        step: counts from 0.
        decodes: the rows that feed the token they sampled last.
        decode_positions: [D] its position; in a loop of several steps, the first one's.
        num_steps: decode steps that the device runs in one loop. A row whose sequence gets to its longest before takes
            part in fewer.
        opening_rows: intp[n] the decode rows of whose tokens one is the first of a block.
        copy_rows: [X] of the decode rows, those whose token goes to a block that others hold too.
        chunks: in order of service.
        entries: in order of admission.
        beam_groups: rows of each beam search whose beams start, in order of the beams.
        victims: rows that give way, in order.
    """

    step: int
    decodes: Roster
    decode_positions: np.ndarray
    num_steps: int
    opening_rows: np.ndarray
    copy_rows: np.ndarray
    chunks: tuple[Chunk, ...]
    entries: tuple[Entry, ...]
    beam_groups: tuple[tuple[int, ...], ...]
    victims: tuple[Victim, ...]

    @property
    def decode_rows(self) -> np.ndarray:
        """intp[D]: the rows of `decodes`."""
        return self.decodes.rows

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done: all running sequences await their last answer, or there are none."""
        return not (len(self.decode_rows) or self.chunks or self.victims)

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream that the device is fed; what a loop feeds after its first step is not among them."""
        return len(self.decode_rows) + sum(chunk.length for chunk in self.chunks)
