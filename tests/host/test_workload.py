"""The sets of requests that engines are compared on, and the figures that a run compares with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.known_peers import add_known, known_peers
from benchmarks.report import Report
from benchmarks.workload import REQUEST_SETS, RequestSet, request_set

VOCABULARY = list(range(100, 160))
SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "intermediate_size": 1536}


@pytest.mark.parametrize(
    ("name", "count", "longest_prompt", "output_tokens", "shared"),
    [("batch", 64, 512, 64, 0), ("shared", 48, 416, 32, 384), ("stream", 1, 128, 128, 0), ("long", 4, 2048, 8, 0)],
)
def test_sets_have_the_sizes_they_say(
    name: str, count: int, longest_prompt: int, output_tokens: int, shared: int
) -> None:
    requests = request_set(name, VOCABULARY)
    assert len(requests.prompts) == count
    assert max(map(len, requests.prompts)) <= longest_prompt
    assert {token for prompt in requests.prompts for token in prompt} <= set(VOCABULARY)
    assert (requests.output_tokens, requests.num_shared) == (output_tokens, shared)
    assert requests.longest == max(map(len, requests.prompts)) + output_tokens


def test_shared_prompts_share_their_prefix_and_others_nothing() -> None:
    requests = request_set("shared", VOCABULARY)
    assert len({tuple(prompt[:384]) for prompt in requests.prompts}) == 1
    assert len({tuple(prompt[384:400]) for prompt in requests.prompts}) == 48
    assert requests.num_distinct_prompt_tokens == 384 + 48 * 32
    batch = request_set("batch", VOCABULARY)
    assert len({tuple(prompt[:16]) for prompt in batch.prompts}) == 64
    assert batch.num_distinct_prompt_tokens == batch.num_prompt_tokens


@pytest.mark.parametrize("name", REQUEST_SETS)
def test_sets_are_drawn_from_their_seed(name: str) -> None:
    assert request_set(name, VOCABULARY, seed=3) == request_set(name, VOCABULARY, seed=3)
    assert request_set(name, VOCABULARY, seed=3).prompts != request_set(name, VOCABULARY, seed=4).prompts
    quick = request_set(name, VOCABULARY, quick=True)
    assert quick.num_prompt_tokens + quick.num_output_tokens < 700


def test_long_prompts_count_in_their_rate() -> None:
    long, stream = request_set("long", VOCABULARY), request_set("stream", VOCABULARY)
    assert (long.rate_name, long.num_rated_tokens) == ("total", 4 * 2056)
    assert (stream.rate_name, stream.num_rated_tokens) == ("output", 128)


def test_known_figures_are_for_that_shape_and_that_many_requests(tmp_path: Path) -> None:
    batch = request_set("batch", VOCABULARY)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert [(peer.engine, peer.rate) for peer in known_peers(tmp_path, "bfloat16", batch)] == [
        ("transformers", 104),
        ("llama.cpp", 184),
    ]
    assert known_peers(tmp_path, "float16", batch) == ()
    assert known_peers(tmp_path, "float32", request_set("batch", VOCABULARY, num_requests=32)) == ()
    assert known_peers(tmp_path, "float32", batch, quick=True) == ()
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {"hidden_size": 512}))
    assert known_peers(tmp_path, "float32", batch) == ()


def test_a_known_figure_becomes_a_ratio_with_its_floor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    stream: RequestSet = request_set("stream", VOCABULARY)
    report = Report("test")
    add_known(report, "stream: output", 25.5, known_peers(tmp_path, "float32", stream))
    (row,) = report.rows
    assert (row.value, row.target) == (0.5, ">= 0.6")
    assert "llama.cpp's 51" in row.name
