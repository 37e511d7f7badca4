"""The TPU kernels compiled for real chips, on a machine without one: Mosaic takes them, and the pool is never copied.

`compile_kernels` does it in a process of its own. Three programs a chip; JAXSERVE_TPU_MODELS=all for every one.
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

CHIPS = ["v5e", "v6e", "tpu7x"]
FEW = ["llama-8b", "qwen2-0.5b", "gpt-oss of 8 chips"]
ALLOWED = {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple", "while"}  # none of them moves the pool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]' brings the one that this jax was made for",
)


def compiled(repo: Path, chip: str, *models: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.portability.compile_kernels", chip, *models]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_and_works_in_place(repo: Path, chip: str):
    models = [] if os.environ.get("JAXSERVE_TPU_MODELS") == "all" else FEW
    found = compiled(repo, chip, *models)
    assert len(found) >= len(FEW)
    for program in found:
        in_format = program["sizes"]["in_format"]
        step, moves = program["step"], program["moves"]
        assert {"kv_write", "ragged_paged_attention_chunk", "ragged_paged_attention_decode"} <= set(step["kernels"])
        assert set(moves["kernels"]) == {"block_copy", "block_gather", "block_scatter"}
        for facts in (step, moves):
            assert facts["alias_bytes"] >= facts["pool_bytes"], program
            if in_format:
                assert set(facts["operations_on_the_pool"]) <= ALLOWED, program
                assert facts["temp_bytes"] < facts["pool_bytes"] / 4, program


def test_a_pool_in_another_layout_is_copied(repo: Path):
    """So the check above can fail; and why `tpu_pool_format` is there."""
    (program,) = compiled(repo, "v5e", "default layout")
    assert not set(program["step"]["operations_on_the_pool"]) <= ALLOWED
    assert program["step"]["temp_bytes"] >= program["step"]["pool_bytes"]
