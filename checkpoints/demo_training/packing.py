"""Packs documents into rows of fixed length without attention from one document to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from demo_training.corpus import Split, documents
from demo_training.tokenizer import Renderer

_WAITING = 64  # documents to choose from when filling a row
PROMPT_WEIGHT = 0.15  # what reading a user's words counts beside writing an answer


class Batch(NamedTuple):
    """Rows of packed documents; a tuple, so that jax sees a pytree.

    Attributes:
        tokens: i32[rows, length + 1]; position i predicts i + 1.
        segments: i32[rows, length]; tokens attend only within their segment. 0 is padding.
        positions: i32[rows, length]; counted from the start of the document.
        weights: f32[rows, length]; of the prediction at each position.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def batches(renderer: Renderer, seed: int, split: Split, rows: int, length: int) -> Iterator[Batch]:
    """An endless stream of batches: each row takes the longest waiting documents that still fit."""
    stream = (renderer.document_ids(document) for document in documents(seed, split))
    waiting = [next(stream) for _ in range(_WAITING)]
    while True:
        batch = _empty(rows, length)
        for row in range(rows):
            used, segment = 0, 0
            fit: int | None = 0  # the one that has waited longest opens the row
            while fit is not None:
                ids, mask = waiting.pop(fit)
                waiting.append(next(stream))
                segment += 1
                used += _place(batch, row, used, segment, ids[: length + 1], mask)
                fit = _longest_fit([len(other) for other, _ in waiting], length + 1 - used)
        yield batch


def _longest_fit(lengths: list[int], room: int) -> int | None:
    fitting = [index for index, number in enumerate(lengths) if number <= room]
    return max(fitting, key=lambda index: lengths[index]) if fitting else None


def _empty(rows: int, length: int) -> Batch:
    shape = (rows, length)
    return Batch(
        np.zeros((rows, length + 1), np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
    )


def _place(batch: Batch, row: int, start: int, segment: int, ids: list[int], mask: list[bool]) -> int:
    """Writes one document at `start`; returns how many positions it takes."""
    number = len(ids)
    batch.tokens[row, start : start + number] = ids
    inputs = number - 1  # the last token is only predicted
    batch.segments[row, start : start + inputs] = segment
    batch.positions[row, start : start + inputs] = np.arange(inputs)
    batch.weights[row, start : start + inputs] = np.where(mask[1:number], 1.0, PROMPT_WEIGHT)
    return number
