"""What other engines made of SmolLM2-135M's shape, for where they are not at hand.

Tokens a second on two Zen 4 cores whose read bandwidth was 53.8 GB/s, each engine alone: transformers 5.23 (the better
of static batches and continuous batching), EasyDeL eSurge 0.3.0, llama.cpp (bindings 0.3.36). A ratio to one of them
means something on such a machine only; `benchmarks.peers` measures those that can be run here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report
from benchmarks.workload import RequestSet

_SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "intermediate_size": 1536}


@dataclass(frozen=True, slots=True)
class Known:
    """One engine's figure.

    Attributes:
        rate: tok/s, of the tokens that `RequestSet.num_rated_tokens` counts.
        floor: how many times as fast we are to be at least.
    """

    engine: str
    rate: float
    floor: float


KNOWN: Mapping[tuple[str, str], tuple[Known, ...]] = {
    ("float32", "batch"): (Known("transformers", 50, 2), Known("eSurge", 47, 2), Known("llama.cpp", 119, 1)),
    ("bfloat16", "batch"): (Known("transformers", 104, 2), Known("llama.cpp", 184, 1)),
    ("float32", "stream"): (Known("llama.cpp", 51, 0.6),),
    ("bfloat16", "stream"): (Known("llama.cpp", 87, 0.6),),
    ("float32", "shared"): (Known("eSurge", 50, 1.5),),
    ("float32", "long"): (Known("transformers", 441, 1),),
}


def known_peers(folder: Path, dtype: str, requests: RequestSet, *, quick: bool = False) -> tuple[Known, ...]:
    """The figures that a run of these requests compares with: none of another model's shape, or of fewer requests."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if quick or any(config.get(name) != value for name, value in _SHAPE.items()):
        return ()
    if requests.name == "batch" and len(requests.prompts) != 64:
        return ()
    return KNOWN.get((dtype, requests.name), ())


def add_known(report: Report, name: str, rate: float, peers: tuple[Known, ...]) -> None:
    """A row for each figure: ours over it, with its floor."""
    for peer in peers:
        row = f"{name} ÷ {peer.engine}'s {peer.rate:g} on two Zen 4 cores"
        report.add(row, rate / peer.rate, "", f">= {peer.floor:g}")
