"""Laying a plan, or an admission, out as one int32 array. Arithmetic only; no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.scheduler.plan import StepPlan
from jaxserve.state import PROMPT_LOGPROBS, StepShape
from jaxserve.steps import FLOAT_FIELDS


def empty_step(shape: StepShape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The packed array of a step of padding alone, and views of its fields."""
    packed = shape.padding.copy()
    return packed, _views(packed, shape)


def measured_step(shape: StepShape, length: int) -> np.ndarray:
    """The packed array of a step that feeds the last row a chunk of so many tokens.

    Nothing is written to the cache and nothing sampled: for measuring what a step takes.
    """
    packed, fields = empty_step(shape)
    fields["stored"][:length] = 1
    fields["header"][:] = 0, put_chunk(fields, shape, 0, length), 0, 1
    return packed


def put_chunk(fields: dict[str, np.ndarray], shape: StepShape, first: int, length: int) -> int:
    """Makes tokens of the last row, from position `first` on, all that a step feeds; returns how many query tiles."""
    fields["positions"][:length] = np.arange(first, first + length)
    fields["rows"][:length] = shape.max_rows - 1
    starts = np.arange(0, length, shape.q_tile)
    fields["tile_start"][: len(starts)] = starts
    fields["tile_len"][: len(starts)] = np.minimum(shape.q_tile, length - starts)
    return len(starts)


def _views(packed: np.ndarray, shape: StepShape) -> dict[str, np.ndarray]:
    return {name: packed[start : start + length] for name, (start, length) in shape.fields().items()}


class StepPacker:
    """Lays plans out as the packed array of `state.StepBatch`.

    Keeps what stays of the decode rows while they stay the same, which is until one enters, ends or gives way: the
    plans of such steps have one and the same `decode_rows`.

    Args:
        features: int32 [R] feature bits; a row's may change when it is given to another sequence.
    """

    def __init__(self, features: np.ndarray) -> None:
        self._features = features
        self._rows: np.ndarray | None = None
        self._shape: StepShape | None = None
        self._base = np.empty(0, np.int32)  # the step but for positions, table entries and chunks

    def pack(self, plan: StepPlan, shape: StepShape, token_ids: np.ndarray, num_prompt: np.ndarray) -> np.ndarray:
        """A freshly allocated array: the device may still read the last one.

        Args:
            token_ids: int32 [R, max_model_len] each row's known tokens.
            num_prompt: int32 [R] prompt lengths.

        Raises:
            AssertionError: an id or index is out of range; JAX would clamp it and read somebody else's.
        """
        if plan.decode_rows is not self._rows or shape is not self._shape:
            self._base = self._lay_out(plan.decode_rows, shape)
            self._rows, self._shape = plan.decode_rows, shape
        packed, fields, num_updates = self._base.copy(), shape.fields(), len(plan.block_rows)
        _put(packed, fields["positions"], plan.decode_positions)
        if num_updates:
            _put(packed, fields["update_rows"], plan.block_rows)
            _put(packed, fields["update_cols"], plan.block_cols)
            _put(packed, fields["update_ids"], plan.block_ids)
        assert plan.num_steps <= shape.max_steps, (plan.num_steps, shape)
        packed[3] = plan.num_steps
        if len(plan.prefill_rows):
            self._pack_chunks(packed, plan, shape, token_ids, num_prompt)
        return packed

    def _lay_out(self, rows: np.ndarray, shape: StepShape) -> np.ndarray:
        """A step of these decode rows, at no position yet."""
        base, fields = shape.padding.copy(), shape.fields()
        _put(base, fields["tokens"], np.full(len(rows), -1, np.int32))
        _put(base, fields["rows"], rows)
        _put(base, fields["sample_rows"], rows)
        base[0], base[2] = len(rows), int(np.bitwise_or.reduce(self._features[rows])) & ~PROMPT_LOGPROBS
        return base

    def _pack_chunks(
        self, packed: np.ndarray, plan: StepPlan, shape: StepShape, token_ids: np.ndarray, num_prompt: np.ndarray
    ) -> None:
        features, sampled = self._features, plan.sampled_rows
        _put(packed, shape.fields()["sample_rows"], sampled)
        step_features = int(np.bitwise_or.reduce(features[sampled])) & ~PROMPT_LOGPROBS
        step_features |= int(np.bitwise_or.reduce(features[plan.prefill_rows])) & PROMPT_LOGPROBS
        packed[1] = _pack_prefill(plan, shape, _views(packed, shape), token_ids, num_prompt, step_features)
        packed[2] = step_features


def _put(packed: np.ndarray, field: tuple[int, int], values: np.ndarray) -> None:
    start, length = field
    assert len(values) <= length, (len(values), field)
    packed[start : start + len(values)] = values


def _pack_prefill(
    plan: StepPlan,
    shape: StepShape,
    fields: dict[str, np.ndarray],
    token_ids: np.ndarray,
    num_prompt: np.ndarray,
    step_features: int,
) -> int:
    """Fills in the chunks and their query tiles; returns how many tiles there are."""
    offset = num_sampled = num_decode = len(plan.decode_rows)
    tiles: list[tuple[int, int]] = []
    for row, start, length, samples in zip(
        plan.prefill_rows.tolist(),
        plan.prefill_starts.tolist(),
        plan.prefill_lens.tolist(),
        plan.prefill_samples.tolist(),
        strict=True,
    ):
        end = offset + length
        fields["tokens"][offset:end] = token_ids[row, start : start + length]
        fields["positions"][offset:end] = np.arange(start, start + length)
        fields["rows"][offset:end] = row
        if step_features & PROMPT_LOGPROBS:
            fields["targets"][offset:end] = _targets(token_ids[row], int(num_prompt[row]), start, length)
        if samples:
            fields["sample_index"][num_sampled] = end - 1
            num_sampled += 1
        tiles.extend((at, min(shape.q_tile, end - at)) for at in range(offset, end, shape.q_tile))
        offset = end
    assert offset <= shape.num_tokens, (offset, shape)
    fields["stored"][num_decode:offset] = np.repeat(plan.prefill_stored, plan.prefill_lens)
    tile_array = np.asarray(tiles, np.int32)
    fields["tile_start"][: len(tiles)] = tile_array[:, 0]
    fields["tile_len"][: len(tiles)] = tile_array[:, 1]
    return len(tiles)


def _targets(tokens: np.ndarray, num_prompt: int, start: int, length: int) -> np.ndarray:
    """The prompt token after each of [start, start + length), -1 past the prompt."""
    targets = np.full(length, -1, np.int32)
    known = max(min(length, num_prompt - 1 - start), 0)
    targets[:known] = tokens[start + 1 : start + 1 + known]
    return targets


def pack_fields(fields: Mapping[str, int], values: Mapping[str, Any]) -> np.ndarray:
    """Values one after the other as the admission programs of `steps` split them."""
    packed = np.empty(sum(fields.values()), np.int32)
    offset = 0
    for name, length in fields.items():
        value = np.asarray(values[name])
        as_ints = value.astype(np.float32).view(np.int32) if name in FLOAT_FIELDS else value.astype(np.int32)
        packed[offset : offset + length] = as_ints
        offset += length
    return packed
