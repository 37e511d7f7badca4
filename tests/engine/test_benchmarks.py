"""The benchmarks run to their ends, and what they count is what happened. No speed is judged: the machine is shared."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jaxserve.llm
from benchmarks import offline, peers, serve
from benchmarks.host_overhead import HOST, KINDS, Laps, measure_core, measure_server
from benchmarks.offline_run import our_command, run_elsewhere, run_set
from benchmarks.report import Report
from benchmarks.stream_client import StreamClient, StreamResult
from benchmarks.workload import RequestSet, request_set
from jaxserve import LLM
from jaxserve.engine.engine import EngineCore
from jaxserve.text.tokenizer import Tokenizer

VOCABULARY = list(range(100, 150))

# Answers a file of requests as the runners do: every output token is the request's index, but for what FLAGS say.
FAKE_RUNNER = """
import argparse, json, pathlib
p = argparse.ArgumentParser()
p.add_argument("--seconds", type=float); p.add_argument("--wrong", type=int, default=-1)
p.add_argument("--gaps", action="store_true"); p.add_argument("--fails", action="store_true")
p.add_argument("--requests"); p.add_argument("--json")
a = p.parse_args()
assert not a.fails, "this engine does not work"
runs = {}
for s in json.loads(pathlib.Path(a.requests).read_text()):
    ids = [[i] * s["output_tokens"] for i in range(len(s["prompts"]))]
    if a.wrong >= 0:
        ids[a.wrong][-1] += 1
    runs[s["name"]] = {"seconds": a.seconds, "token_ids": ids, "num_cached": 0}
    if a.gaps:
        runs[s["name"]]["gaps"] = [0.5 / (1 + i) for i in range(len(ids))]
pathlib.Path(a.json).write_text(json.dumps({"load_s": 1.0, "runs": runs}))
"""


def values(report: Report) -> dict[str, float]:
    return {row.name: row.value for row in report.rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    script = repo / "scripts" / "make_model_folder.py"
    subprocess.run([sys.executable, script, path, "smollm2-135m", "--tiny"], check=True)
    return path


@pytest.fixture
def llm(folder: Path, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The shared engine, compiled already, behind the facade and with the folder's tokenizer."""
    monkeypatch.setattr(jaxserve.llm, "EngineCore", lambda *_, **__: core)
    return LLM(str(folder))


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., list[str]]:
    """The command of a runner that takes so many seconds, with more flags."""
    script = tmp_path / "fake_runner.py"
    script.write_text(FAKE_RUNNER)
    return lambda seconds, *flags: [sys.executable, str(script), "--seconds", str(seconds), *flags]


def test_offline_computes_a_shared_prefix_once_and_each_run_anew(llm: LLM) -> None:
    requests = request_set("shared", VOCABULARY, quick=True)
    first, again = run_set(llm, requests), run_set(llm, requests)
    assert first.token_ids == again.token_ids
    assert first.num_cached == again.num_cached == requests.num_prompt_tokens - requests.num_distinct_prompt_tokens
    report = Report("test")
    rate = offline.measure(llm, requests, 2, report)
    found = values(report)
    assert found["shared: output"] == rate > 0
    assert found["shared: prompt tokens computed"] == requests.num_distinct_prompt_tokens


def test_offline_rows_of_a_stream_and_of_memory(llm: LLM) -> None:
    report = Report("test")
    offline.measure(llm, request_set("stream", VOCABULARY, quick=True), 1, report)
    offline.add_memory(llm, report)
    found = values(report)
    assert found["stream: first token"] > 0
    assert found["stream: prompt tokens computed"] == 16
    assert found["peak memory of the process ÷ these"] > 1


def test_phases_do_not_count_what_runs_inside_them() -> None:
    laps = Laps()

    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    inner = laps.timed("inner", lambda: spin(0.02))
    outer = laps.timed("outer", lambda: (inner(), spin(0.01), inner()))
    outer()
    assert laps.spent_ns["inner"] == pytest.approx(40e6, rel=0.2)
    assert laps.spent_ns["outer"] == pytest.approx(10e6, rel=0.4)


def test_host_overhead_covers_every_phase_and_leaves_the_engine_as_it_was(core: EngineCore) -> None:
    report, plan, steps = Report("test"), core.scheduler.plan, core.runner.compiled
    measure_core(core, num_rows=4, num_steps=4, num_windows=3, report=report)
    found = values(report)
    for who, kind in itertools.product(("host alone", "with the device"), KINDS):
        table = f"{who}, 4 rows, {kind}"
        phases = [found[f"{table}: {phase}"] for phase in HOST]
        assert min(phases) >= 0
        assert max(phases) <= found[f"{table}: host, a token step"] * 2
        assert found[f"{table}: host, quickest window"] <= found[f"{table}: host, a token step"]
    assert found["with the device, 4 rows, loops: device, a token step"] > 0
    assert "host alone, 4 rows, loops: device, a token step" not in found
    assert (core.scheduler.plan, core.runner.compiled) == (plan, steps)


def test_host_overhead_of_the_server_is_of_tokens_with_text(folder: Path) -> None:
    report = Report("test")
    measure_server(Tokenizer.from_folder(folder), 50, report)
    each_us = sum(value for name, value in values(report).items() if name.startswith("server, one token"))
    assert values(report)["server, 64 tokens: both"] == pytest.approx(64 * each_us)


def test_peers_are_compared_round_by_round_with_the_best(fake: Callable[..., list[str]]) -> None:
    sets = [request_set(name, VOCABULARY, quick=True) for name in ("batch", "long")]
    static, continuous = "transformers static 16", "transformers continuous"
    commands = {"ours": fake(2.0), static: fake(6.0), continuous: fake(4.0), "llama.cpp": fake(1.0)}
    answers = peers.run_rounds(commands | {"broken": fake(1.0, "--fails")}, sets, rounds=2)
    assert {engine: len(found) for engine, found in answers.items()} == dict.fromkeys(commands, 2)
    report = Report("test")
    rate = peers.add_rates(report, "float32", sets[0], answers)
    peers.add_rates(report, "float32", sets[1], answers)
    found = values(report)
    assert rate == found["float32, batch: output, ours"] == sets[0].num_output_tokens / 2
    assert found["float32, batch: ours ÷ transformers's"] == 2
    assert found["float32, batch: ours ÷ llama.cpp's"] == 0.5
    assert found["float32, long: total, transformers static 16"] == (4 * (96 + 2)) / 6


def test_a_greedy_answer_that_differs_is_counted_and_placed(
    fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [request_set("batch", VOCABULARY, quick=True)]
    static, continuous = fake(1.0, "--gaps"), fake(1.0, "--wrong", "3")
    commands = {"ours": fake(1.0), "transformers static 16": static, "transformers continuous": continuous}
    commands["llama.cpp"] = fake(1.0, "--wrong", "2")  # whose cache is float16
    report = Report("test")
    peers.add_agreement(report, peers.run_rounds(commands, sets, rounds=1))
    found = {row.name.rpartition(" ")[2]: (row.value, row.target) for row in report.rows}
    assert found["16's"] == (8, "8")
    assert found["continuous's"] == (7, "8")
    printed = capsys.readouterr().out
    assert "continuous: request 3 differs from output token 7 on; smallest gap" in printed
    assert "request 2" not in printed


def test_peers_without_another_python_measures_us_and_says_so(
    folder: Path,
    fake: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(peers, "our_command", lambda *_: fake(1.0))
    monkeypatch.setattr(sys, "argv", ["peers", "--model", str(folder), "--quick", "--json", str(tmp_path / "out.json")])
    peers.main()
    assert "No --peer-python" in capsys.readouterr().out
    rows = {row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert "bfloat16, shared: output, ours" in rows
    assert not any("÷" in row for row in rows)


def test_a_python_without_torch_is_refused() -> None:
    with pytest.raises(SystemExit, match="lacks torch or transformers"):
        peers.peer_commands(sys.executable, Path("model"), "float32", [16])


@pytest.mark.parametrize(
    ("flags", "budget"), [([], 256), (["--max-num-batched-tokens", "99"], 99), (["--max-num-seqs", "300"], 300)]
)
def test_offline_gets_the_server_s_flags_and_steps(flags: list[str], budget: int) -> None:
    always = ["--max-num-seqs", "7", "--dtype", "float32", "--no-enable-prefix-caching"]
    command = serve.offline_command("demo", [*always, *flags])
    rows = int(flags[1]) if "--max-num-seqs" in flags else 7
    config = json.loads(command[command.index("--config") + 1])
    assert config == {"max_num_seqs": rows, "enable_prefix_caching": False, "max_num_batched_tokens": budget}
    assert command == our_command("demo", "float32", config, rehearses=True)


def test_served_over_offline_is_a_ratio_of_rounds(
    fake: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [
        RequestSet(name="batch", prompts=request_set("batch", VOCABULARY, seed=s, quick=True).prompts, output_tokens=8)
        for s in range(3)
    ]

    async def complete(_: StreamClient, prompt: list[int], due_s: float) -> StreamResult:
        return StreamResult(due_s, tuple(due_s + 0.25 * np.arange(1, 9)), 8, None)

    monkeypatch.setattr(StreamClient, "complete", complete)
    report = Report("test")
    client = StreamClient(url="http://127.0.0.1:1", model="m", output_tokens=8)
    asyncio.run(serve.against_offline(client, fake(1.0), rounds, report))
    found = values(report)
    assert found["8 streams at once: offline, output"] == 64
    assert found["8 streams at once: server ÷ offline"] == pytest.approx(0.5, rel=0.05)  # 2 s, and 1 s


def test_a_runner_that_fails_is_quoted(fake: Callable[..., list[str]]) -> None:
    with pytest.raises(RuntimeError, match="this engine does not work"):
        run_elsewhere(fake(1.0, "--fails"), [request_set("stream", VOCABULARY, quick=True)])


def test_the_peer_s_runner_imports_nothing_of_ours(repo: Path) -> None:
    code = (repo / "scripts" / "transformers_run.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names) | {"__future__", "torch", "transformers"}
