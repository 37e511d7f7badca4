"""Counters, histograms, and the page that Prometheus reads."""

from __future__ import annotations

import json
import math
import re
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.metrics import ITL_BUCKETS_S, TTFT_BUCKETS_S, EngineMetrics, Histogram, SwapTotals, token_buckets
from jaxserve.types import EngineStats
from jaxserve_server.metrics_export import MetricsPage

# The dashboard's panels of the router in front of the replicas and of its machine: not a replica's to serve.
ROUTER_METRICS = {
    "vllm:healthy_pods_total",
    "vllm:current_qps",
    "router_cpu_usage_percent",
    "router_memory_usage_percent",
    "router_disk_usage_percent",
}
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_blocks=10,
    num_free_blocks=4,
    num_preemptions=7,
    num_steps=5,
    num_compilations_after_ready=0,
    last_commit_age_s=0.25,
    num_cached_blocks=2,
    num_swapped_blocks=3,
    num_swap_blocks=12,
)


def page(metrics: EngineMetrics, stats: EngineStats = STATS, model: str = "demo") -> str:
    return MetricsPage(metrics, lambda: stats, model_name=model).render().decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the page by name and labels, but for the labels that all have."""
    return {
        (s.name, frozenset((k, v) for k, v in s.labels.items() if k not in ("model_name", "engine"))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def expressions(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["expr"]] if isinstance(node.get("expr"), str) else []
        return own + [e for value in node.values() for e in expressions(value)]
    return [e for value in node for e in expressions(value)] if isinstance(node, list) else []


def test_every_metric_of_the_grafana_board_is_on_the_page(data_dir):
    board = json.loads((data_dir / "grafana" / "vllm_dashboard.json").read_text())
    found = {
        name
        for expression in expressions(board)
        for name in re.findall(r"[a-z_]+:[a-z_0-9]+|router_[a-z_]+", expression)
    }
    assert {"vllm:num_requests_running", "vllm:gpu_prefix_cache_hits_total"} <= found
    names = {name for name, _ in samples(page(EngineMetrics(max_model_len=4096)))}
    assert found - ROUTER_METRICS <= names


@given(st.lists(st.floats(0, 1e5, allow_nan=False), max_size=60), st.integers(0, 60))
def test_histogram_counts_what_a_loop_would_count(values, cut):
    histogram = Histogram(TTFT_BUCKETS_S)
    histogram.observe_many(np.asarray(values[:cut]))
    for value in values[cut:]:
        histogram.observe(value)
    reading = histogram.read()
    edges = (-math.inf, *TTFT_BUCKETS_S, math.inf)
    assert reading.counts == tuple(sum(low < v <= high for v in values) for low, high in pairwise(edges))
    assert reading.sum == pytest.approx(sum(values))


def test_a_bound_is_inclusive_and_the_page_accumulates():
    metrics = EngineMetrics(max_model_len=4096)
    metrics.ttft.observe_many(np.array([0.001, 0.0011, 0.005, 1e9]))
    found = samples(page(metrics))

    def bucket(le: str) -> float:
        return found["vllm:time_to_first_token_seconds_bucket", frozenset({("le", le)})]

    assert [bucket(le) for le in ("0.001", "0.005", "0.01", "+Inf")] == [1, 3, 3, 4]
    assert found["vllm:time_to_first_token_seconds_count", frozenset()] == 4


def test_inter_token_buckets_resolve_small_models_and_keep_vllms():
    vllm = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
    assert ITL_BUCKETS_S[-len(vllm) :] == vllm
    assert sum(bound < 0.01 for bound in ITL_BUCKETS_S) >= 5


def test_token_buckets_are_the_1_2_5_series():
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(99)[-1] == 50


def test_a_step_and_a_request_reach_the_page():
    metrics = EngineMetrics(max_model_len=4096, cache_info={"block_size": "16", "num_gpu_blocks": "10"})
    metrics.on_step(
        kind="mixed",
        step_s=0.004,
        num_prompt_tokens=100,
        num_generation_tokens=3,
        inter_token_s=np.array([0.004, 0.004]),
        ttft_s=np.array([0.05]),
        host_gap_s=0.0001,
    )
    metrics.on_finished(
        reason="length",
        num_prompt_tokens=100,
        num_generation_tokens=5,
        num_cached_tokens=32,
        num_preemptions=1,
        max_tokens=5,
        queue_s=0.01,
        prefill_s=0.04,
        decode_s=0.016,
        e2e_s=0.066,
    )
    metrics.preemptions_by_means["swap"] += 2
    metrics.swap_space_full = 3
    metrics.swapped_out = SwapTotals(blocks=6, bytes=6144, seconds=0.5)
    metrics.swapped_in.blocks += 4
    metrics.on_rejected("queue_full")
    metrics.on_prefix_lookup(100, 32)
    metrics.on_compiled("step[32]", 1.5)
    found = samples(page(metrics))
    none: frozenset[tuple[str, str]] = frozenset()
    expected = {
        ("vllm:num_requests_running", none): 3,
        ("vllm:num_requests_waiting", none): 2,
        ("vllm:kv_cache_usage_perc", none): 0.6,
        ("vllm:prompt_tokens_total", none): 100,
        ("vllm:generation_tokens_total", none): 3,
        ("vllm:prompt_tokens_cached_total", none): 32,
        ("vllm:prefix_cache_queries_total", none): 100,
        ("vllm:gpu_prefix_cache_hits_total", none): 32,
        ("vllm:num_preemptions_total", none): 7,
        ("vllm:cpu_cache_usage_perc", none): 0.25,
        ("jaxserve:prefix_cached_blocks", none): 2,
        ("jaxserve:preemptions_total", frozenset({("means", "swap")})): 2,
        ("jaxserve:swap_space_full_total", none): 3,
        ("jaxserve:preemptions_total", frozenset({("means", "recompute")})): 0,
        ("jaxserve:swapped_blocks_total", frozenset({("direction", "out")})): 6,
        ("jaxserve:swapped_blocks_total", frozenset({("direction", "in")})): 4,
        ("jaxserve:swapped_bytes_total", frozenset({("direction", "out")})): 6144,
        ("jaxserve:swapped_seconds_total", frozenset({("direction", "out")})): 0.5,
        ("vllm:request_success_total", frozenset({("finished_reason", "length")})): 1,
        ("vllm:request_success_total", frozenset({("finished_reason", "abort")})): 0,
        ("vllm:admission_rejections_total", frozenset({("reason", "queue_full")})): 1,
        ("vllm:inter_token_latency_seconds_count", none): 2,
        ("vllm:time_to_first_token_seconds_sum", none): 0.05,
        ("vllm:iteration_tokens_total_sum", none): 103,
        ("vllm:request_time_per_output_token_seconds_sum", none): 0.004,
        ("vllm:request_inference_time_seconds_sum", none): 0.056,
        ("vllm:request_queue_time_seconds_sum", none): 0.01,
        ("vllm:e2e_request_latency_seconds_sum", none): 0.066,
        ("vllm:request_params_max_tokens_sum", none): 5,
        ("vllm:request_params_n_sum", none): 1,
        ("jaxserve:step_seconds_count", frozenset({("kind", "mixed")})): 1,
        ("jaxserve:compile_seconds", frozenset({("bucket", "step[32]")})): 1.5,
        ("jaxserve:recompiles_after_ready_total", none): 0,
        ("vllm:cache_config_info", frozenset({("block_size", "16"), ("num_gpu_blocks", "10")})): 1,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key


def test_a_request_of_several_continuations_counts_once_with_all_its_tokens_and_its_longest():
    metrics = EngineMetrics(max_model_len=64)
    metrics.on_finished(
        reason="stop",
        num_prompt_tokens=9,
        num_generation_tokens=30,
        num_longest_tokens=20,
        max_tokens=20,
        n=3,
        queue_s=0.0,
        prefill_s=0.1,
        decode_s=0.2,
        e2e_s=0.3,
    )
    found = samples(page(metrics))
    none: frozenset[tuple[str, str]] = frozenset()
    assert found["vllm:request_success_total", frozenset({("finished_reason", "stop")})] == 1
    assert found["vllm:request_generation_tokens_sum", none] == 30
    assert found["vllm:request_max_num_generation_tokens_sum", none] == 20
    assert found["vllm:request_params_n_sum", none] == 3


def test_a_request_that_never_ran_counts_once_and_has_no_phases():
    metrics = EngineMetrics(max_model_len=64)
    metrics.on_finished(
        reason="abort",
        num_prompt_tokens=9,
        num_generation_tokens=0,
        max_tokens=None,
        queue_s=1.0,
        prefill_s=None,
        decode_s=None,
        e2e_s=1.0,
    )
    assert metrics.request_success["abort"] == 1
    for histogram in (metrics.prefill, metrics.decode, metrics.inference, metrics.params_max_tokens):
        assert sum(histogram.read().counts) == 0


def test_all_samples_carry_vllms_labels_and_names_are_escaped():
    text = page(EngineMetrics(max_model_len=64), model='a"b\\c\nd')
    families = [f for f in text_string_to_metric_families(text) if not f.name.startswith("process_")]
    for sample in (s for f in families for s in f.samples if f.name != "vllm:cache_config_info"):
        assert sample.labels["model_name"] == 'a"b\\c\nd'
        assert sample.labels["engine"] == "0"


def test_a_step_costs_microseconds():
    # A decode step of the demo model takes about 4 ms; its bookkeeping may take 1 % of that.
    metrics = EngineMetrics(max_model_len=4096)
    gaps = np.full(64, 0.004)
    best = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(50):
            metrics.on_step(
                kind="decode", step_s=0.004, num_prompt_tokens=0, num_generation_tokens=64, inter_token_s=gaps
            )
        best = min(best, (time.perf_counter() - begin) / 50)
    assert best < 40e-6
