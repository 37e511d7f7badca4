"""Beam search written down plainly: whole sequences, all continuations sorted, float64, no cache, no rows.

It shares no code with the engine. `scripts/make_beam_goldens.py` writes what Hugging Face's `generate` answers;
`test_beam_search.py` holds this to that, and the engine to both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Sequences of equal length -> float[n, V]: the logits after the last token of each.
LogitsOf = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


@dataclass(frozen=True, order=True)
class Found:
    """A finished sequence; `order` puts the worst first."""

    score: float
    logprob: float
    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Searched:
    """What a search found, the best first.

    Attributes:
        margin: the smallest difference of sums or scores that decided anything. Who computes logits with other
            roundings can be held to the same result where this is larger than theirs.
    """

    found: tuple[Found, ...]
    margin: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def beam_search(
    logits_of: LogitsOf,
    prompt: Sequence[int],
    *,
    width: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_ids: Collection[int] = (),
) -> Searched:
    """The `width` best outputs for a prompt."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Found] = []
    margins = [float("inf")]
    for length in range(1, max_tokens + 1):
        logprobs = log_softmax(logits_of([(*prompt, *tokens) for _, tokens in running]))
        sums = np.array([total for total, _ in running])[:, None] + logprobs
        order = np.argsort(-sums, axis=None)[: (len(stop_ids) + 1) * width + 1]
        ranked = [
            (float(sums[beam, token]), (*running[beam][1], int(token)))
            for beam, token in zip(*np.unravel_index(order, sums.shape), strict=True)
        ]
        ends = [length == max_tokens or tokens[-1] in stop_ids for _, tokens in ranked]
        going = [candidate for candidate in ranked if candidate[1][-1] not in stop_ids]
        margins.append(_gap([total for total, _ in going], width))
        if any(ends[: width + 1]):
            margins.append(_gap([total for total, _ in ranked], width))
        for (total, tokens), end in list(zip(ranked, ends, strict=True))[:width]:
            if end:
                finished.append(Found(total / length**length_penalty, total, tokens, tokens[-1] in stop_ids))
        finished.sort(reverse=True)
        margins.append(_gap([one.score for one in finished], width))
        finished, running = finished[:width], going[:width]
        if len(finished) == width and length < max_tokens:
            if early_stopping is True:
                break
            far = early_stopping == "never" and length_penalty > 0
            hope = running[0][0] / (max_tokens if far else length) ** length_penalty
            margins.append(abs(hope - finished[-1].score))
            if hope <= finished[-1].score:
                break
    margins += [better.score - worse.score for better, worse in pairwise(finished)]
    return Searched(tuple(finished), min(margins))


def _gap(descending: Sequence[float], width: int) -> float:
    """How far the last of the first `width` is ahead of the next one."""
    return descending[width - 1] - descending[width] if len(descending) > width else float("inf")
