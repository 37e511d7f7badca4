"""Whether an engine on a CPU has the C++ kernels of `pallas_kernels`. Its loader and its engine ask the same."""

from __future__ import annotations

import jax

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.private_folder import private_folder
from pallas_kernels.linear.api import can_gate, uncovered_matrix
from pallas_kernels.native.build import load_kernels


def missing_cpu_kernels(config: EngineConfig) -> str | None:
    """Why an engine of this configuration has none, as a sentence; None if it has, and then they are loaded.

    Raises:
        ConfigError: as `private_folder`.
    """
    if config.tensor_parallel_size > 1:  # of simulated devices, which are for tests of what XLA does on real ones
        return "the CPU's kernels run on one device"
    folder = config.compilation_cache_dir
    return load_kernels(None if folder is None else private_folder(folder) / "kernels").missing


def has_panels(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether weights lie in the CPU's kernels' panels. In a loop over stacked layers each would be copied first."""
    ins = (model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)
    are_covered = all(uncovered_matrix((), (num,), model.dtype) is None for num in ins)
    if config.attention_backend == "xla" or config.stacked_layers or not are_covered:
        return False
    return jax.default_backend() == "cpu" and missing_cpu_kernels(config) is None


def layers_skip_padding(model: ModelConfig) -> bool:
    """Whether kernels do all of a layer in panels, so that only rows with a token cost time."""
    covered = model.activation == "silu" and not model.mlp_bias and not model.o_bias
    return covered and can_gate((2, model.intermediate_size))
