"""Recorded traffic: when requests came, how long they were, and which prompts began alike.

The files are not part of the project. They are looked for in the folder that the environment names in `JAXSERVE_DATA`,
`../shared/data` if it names none.

Source: Mooncake (arXiv:2407.00079), https://github.com/kvcache-ai/Mooncake: traces of a chat service and of synthetic
load, with one id for each piece of a prompt. An id always follows the same id, so it stands for a whole prefix.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import ROOT


def data_folder() -> Path:
    """Where traces are looked for."""
    return Path(os.environ.get("JAXSERVE_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request.

    Attributes:
        arrival_s: from the start of the trace.
        num_prompt, num_output: tokens.
        piece_ids: of the prompt's pieces; the last one may be shorter than the others.
    """

    arrival_s: float
    num_prompt: int
    num_output: int
    piece_ids: tuple[int, ...]

    def prompt(self, piece_len: int) -> np.ndarray:
        """int32[num_prompt]: tokens that agree with another request's as far as the ids do."""
        pieces = np.array(self.piece_ids, np.int32)[:, None] * piece_len + np.arange(piece_len, dtype=np.int32)
        return pieces.ravel()[: self.num_prompt]


def read_trace(path: Path) -> list[TracedRequest]:
    """The file's requests, in order of arrival."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    requests = [
        TracedRequest(
            record["timestamp"] / 1e3, record["input_length"], record["output_length"], tuple(record["hash_ids"])
        )
        for record in records
    ]
    return sorted(requests, key=lambda request: request.arrival_s)
