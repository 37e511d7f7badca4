"""What is decided between the options and the engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve_server.loading import model_names, sampling_defaults
from jaxserve_server.startup_log import log_reuse


def test_the_model_s_own_sampling_defaults_unless_told_otherwise(tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults("auto", own) == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults("vllm", own) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.7}))
    assert sampling_defaults(str(tmp_path), own) == {"top_p": 0.7}
    with pytest.raises(CheckpointError, match=r"has no generation_config\.json"):
        sampling_defaults(str(tmp_path / "nothing"), own)


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
