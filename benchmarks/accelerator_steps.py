"""How near do whole steps come to their roofline: the engine's own programs, on random weights in a known shape.

One job is one model in one setting: attention backend, layers stacked or not, command buffers or not. Its rows: a
decode step at several batch sizes, a context of 1k each; the loop of several decode steps that one call can run; a
prompt of 8k tokens, in chunks of the engine's default budget and as one. Steps follow one another as the engine hands
them over: cache and state donated, the packed array from the host. Each step samples (greedily), and the last answer's
logits must have been finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_checks import copies_of
from benchmarks.accelerator_jobs import Sink
from benchmarks.accelerator_models import FULL_NAMES, MODELS, Roofline, needed_bytes, random_params
from benchmarks.accelerator_plan import Plan
from benchmarks.accelerator_timing import memory_bytes, random_values, time_calls
from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine.compiled import num_cores
from jaxserve.engine.pack import empty_step
from jaxserve.engine.programs import engine_programs, step_shape
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.state import DecodeState, KVCache, StepShape

TARGETS_ALONE = {"8B": ">= 80", "1B": ">= 50", "0.6B": ">= 30"}


def run(
    sink: Sink,
    *,
    model: str,
    said: str,
    settings: dict[str, Any],
    plan: dict[str, Any],
    ceilings: dict[str, float],
    seed: int,
    has_targets: bool,
) -> None:
    steps = Steps(sink, model, said, Plan.of(plan))
    steps.prepare(settings, seed)
    roofline = Roofline(MODELS[model], ceilings["copy_bytes_s"], ceilings["flops_s"])
    for batch in steps.batches:
        steps.decode(roofline, batch, 1, has_targets)
        if batch in steps.plan.loops:
            steps.decode(roofline, batch, steps.max_loop, has_targets)
    for chunk in steps.plan.chunks if steps.plan.prompt else ():
        steps.prefill(roofline, chunk, has_targets)


class Steps:
    """One model's programs, cache and state.

    Args:
        said: of the setting, for the rows' names.
    """

    def __init__(self, sink: Sink, model: str, said: str, plan: Plan) -> None:
        self.sink, self.name, self.plan = sink, model, plan
        self.model: ModelConfig = MODELS[model]
        self.title = f"{FULL_NAMES[model]}, {said}"
        size = EngineConfig().block_size
        room = memory_bytes()
        self.batches = [b for b in plan.batches if needed_bytes(self.model, plan.blocks(b, size), size) <= room]
        for batch in sorted({*plan.batches} - {*self.batches}):
            sink.note(f"{self.title}, batch {batch}: left out: the memory has no room for it")

    def prepare(self, settings: dict[str, Any], seed: int) -> None:
        """Weights, programs (compiled in a thread for each core), a random cache and a state of rows that never end."""
        model, plan = self.model, self.plan
        self.limits = self._limits(settings)
        alone = replace(self.limits, max_decode_steps=1)
        self.max_loop = self.limits.max_decode_steps
        self.params = random_params(model, seed, stacked=self.limits.stacked_layers)
        single = engine_programs(self.params, model, alone)
        looped = engine_programs(self.params, model, self.limits)
        wanted = {("empty", 1): single["empty"]}
        wanted |= {(self._bucket(batch), 1): single[f"step[{self._bucket(batch)}]"] for batch in self.batches}
        wanted |= {(self._bucket(batch), self.max_loop): looped[f"step[{self._bucket(batch)}]"] for batch in plan.loops}
        wanted |= {(chunk, 1): single[f"step[{chunk}]"] for chunk in plan.chunks if plan.prompt}
        with ThreadPoolExecutor(num_cores()) as pool:
            compiled = pool.map(lambda lower: lower().compile(), wanted.values())
            self.programs: dict[tuple[Any, int], Any] = dict(zip(wanted, compiled, strict=True))
        self.shapes = {
            key: step_shape(alone if key[1] == 1 else self.limits, key[0]) for key in wanted if key[0] != "empty"
        }
        kv, state = self.programs.pop(("empty", 1))()
        self.kv: KVCache = replace(
            kv, layers=tuple(_random_like(layer, kv.dtype, seed + i) for i, layer in enumerate(kv.layers))
        )
        self.state: DecodeState = self._admitted(state, seed)
        for (tokens, num_steps), program in self.programs.items():
            found = copies_of(program.as_text(), self.kv.layers[0].shape)
            self.sink.add(f"{self.title}: cache copies in step[{tokens}] of {num_steps}", found, "", "0")

    def _limits(self, settings: dict[str, Any]) -> EngineLimits:
        """The engine's own sizes, with the buckets that are needed alone."""
        plan, size = self.plan, EngineConfig().block_size
        config = EngineConfig(
            max_model_len=plan.max_model_len(size),
            max_num_seqs=max(self.batches),
            max_num_batched_tokens=max(*plan.chunks, *self.batches) if plan.prompt else max(self.batches),
            num_gpu_blocks_override=plan.blocks(max(self.batches), size),
            swap_space=0.0,
            exact=False,
            **settings,
        )
        limits = resolve_engine_config(config, self.model, weight_bytes=0)
        smallest = min(limits.token_buckets)  # what the engine decodes one sequence with
        buckets = {max(batch, smallest) for batch in self.batches} | ({*plan.chunks} if plan.prompt else set())
        return replace(limits, token_buckets=tuple(sorted(buckets)))

    def _bucket(self, batch: int) -> int:
        return min(size for size in self.limits.token_buckets if size >= batch)

    def _admitted(self, state: DecodeState, seed: int) -> DecodeState:
        """Rows of greedy sequences without an end, each with blocks of its own, shuffled."""
        rng, rows = np.random.default_rng(seed), self.limits.max_num_seqs
        tables = np.zeros((rows, self.limits.max_blocks_per_row), np.int32)
        each = (self.limits.num_blocks - 1) // rows
        blocks = 1 + rng.permutation(self.limits.num_blocks - 1).astype(np.int32)
        width = min(each, tables.shape[1])
        tables[:, :width] = blocks[: rows * each].reshape(rows, each)[:, :width]
        never = jnp.full((rows,), np.iinfo(np.int32).max, jnp.int32)
        return replace(
            state,
            block_tables=jnp.asarray(tables),
            last_token=jnp.asarray(rng.integers(0, self.model.vocab_size, rows), jnp.int32),
            sampling=replace(state.sampling, max_len=never),
        )

    def decode(self, roofline: Roofline, batch: int, num_steps: int, has_targets: bool) -> None:
        """Rows of a decode step, or of the loop by its tokens."""
        key = (self._bucket(batch), num_steps)
        what = f"decode step, batch {batch}" if num_steps == 1 else f"loop of {num_steps} decode steps, batch {batch}"
        name = f"{self.title}: {what}"
        if not self.sink.begin(name, 5.0):
            return
        packed = decode_step(self.shapes[key], batch, self.plan.context, num_steps)
        seconds = self._time([(key, packed)], num_steps * batch) / num_steps
        num_keys = batch * (self.plan.context + (num_steps - 1) / 2)
        target = TARGETS_ALONE.get(self.name) if batch == 1 else ">= 65"
        self._add(name, seconds, roofline.decode_s(batch, round(num_keys)), target if has_targets else None)
        if batch == 1:
            self.sink.add(f"{name}: a token", 1e3 * seconds, "ms")

    def prefill(self, roofline: Roofline, chunk: int, has_targets: bool) -> None:
        """Rows of a prompt in chunks."""
        name = f"{self.title}: prefill of {self.plan.prompt} in chunks of {chunk}"
        if not self.sink.begin(name, 8.0):
            return
        count = -(-self.plan.prompt // self.limits.block_size)
        table = 1 + np.random.default_rng(1).permutation(self.limits.num_blocks - 1)[:count].astype(np.int32)
        tables = self.state.block_tables.at[0, :count].set(jnp.asarray(table))
        self.state = replace(self.state, block_tables=tables)
        tokens = np.random.default_rng(2).integers(0, self.model.vocab_size, self.plan.prompt).astype(np.int32)
        shape = self.shapes[chunk, 1]
        calls = [((chunk, 1), chunk_step(shape, tokens, start)) for start in range(0, len(tokens), chunk)]
        seconds = self._time(calls, 1)
        target = ">= 60" if has_targets and self.name == "8B" else None
        self._add(name, seconds, roofline.prefill_s(len(tokens)), target)
        self.sink.add(f"{name}: rate", len(tokens) / seconds, "tok/s")

    def _time(self, calls: Sequence[tuple[tuple[int, int], np.ndarray]], num_sampled: int) -> float:
        """Seconds of all calls, one after the other."""
        output: Any = None

        def call(_: int) -> jax.Array:
            nonlocal output
            for key, packed in calls:
                self.kv, self.state, output = self.programs[key](self.params, self.kv, self.state, packed)
            return output.sampled

        seconds = time_calls(call).seconds
        key, packed = calls[-1]
        num_rows = int((packed_field(self.shapes[key], packed, "sample_rows") < self.shapes[key].max_rows).sum())
        sampled = np.asarray(output.sampled)[: num_sampled // num_rows, :num_rows]
        assert not sampled[..., 1].any(), "logits were not finite"
        assert ((sampled[..., 0] >= 0) & (sampled[..., 0] < self.model.vocab_size)).all(), "no token of the vocabulary"
        return seconds

    def _add(self, name: str, seconds: float, least_s: float, target: str | None) -> None:
        self.sink.add(f"{name}: time", 1e3 * seconds, "ms")
        self.sink.add(f"{name}: of the roofline", 100 * least_s / seconds, "%", target)
        self.sink.end(name)


def _random_like(layer: jax.Array, dtype: str, seed: int) -> jax.Array:
    values = random_values(seed, layer.shape, dtype)
    values = values if values.dtype == layer.dtype else jax.lax.bitcast_convert_type(values, layer.dtype)
    return jax.device_put(values, layer.sharding)


def packed_field(shape: StepShape, packed: np.ndarray, name: str) -> np.ndarray:
    start, length = shape.fields()[name]
    return packed[start : start + length]


def decode_step(shape: StepShape, batch: int, context: int, num_steps: int) -> np.ndarray:
    """The packed array of rows 0 to batch - 1, each of which feeds its token at position context - 1."""
    packed, parts = empty_step(shape)
    parts["tokens"][:batch] = -1
    parts["positions"][:batch] = context - 1
    for name in ("rows", "sample_rows", "sample_index"):
        parts[name][:batch] = np.arange(batch)
    parts["header"][:] = batch, 0, 0, num_steps
    return packed


def chunk_step(shape: StepShape, tokens: np.ndarray, start: int) -> np.ndarray:
    """The packed array of row 0's chunk from `start` on; the prompt's last one samples."""
    packed, parts = empty_step(shape)
    length = min(shape.num_tokens, len(tokens) - start)
    parts["tokens"][:length] = tokens[start : start + length]
    parts["positions"][:length] = np.arange(start, start + length)
    parts["rows"][:length] = 0
    starts = np.arange(0, length, shape.q_tile)
    parts["tile_start"][: len(starts)] = starts
    parts["tile_len"][: len(starts)] = np.minimum(shape.q_tile, length - starts)
    if start + length == len(tokens):
        parts["sample_rows"][0], parts["sample_index"][0] = 0, length - 1
    parts["header"][:] = 0, len(starts), 0, 1
    return packed
