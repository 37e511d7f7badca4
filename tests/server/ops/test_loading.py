"""What is decided between the options and the engine."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve_server import engine_start, loading
from jaxserve_server.flags import parse_options
from jaxserve_server.loading import launch_engine, model_names, sampling_defaults
from jaxserve_server.startup_log import log_reuse
from jaxserve_server.wire import ModelRead
from pallas_kernels.native.build import Loaded


def test_the_model_s_own_sampling_defaults_unless_told_otherwise(tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults("auto", own) == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults("vllm", own) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.7}))
    assert sampling_defaults(str(tmp_path), own) == {"top_p": 0.7}
    with pytest.raises(CheckpointError, match=r"has no generation_config\.json"):
        sampling_defaults(str(tmp_path / "nothing"), own)


class QuickEngine:
    """Is ready at once."""

    limits = SimpleNamespace(
        **{"num_kv_tokens": 64, "max_model_len": 64, "max_concurrency": 1.0, "num_swap_blocks": 0, "num_blocks": 5},
        **{
            "kv_dtype": "bfloat16",
            "kv_tile": 64,
            "q_tile": 64,
            "exact": True,
            "tensor_parallel_size": 1,
            "stacked_layers": False,
            "attention": "cpu",
            "panels": True,
        },
    )
    kv_bytes, init_s = 1024, 0.5

    def __init__(self, model: Any, params: Any, config: EngineConfig) -> None:
        self.given = model, params, config

    def start(self, on_progress: Any) -> None:
        on_progress(1, 1, "step[4]", 0.1)


def test_one_process_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_start, "AsyncEngine", QuickEngine)
    options = parse_options(["--disable-frontend-multiprocessing", "--max-num-seqs", "3"], {})
    launch = launch_engine(options, None)  # type: ignore[arg-type] - no loop is needed
    assert isinstance(launch, engine_start.LocalLaunch)
    model = launch.read_model()
    engine, limits, fingerprint = launch.finish()
    assert isinstance(engine, QuickEngine)
    assert (engine.given[0], engine.given[2].max_num_seqs, limits) == (model.config, 3, QuickEngine.limits)
    assert re.fullmatch(r"jaxserve-[0-9.]+-exact-[0-9a-f]{8}", fingerprint)
    launch.abandon()


def test_a_fingerprint_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels, or the same compiled for another processor, sum otherwise."""

    def name(key: str | None, **changes: Any) -> str:
        monkeypatch.setattr(engine_start, "load_kernels", lambda _: Loaded(key, None))
        limits = SimpleNamespace(**vars(QuickEngine.limits) | changes)
        model = SimpleNamespace(version="v", config=SimpleNamespace(dtype="bfloat16"))
        return engine_start.fingerprint(model, limits)  # type: ignore[arg-type]

    plain = {"attention": "xla", "panels": False}
    names = [name("a"), name("b"), name("a", panels=False), name("a", attention="xla"), name("a", **plain)]
    assert len(set(names)) == len(names)
    assert name("b", **plain) == name("a", **plain)
    assert name("a") == names[0]


def test_a_failure_after_the_weights_ends_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []

    class Launch:
        def read_model(self) -> ModelRead:
            return ModelRead(str(tmp_path), None, {})  # type: ignore[arg-type]

        def abandon(self) -> None:
            ended.append(self)

    monkeypatch.setattr(loading, "launch_engine", lambda *_: Launch())
    with pytest.raises(CheckpointError, match="tokenizer"):
        loading.load(parse_options([], {}), None)  # type: ignore[arg-type]
    assert len(ended) == 1


def test_defaults_out_of_bounds_stop_the_start_and_not_every_request() -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*'temperature'.*--generation-config vllm"):
        sampling_defaults("auto", {"temperature": 3.5})
    assert sampling_defaults("vllm", {"temperature": 3.5}) == {}


def test_the_log_says_what_becomes_of_kv(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("jaxserve"), "propagate", True)
    with caplog.at_level(logging.INFO, "jaxserve.server"):
        log_reuse(prefix_caching=True, num_swap_blocks=65_536, num_swap_bytes=4 * 2**30)
        log_reuse(prefix_caching=False, num_swap_blocks=0, num_swap_bytes=0)
    assert caplog.messages == [
        "Prefix caching: on",
        "Swap space: 4.00 GiB of host memory, 65,536 blocks",
        "Prefix caching: off",
        "Swap space: off, preempted requests are computed again",
    ]


def test_a_folder_is_served_under_its_own_name_and_as_it_was_typed(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert model_names(str(folder)) == ("my-model", str(folder))
    assert model_names("demo") == ("demo",)
    assert model_names("org/name") == ("org/name",)
