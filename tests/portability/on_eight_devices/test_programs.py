"""What was compiled: which collectives there are, that the cache is never copied, and that a later start finds all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxserve.engine.compiled import compile_counter
from jaxserve.engine.engine import EngineCore
from jaxserve.types import BeamSearchParams, SamplingParams
from jaxserve_server.engine_start import fingerprint

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def collectives(text: str) -> Counter[str]:
    """How many of each kind a compiled program has, by name and the shape of what comes of it."""
    found = re.findall(rf"= (\([^)]*\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return Counter(f"{kind} {re.sub(r'{.*?}', '', shape)}" for shape, kind in found)


@pytest.mark.parametrize("size", [2, 8])
def test_the_fingerprint_names_the_number_of_devices(core_of: Callable, loaded: Callable, size: int) -> None:
    one, several = (
        fingerprint(loaded("llama31", n), replace(core_of("llama31", n).limits, exact=True)) for n in (1, size)
    )
    assert one != several


@pytest.mark.parametrize(("family", "size"), [("llama31", 2), ("llama31", 8), ("smollm", 4), ("llama_bias", 8)])
def test_two_all_reduces_a_layer_and_what_else_there_is(core_of: Callable, family: str, size: int) -> None:
    core = core_of(family, size)
    ((shape, step),) = core.runner.compiled.steps
    model, tokens, rows = core.model, shape.num_tokens, shape.num_samples
    part = -(-model.vocab_size // size)
    padded = rows + -rows % size
    found = collectives(step.as_text())
    hidden = f"all-reduce f32[{tokens},{model.hidden_size}]"
    assert found.pop(hidden) == 2 * model.num_layers + 1  # after o, after down; the embedding
    assert sum(count for name, count in found.items() if name.startswith("all-reduce")) == 0
    to_rows = {name: count for name, count in found.items() if name.startswith("all-to-all")}
    assert sum(to_rows.values()) == 2, to_rows  # logits of samples; of prompt logprobs, where somebody asks
    assert all(str(part) in name for name in to_rows), to_rows
    gathered = {name: count for name, count in found.items() if name.startswith("all-gather")}
    # Tokens with failures; logprobs of samples and of prompts; four arrays where there are beams.
    assert gathered[f"all-gather s32[{padded},2]"] == 1
    assert gathered[f"all-gather s32[{padded},42]"] + gathered[f"all-gather s32[{tokens},42]"] == 2
    assert sum(gathered.values()) == 1 + 2 + 4, gathered
    assert sum(found.values()) == sum(to_rows.values()) + sum(gathered.values()), found


@pytest.mark.parametrize("size", [2, 8])
def test_only_steps_have_collectives(core_of: Callable, size: int) -> None:
    compiled = core_of("llama31", size).runner.compiled
    others = [compiled.admit, compiled.set_tables, compiled.count_stored, compiled.start_beams]
    for by_size in (compiled.follow_beams, compiled.copy, compiled.gather, compiled.scatter):
        others += by_size.values()
    assert len(others) >= 4 + 1 + 1 + 2 + 2
    for program in others:
        assert not collectives(program.as_text())


@pytest.mark.parametrize("size", [2, 8])
def test_each_device_s_part_of_the_cache_is_donated_and_never_copied(core_of: Callable, size: int) -> None:
    core = core_of("llama31", size)
    limits, model, compiled = core.limits, core.model, core.runner.compiled
    heads = f"{model.num_kv_heads // size},{2 * model.head_dim}]"
    cache, flat = (
        f"[{limits.num_blocks},{limits.block_size},{heads}",
        f"[{limits.num_blocks * limits.block_size},{heads}",
    )
    kv, state = core.runner._kv, core.runner._state
    programs = [(executable, (kv, state)) for _, executable in compiled.steps]
    programs += [(executable, (kv, state)) for executable in compiled.follow_beams.values()]
    programs += [(executable, kv) for executable in (*compiled.copy.values(), *compiled.scatter.values())]
    for executable, donated in programs:
        text = executable.as_text()
        assert cache in text
        copies = [line for line in text.splitlines() if re.search(r"= \S+ copy(-start)?\(", line)]
        assert not [line for line in copies if cache in line or flat in line]
        alias = re.search(r"input_output_alias=\{(.*?)\},? entry", text, re.DOTALL)
        aliased = alias.group(1) if alias else ""
        assert aliased.count("may-alias") + aliased.count("must-alias") == len(jax.tree.leaves(donated))


def test_a_second_start_loads_every_program_of_its_mesh(
    make_core: Callable[..., EngineCore], core_of: Callable, run_all: Callable, requests: list, tmp_path: Path
) -> None:
    """And none of another's. The answers are those of the programs that were compiled, bit for bit."""
    tmp_path.chmod(0o700)
    folder = {"compilation_cache_dir": str(tmp_path), "stream_interval_ms": 1e9}
    first = make_core("smollm", 4, **folder)
    assert first.runner.compiled.num_loaded == 0
    before = compile_counter().count
    second = make_core("smollm", 4, **folder)
    assert compile_counter().count == before
    assert second.runner.compiled.num_loaded == len(second.runner.compiled.compile_s)
    greedy = [(prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=2)) for prompt, _ in requests[:6]]
    assert run_all(second, greedy) == run_all(first, greedy)


def test_beams_are_those_of_one_device(core_of: Callable, run_all: Callable) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=10)
    prompts = [[11, 12, 13, 14, 15, 16, 17, 18, 19], list(range(30, 60))]

    def beams(size: int) -> list:
        deltas = run_all(core_of("llama31", size), [(prompt, params) for prompt in prompts])
        assert all(len({d.index for d in found}) == 4 for found in deltas)
        return [[(d.index, d.token_ids) for d in found] for found in deltas], [
            [d.score for d in found if d.score is not None] for found in deltas
        ]

    tokens, scores = beams(1)
    for size in (2, 8):
        found, found_scores = beams(size)
        assert found == tokens
        for one, other in zip(scores, found_scores, strict=True):
            assert other == pytest.approx(one, abs=1e-4)  # sums of ten logprobs, each to 1e-5
