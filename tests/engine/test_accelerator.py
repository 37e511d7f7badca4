"""`benchmarks.accelerator` runs to its end on a CPU, and a kernel that is wrong, dies or hangs is said to be so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, accelerator_checks, accelerator_jobs, accelerator_steps
from benchmarks.accelerator_cases import Heads, Stream, error_over_bound, make_case, random_streams
from benchmarks.accelerator_checks import ATTENTION, KERNELS, Target, attention_name, check_attention, copies_of
from benchmarks.accelerator_jobs import Job, Sink, fact_of_heads, run_job, without_command_buffers
from benchmarks.accelerator_models import MODELS, Roofline
from benchmarks.accelerator_plan import SMALL_PLAN, Plan, settings_of_the_engine
from benchmarks.accelerator_steps import chunk_step, decode_step, packed_field
from benchmarks.accelerator_timing import random_values, time_calls
from benchmarks.accelerator_tune import tile_choices
from jaxserve.state import StepShape
from pallas_kernels.ragged_paged_attention import tuning_gpu
from pallas_kernels.ragged_paged_attention.ref import attention_reference

HEADS = Heads(1, 4, 64)
NAME = attention_name(HEADS, {})
GRID = ("kv_split", "ring", "lanes", "kv_tile", "cut_below")


def reference(*arguments: jax.Array, tiles: Any, backend: str, interpret: bool, **options: Any) -> jax.Array:
    """A right kernel: the definition, in the queries' type."""
    return attention_reference(*arguments, **options)


def without_the_last_key(*arguments: jax.Array, **options: Any) -> jax.Array:
    q, cache, tables, lengths, *others = arguments
    return reference(q, cache, tables, jnp.maximum(lengths - 1, 1), *others, **options)


def a_hundredth_more(*arguments: jax.Array, **options: Any) -> jax.Array:
    out = reference(*arguments, **options)
    return (out.astype(jnp.float32) * 1.02).astype(out.dtype)


def without_the_last_token(*arguments: jax.Array, **options: Any) -> jax.Array:
    out, last = reference(*arguments, **options), arguments[4][arguments[5][0]] - 1
    return jnp.where((jnp.arange(len(out)) == last)[:, None, None], jnp.nan, out)


def other_bits_when_decoding(*arguments: jax.Array, **options: Any) -> jax.Array:
    """Right within rounding, but of another rounding where a sequence has one query."""
    out, (num_decode,) = reference(*arguments, **options), arguments[6]
    is_decode = (jnp.arange(len(out)) < num_decode)[:, None, None]
    moved = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(out, jnp.uint16) ^ jnp.uint16(1), out.dtype)
    return jnp.where(is_decode & (out != 0), moved, out)


def findings(kernel: Callable) -> dict[str, tuple[float, float]]:
    found = check_attention(kernel, HEADS, {}, Target("tpu"), small=True, seed=3)
    return {finding.what: (finding.value, finding.most) for finding in found}


def test_a_right_kernel_passes() -> None:
    assert all(value <= most for value, most in findings(reference).values())


@pytest.mark.parametrize("kernel", [without_the_last_key, a_hundredth_more, without_the_last_token])
def test_a_wrong_kernel_fails(kernel: Callable) -> None:
    value, most = findings(kernel)["worst error over its bound"]
    assert value > most


def test_a_kernel_whose_bits_depend_on_the_company_fails() -> None:
    found = findings(other_bits_when_decoding)
    assert found["worst error over its bound"][0] <= 1
    assert found["tokens whose bits differ, decoded and in chunks"][0] > 0


def test_a_failing_kernel_is_reported_and_the_rest_goes_on() -> None:
    def raises(*_: Any, **__: Any) -> jax.Array:
        raise ValueError("no such layout")

    def moves_a_block(cache: jax.Array, *arguments: Any, backend: str, **_: Any) -> jax.Array:
        out = KERNELS["block_copy"](cache, *arguments, backend="reference")
        return out if backend == "reference" else jnp.roll(out, 1, axis=0)

    kernels = dict(KERNELS) | {ATTENTION: raises, "block_copy": moves_a_block}
    options = {"platform": "cpu", "backend": "tpu", "small": True, "seed": 1, "kernels": kernels}
    first = Sink()
    accelerator_checks.run(first, **options)
    assert ("check " + NAME + ": passes", 0.0, "", "1") in first.outcome.rows
    assert "ValueError: no such layout" in first.outcome.notes[0]
    assert first.outcome.facts == {accelerator_jobs.AGAIN: True}
    second = Sink(skipped=first.outcome.begun)
    accelerator_checks.run(second, **options)
    passes = {name: value for name, value, *_ in second.outcome.rows if name.endswith(": passes")}
    assert passes["check block_copy: passes"] == 0
    assert passes["check xla attention, bfloat16: passes"] == 1
    assert "passes block_copy" not in second.outcome.facts
    assert f"check {NAME}" not in second.outcome.begun


@pytest.mark.parametrize("name", ["kv_write", "block_copy", "block_gather", "block_scatter"])
def test_kernels_that_move_blocks_are_judged_bit_for_bit(name: str) -> None:
    def as_reference(*arguments: Any, backend: str, **_: Any) -> jax.Array:
        return KERNELS[name](*arguments, backend="reference")

    def drops_nan(*arguments: Any, backend: str, **_: Any) -> jax.Array:
        out = KERNELS[name](*arguments, backend="reference")
        return out if backend == "reference" else jnp.nan_to_num(out)

    target = Target("tpu", interpret=True)
    for kernel, is_right in ((as_reference, True), (drops_nan, False)):
        checks = accelerator_checks._checks(target, True, 2, dict(KERNELS) | {name: kernel})
        assert all(finding.value <= finding.most for finding in checks[name]()) == is_right


# A module that a job runs: it finds something, then dies, hangs, or raises, where it is told to.
FAKE_PART = """
import os, time
def run(sink, ways):
    for way in ways:
        if not sink.begin(way):
            continue
        sink.add(way + " begun", 1, "")
        if way == "dies":
            os._exit(7)
        if way == "hangs":
            time.sleep(1000)
        if way == "raises":
            raise ValueError("out of memory")
        sink.end(way)
"""


def test_a_job_goes_on_after_what_its_process_died_of(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_part.py").write_text(FAKE_PART)
    folders = (tmp_path, repo, repo / "server", repo / "checkpoints")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setattr(accelerator_jobs, "GRACE_S", 0.0)
    monkeypatch.setattr(accelerator_jobs, "MIN_S", 0.1)
    ways = ["works", "dies", "raises", "works too"]
    outcome = run_job(Job(name="fake", module="fake_part", options={"ways": ways}), 60)
    assert [row[0] for row in outcome.rows] == [f"{way} begun" for way in ways]
    assert outcome.done == ["works", "works too"]
    assert outcome.error is None
    assert "dies: FAILS: its process ended with 7" in outcome.notes[0]
    assert "out of memory" in outcome.notes[1]
    outcome = run_job(Job(name="fake", module="fake_part", options={"ways": ["works", "hangs"]}), 3)
    assert outcome.done == ["works"]
    assert "hangs: FAILS: its process was ended after" in outcome.notes[0]


def a_run(monkeypatch: pytest.MonkeyPatch, *flags: str, **facts: Any) -> accelerator.Run:
    """A run on a device of which so much is known."""
    monkeypatch.setattr(sys, "argv", ["accelerator", "--seed", "1", *flags])
    run = accelerator.Run(accelerator.parse_args())
    run.facts |= {"platform": "gpu", "copy_bytes_s": 1.0, "flops_s": 1.0, **facts}
    return run


def test_steps_do_without_a_kernel_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {accelerator.BACKEND: ("xla", "pallas"), "stacked_layers": (False, True)}
    assert settings_of_the_engine() == settings
    monkeypatch.setattr(accelerator, "settings_of_the_engine", lambda: settings)
    right = {fact_of_heads(128, 4): True, fact_of_heads(64, 4): True}  # not those of 0.6B
    run = a_run(monkeypatch, **right)
    jobs = {job.name: job.options["settings"] for job in run._steps()}
    assert jobs["steps of 8B, as it is"] == {}
    assert (
        jobs["steps of 0.6B, as it is"]
        == jobs["steps of 0.6B, without command buffers"]
        == {accelerator.BACKEND: "xla"}
    )
    assert "steps of 1B, attention_backend=pallas" in jobs
    assert "steps of 0.6B, attention_backend=pallas" not in jobs
    assert jobs["steps of 0.6B, stacked_layers=True"] == {accelerator.BACKEND: "xla", "stacked_layers": True}
    assert jobs["steps of 8B, stacked_layers=False"] == {"stacked_layers": False}
    assert "0.6B" in run.report.notes[0]
    unasked = a_run(monkeypatch, "--parts", "steps")
    assert next(iter(unasked._steps())).options["settings"] == {}


def test_only_a_gpu_has_command_buffers_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, count in (("gpu", 3), ("tpu", 0)):
        jobs = list(a_run(monkeypatch, platform=platform)._steps())
        assert sum("xla_gpu_enable_command_buffer=" in job.environment.get("XLA_FLAGS", "") for job in jobs) == count


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        a_run(monkeypatch, "--parts", "steps,stops")
    assert "stops: choose of ceilings, checks, kernels, steps, peers" in capsys.readouterr().err


def test_tile_sizes_begin_with_the_kernel_s_own_and_all_fit() -> None:
    choices = list(tile_choices(Target("gpu"), Heads(8, 4, 128)))
    assert choices[0] == tuning_gpu.default_tiles(128, "bfloat16", "bfloat16")
    assert len(set(choices)) == len(choices) > 20
    for tiles in choices:
        tuning_gpu.check_tiles(tiles, 128, jnp.bfloat16, jnp.bfloat16)
    changed = [sum(getattr(tiles, name) != getattr(choices[0], name) for name in GRID) for tiles in choices]
    assert changed == sorted(changed)


def test_what_has_no_time_is_named() -> None:
    sink = Sink(budget_s=5)
    assert not sink.begin("long", needed_s=6)
    assert sink.begin("short", needed_s=4)
    assert sink.outcome.notes == ["long: left out, for want of time (--budget)"]


def test_flags_of_the_environment_stay() -> None:
    flags = without_command_buffers({"XLA_FLAGS": "--xla_dump_to=x"})["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=x", "--xla_gpu_enable_command_buffer="]


def test_copies_of_the_cache_are_found_in_a_program() -> None:
    shape = (64, 16, 2, 128)
    cache = jnp.ones(shape)
    write = partial(jax.jit, donate_argnums=0)(lambda cache: cache.at[3].set(0.0))
    copying = jax.jit(lambda cache: cache.at[3].set(0.0))
    assert copies_of(write.lower(cache).compile().as_text(), shape) == 0
    assert copies_of(copying.lower(cache).compile().as_text(), shape) == 1
    waits = "%c = (f32[64,16,2,128]{3,2,1,0:S(1)}, f32[64,16,2,128]{3,2,1,0}, u32[]) copy-start(f32[64,16,2,128] %p)"
    assert copies_of(waits, shape) == 1
    assert copies_of(waits, (64, 16, 2, 64)) == 0


def test_a_case_holds_what_it_says_and_nothing_else() -> None:
    streams = [Stream(5), Stream(33, 4)]
    case = make_case(HEADS, streams, num_tokens=8, num_rows=3, table_width=3, seed=1)
    cache, q = np.asarray(case.cache, np.float32), np.asarray(case.q, np.float32)
    assert np.isfinite(cache).all(axis=(2, 3)).sum() == 5 + 33
    assert np.isnan(cache[0]).all()
    assert np.isfinite(q[:5]).all()
    assert np.isnan(q[5:]).all()
    for row, stream in enumerate(streams):
        blocks = np.asarray(case.block_tables)[row, : -(-stream.length // 16)]
        slots = np.isfinite(cache[blocks]).all(axis=(2, 3)).reshape(-1)
        assert slots[: stream.length].all()
        assert not slots[stream.length :].any()
    assert error_over_bound(case, jnp.full(case.q.shape, jnp.nan)) == float("inf")


def test_random_streams_fit_their_room() -> None:
    for seed in range(200):
        streams = random_streams(np.random.default_rng(seed), num_tokens=40, num_rows=6, longest=96)
        assert len(streams) == 5
        assert sum(stream.num_queries for stream in streams) < 40
        assert all(1 <= stream.num_queries <= stream.length <= 96 for stream in streams)


def test_random_values_are_fresh_and_spread() -> None:
    first, other = (np.asarray(random_values(seed, (300, 400), "float32")) for seed in (1, 2))
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1) < 0.02
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02
    assert len(np.unique(first)) > 0.98 * first.size


def test_calls_are_timed_in_order() -> None:
    seen: list[int] = []

    def call(index: int) -> jax.Array:
        seen.append(index)
        return jnp.zeros(())

    timing = time_calls(call, round_s=0.001, rounds=3)
    assert seen == list(range(len(seen)))
    assert len(seen) >= 6
    assert timing.seconds > 0


def test_rooflines_are_those_of_the_known_sizes() -> None:
    """By hand: 15.0 GB of weights are 3.49 ms at 4.3 TB/s, 128 KiB a token; 8k tokens of prefill, 167 ms at 790 T."""
    roofline = Roofline(MODELS["8B"], 4.3e12, 790e12)
    assert roofline.body + roofline.head == 32 * (4096 * (6144 + 4096 + 3 * 14_336) + 2 * 4096) + 4096 * 128_257
    assert roofline.decode_s(1, 1000) == pytest.approx(3.52e-3, rel=0.01)
    assert roofline.decode_s(256, 256_000) == pytest.approx((4.86 + 7.81) * 1e-3, rel=0.01)
    assert roofline.prefill_s(8192) == pytest.approx(167e-3, rel=0.01)
    small = Roofline(MODELS["0.6B"], 4.3e12, 790e12)
    assert 2 * (small.body + small.head) == pytest.approx(1.19e9, rel=0.01)


def test_steps_of_stacked_layers_are_timed_as_well() -> None:
    """Of the tiny model: real programs, real steps."""
    sink = Sink(budget_s=600)
    plan = asdict(replace(SMALL_PLAN, prompt=0, loops=()))
    options = {"plan": plan, "ceilings": {"copy_bytes_s": 1e9, "flops_s": 1e9}, "seed": 3, "has_targets": False}
    settings = {"stacked_layers": True, "attention_backend": "xla"}
    accelerator_steps.run(sink, model="tiny", said="stacked", settings=settings, **options)
    rows = {row[0]: row[1] for row in sink.outcome.rows}
    assert rows["tiny, stacked: decode step, batch 1: time"] > 0
    assert [value for name, value in rows.items() if "cache copies" in name] == [0]


def test_steps_are_packed_for_the_rows_they_name() -> None:
    shape = StepShape(16, 4, 8, 16, q_tile=8, kv_tile=128)
    decode = decode_step(shape, 3, 40, 1)
    assert packed_field(shape, decode, "rows").tolist() == [0, 1, 2] + 13 * [4]
    assert packed_field(shape, decode, "positions")[:3].tolist() == 3 * [39]
    assert packed_field(shape, decode, "header").tolist() == [3, 0, 0, 1]
    tokens = np.arange(100, 140, dtype=np.int32)
    last = chunk_step(shape, tokens, 32)
    assert packed_field(shape, last, "tile_len")[:2].tolist() == [8, 0]
    assert (packed_field(shape, last, "sample_rows")[0], packed_field(shape, last, "sample_index")[0]) == (0, 7)
    assert packed_field(shape, chunk_step(shape, tokens, 16), "sample_rows").tolist() == 4 * [4]
    assert Plan.of(json.loads(json.dumps({"batches": [1, 2]}))) == Plan(batches=(1, 2))
    assert SMALL_PLAN.blocks(2, 16) > SMALL_PLAN.max_model_len(16) // 16


def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path, repo: Path) -> None:
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--quick", "--seed", "4", "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert rows[f"check {NAME}: passes"]["value"] == 1
    assert rows["check xla attention, float32: passes"]["value"] == 1
    shares = [name for name, row in rows.items() if row["unit"] == "%" and ": of " in name]
    for part in (
        "decode attention",
        "prefill attention",
        "tiny, as it is: decode step, batch 1",
        "tiny, as it is: loop",
    ):
        assert [name for name in shares if name.startswith(part)], part
    assert all(rows[name]["value"] > 0 for name in shares)
    copies = [row["value"] for name, row in rows.items() if "cache copies" in name]
    assert copies
    assert not any(copies)
    assert document["machine"]["seed"] == 4
    assert any(note.startswith(("transformers: left out", "1B: random weights")) for note in document["notes"])
    assert not any("FAILS" in note for note in document["notes"])
