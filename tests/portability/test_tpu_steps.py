"""The engine's own steps compiled for TPUs that are not there, by the command that people have for it.

Two layers of each model at its own widths: what is asked is the same of each layer. Stacked layers are all there.
`benchmarks.tpu_compile` compiles all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Row
from benchmarks.tpu_compile import growth
from jaxserve.config import EngineConfig
from jaxserve.engine.compile_check import make_topology_mesh, topology_devices
from jaxserve.engine.program_text import ProgramText
from jaxserve.errors import ConfigError
from jaxserve_server.compile_check import main

NUM_LAYERS = 2
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "vocab_size": 151_936}
QWEN3 |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "vocab_size": 128_256}
LLAMA_8B |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64}
COMMON = {
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "eos_token_id": 2,
}
SIZES = ["--max-num-seqs", "64", "--max-num-batched-tokens", "256", "--max-decode-steps", "1"]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: the `tpu` extra brings the one that this jax was made for (pip install -e .[tpu])",
)


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    def make(fields: dict[str, Any]) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(COMMON | fields))
        return str(path)

    return make


def compile_check(repo: Path, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "jaxserve.compile_check", *arguments, *SIZES, "--json", str(out)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


@needs_libtpu
@pytest.mark.parametrize(
    ("fields", "topology", "num_devices", "max_model_len", "programs", "flags"),
    [
        (QWEN3, "v5e:2x2", 1, 8192, ["step[64]", "step[256]", "copy[64]", "gather[8]", "scatter[8]"], []),
        (LLAMA_8B, "v6e:2x2", 4, 8192, ["step[64]"], []),
        (LLAMA_70B, "tpu7x:2x2x1", 8, 32_768, ["step[64]"], []),
        # As deep as it is: a step takes no longer to compile than one of two layers.
        (
            LLAMA_70B | {"num_hidden_layers": 80},
            *("v6e:2x4", 8, 8192, ["step[64]", "copy[64]", "gather[8]", "scatter[8]"], ["--stacked-layers"]),
        ),
    ],
    ids=["Qwen3-0.6B", "Llama-3.1-8B", "Llama-3.3-70B", "Llama-3.3-70B stacked"],
)
def test_steps_fit_copy_no_cache_and_have_two_all_reduces_a_layer(
    repo: Path,
    tmp_path: Path,
    make_config: Any,
    fields: dict[str, Any],
    topology: str,
    num_devices: int,
    max_model_len: int,
    programs: list[str],
    flags: list[str],
) -> None:
    model, num_layers = make_config(fields), fields.get("num_hidden_layers", NUM_LAYERS)
    parallel = ["--tensor-parallel-size", str(num_devices), "--max-model-len", str(max_model_len)]
    found, printed = compile_check(
        repo, tmp_path / "out.json", model, "--topology", topology, *parallel, *flags, "--programs", *programs
    )
    assert found["fits"]
    assert found["limits"]["attention"] == "tpu"
    for program in found["programs"]:
        assert program["error"] is None, program
        assert program["cache_copies"] == 0, program
        # What a program has beside its arguments is no second cache, not of a layer: half a gigabyte, or a seventh.
        assert program["temp_bytes"] < found["kv_bytes"] / num_layers / (1 if flags else 2), program
        assert program["peak_bytes"] < found["hbm_bytes"]
        if program["name"].startswith("step"):
            all_reduces = dict(program["collectives"]).get("all-reduce", 0)
            assert all_reduces == (2 * num_layers + 1 if num_devices > 1 else 0)  # and one for the embedding
            assert program["cycles"] > 0
    for words in (
        "fits           yes",
        f"{found['limits']['num_blocks'] * 16 - 16:,} tokens",
        topology,
        "attention      tpu",
    ):
        assert words in printed


@needs_libtpu
def test_what_cannot_be_is_refused_with_the_remedy(make_config: Any, capsys: pytest.CaptureFixture) -> None:
    """Before anything is compiled."""
    big = make_config(LLAMA_70B | {"num_hidden_layers": 80})
    for arguments, words in (
        (["--topology", "v9z:2x2"], "'v9z:2x2' is no TPU topology"),
        (["--topology", "v5e:2x2", "--tensor-parallel-size", "8"], "takes more devices than the 4 of v5e:2x2"),
        (["--topology", "v5e:2x2", "--tensor-parallel-size", "4"], "No room for a KV cache"),
        (["--topology", "v5e:4x4", "--tensor-parallel-size", "16", "--programs", "leap[9]"], "no program leap[9]"),
        (["--topology", "v5e:2x2", "--tensor-parallel-size", "3"], "does not divide this model"),
    ):
        assert main([big, *arguments]) == 1, words
        assert words in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"takes libtpu, which is not installed\. pip install 'jaxserve\[tpu\]'"):
        topology_devices("v6e:2x2")


def test_a_topology_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["demo"])
    assert usage.value.code == 2
    assert "--topology" in capsys.readouterr().err


def test_what_is_counted_in_a_program_s_text() -> None:
    text = """
  %copy.5 = bf16[4096,16,8,256]{3,1,2,0:T(8,128)(2,1)} copy(bf16[4096,16,8,256]{3,2,1,0} %param.9), metadata={}
  %copy-start.1 = (bf16[4096,8,16,256]{3,2,1,0}, bf16[4096,8,16,256]{3,2,1,0}, u32[]) copy-start(bf16[4096,8,16,256] %p)
  %copy.7 = bf16[64,1024]{1,0} copy(bf16[64,1024]{0,1} %fusion.2)
  %all-reduce.3 = f32[64,4096]{1,0} all-reduce(f32[64,4096]{1,0} %x), channel_id=1
  %all-reduce-start.4 = f32[64,4096]{1,0} all-reduce-start(f32[64,4096]{1,0} %x), channel_id=2
  %all-reduce-done.4 = f32[64,4096]{1,0} all-reduce-done(f32[64,4096]{1,0} %all-reduce-start.4)
  %all-gather.1 = f32[64]{0} all-gather(f32[16]{0} %y)
"""
    assert ProgramText(text, (4096, 16, 8, 256)).cache_copies() == 2
    assert ProgramText(text, (4096, 16, 4, 256)).cache_copies() == 0
    assert ProgramText(text).collectives() == (("all-reduce", 2), ("all-gather", 1))


def test_a_mesh_wants_as_many_devices_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxserve.engine import compile_check as module

    monkeypatch.setattr(module, "topology_devices", lambda topology: [object()] * 4)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=5 takes more devices than the 4 of v6e:2x2"):
        make_topology_mesh("v6e:2x2", EngineConfig(tensor_parallel_size=5).tensor_parallel_size)


def test_a_figure_that_has_grown_is_named() -> None:
    earlier = [
        {"name": "A, decode: temporary", "value": 1.0},
        {"name": "A, decode: estimated cycles", "value": 1000.0},
        {"name": "A, decode: compilation", "value": 10.0},
        {"name": "A, decode: copies of a layer's cache", "value": 0.0},
    ]
    now = [
        Row("A, decode: temporary", 1.04, "GiB", None),
        Row("A, decode: estimated cycles", 1100.0, "", None),
        Row("A, decode: compilation", 99.0, "s", None),
        Row("A, decode: copies of a layer's cache", 2.0, "", None),
        Row("B, decode: temporary", 9.0, "GiB", None),
    ]
    assert growth(now, earlier) == [
        "A, decode: estimated cycles: 1100 , before 1000",
        "A, decode: copies of a layer's cache: 2 , before 0",
    ]
