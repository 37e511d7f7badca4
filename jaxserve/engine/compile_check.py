"""Compiling an engine's step programs for TPUs that are not there, and what the compiler says of them.

libtpu compiles for a topology that is only named: programs, memory and collectives are those of the chips. Nothing
runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine.program_text import ProgramText
from jaxserve.engine.programs import engine_programs
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.errors import ConfigError
from jaxserve.models.params import choose_layers, decoder_specs
from jaxserve.parallel.mesh import bytes_on_each
from jaxserve.parallel.rules import MESH_AXIS, check_divides, shardings
from jaxserve.parallel.specs import abstract_arrays, map_specs

GIB = 2**30
TOPOLOGIES = "v5e:2x2, v5p:2x2x1, v6e:2x4 or tpu7x:2x2x1"
_TOO_MUCH = 2**42  # bytes; no chip has them
_AVAILABLE = re.compile(r"available HBM \((\d+(?:\.\d+)?)([MGT])\)")
_NEEDED = re.compile(r"\((\d+(?:\.\d+)?)([MGT])\) exceeds available HBM")
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class ProgramCheck:
    """What the compiler says of one program, for each device.

    Attributes:
        name: as `engine_programs` calls it.
        compile_s: seconds of this machine.
        argument_bytes: parameters, cache and state, as they lie in the chip's memory, padding included.
        temp_bytes, code_bytes: what a run takes besides.
        new_output_bytes: results that are no donated argument.
        collectives: how many instructions of each kind of `program_text.COLLECTIVES`; a loop's body counts once, but
            that of stacked layers once a layer.
        cache_copies: copies of a whole layer's cache: none, or the pool is moved in each step.
        cycles: the compiler's estimate, instructions counted in the same way; to compare with itself.
        error: why it does not compile; None if it does.
    """

    name: str
    compile_s: float
    argument_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    new_output_bytes: int = 0
    collectives: tuple[tuple[str, int], ...] = ()
    cache_copies: int = 0
    cycles: int = 0
    error: str | None = None

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.temp_bytes + self.code_bytes + self.new_output_bytes


@dataclass(frozen=True, slots=True)
class CompileCheck:
    """Whether an engine fits and compiles, and what it could then serve.

    Attributes:
        device_kind, num_devices: of the mesh, and how many the topology has.
        hbm_bytes: what a program may use on each device.
        weight_bytes: on each device.
        limits: the sizes that the engine would have.
        programs: the step programs that were compiled.
    """

    device_kind: str
    num_devices: int
    num_in_topology: int
    hbm_bytes: int
    weight_bytes: int
    kv_bytes: int
    limits: EngineLimits
    programs: tuple[ProgramCheck, ...]

    @property
    def fits(self) -> bool:
        return all(program.error is None for program in self.programs)

    @property
    def spare_bytes(self) -> int:
        """What the largest program leaves free of each device's memory."""
        return self.hbm_bytes - max(program.peak_bytes for program in self.programs)


@dataclass(frozen=True, slots=True)
class _Chip:
    """A device that is not there, as `resolve_engine_config` looks at devices."""

    platform: str
    device_kind: str
    hbm_bytes: int

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.hbm_bytes}


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology such as "v6e:2x4", to compile for and not to run on.

    Raises:
        ConfigError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # a machine without TPUs has no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is driven: several may compile at once
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Compiling for TPUs takes libtpu, which is not installed. pip install 'jaxserve[tpu]' brings it; no TPU is "
            "needed."
        )
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{topology!r} is no TPU topology: {reason} Give one such as {TOPOLOGIES}.") from None


def make_topology_mesh(topology: str, num_devices: int) -> tuple[Mesh, int]:
    """A mesh over the first devices of a topology, and how many that has.

    Raises:
        ConfigError: as `topology_devices`, or it has fewer.
    """
    devices = topology_devices(topology)
    if num_devices > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={num_devices} takes more devices than the {len(devices)} of {topology}. "
            "Name a larger topology, or cut the model over fewer."
        )
    mesh = Mesh(np.array(devices[:num_devices]), (MESH_AXIS,), axis_types=(AxisType.Auto,))
    return mesh, len(devices)


def usable_bytes(mesh: Mesh) -> int:
    """Bytes that a program may use on each device: the compiler's own figure, which is less than the chip has.

    It says so only when it refuses a program: hence one that fits nowhere.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    giant = jax.ShapeDtypeStruct((_TOO_MUCH,), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(giant).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _AVAILABLE.search(str(error))
        if found is None:
            raise
        return _bytes(found)
    raise AssertionError(f"a program of {_TOO_MUCH} bytes compiles")


def _bytes(found: re.Match[str]) -> int:
    return int(float(found.group(1)) * _UNITS[found.group(2)])


def check_engine(
    model: ModelConfig,
    config: EngineConfig,
    topology: str,
    *,
    names: tuple[str, ...] = (),
    on_program: Callable[[ProgramCheck], None] | None = None,
) -> CompileCheck:
    """Compiles the step programs that an engine on this topology would run.

    Args:
        names: of the programs, as `engine_programs` has them; by default the steps of the decode bucket and of the
            largest, which bound the others.
        on_program: called as each is done.

    Raises:
        ConfigError: the sizes contradict each other, or the weights leave no room for a cache.
    """
    num_devices = config.tensor_parallel_size
    check_divides(model, num_devices)
    mesh, num_in_topology = make_topology_mesh(topology, num_devices)
    specs = decoder_specs(model, num_devices, stacked=choose_layers(model, config.stacked_layers).stacked)
    one = SingleDeviceSharding(mesh.devices.flat[0])
    params = abstract_arrays(specs, shardings(specs, mesh) if mesh.size > 1 else map_specs(lambda _: one, specs))
    weight_bytes = bytes_on_each(params)
    kind, hbm_bytes = mesh.devices.flat[0].device_kind, usable_bytes(mesh)
    limits = resolve_engine_config(config, model, weight_bytes=weight_bytes, device=_Chip("tpu", kind, hbm_bytes))
    layers = model.num_layers if limits.stacked_layers else 1  # in each array of the cache
    num_kv = model.num_kv_heads_over(num_devices) // num_devices
    cache_dims = (layers * limits.num_blocks, limits.block_size, num_kv, 2 * model.head_dim)
    programs = engine_programs(params, model, limits)
    checks = []
    for name in names or tuple(f"step[{n}]" for n in sorted({limits.decode_bucket, limits.token_buckets[-1]})):
        if name not in programs:
            raise ConfigError(f"There is no program {name}. There are {', '.join(sorted(programs))}.")
        checks.append(_check_program(name, programs[name], mesh, cache_dims, layers))
        if on_program:
            on_program(checks[-1])
    return CompileCheck(
        device_kind=kind,
        num_devices=num_devices,
        num_in_topology=num_in_topology,
        hbm_bytes=hbm_bytes,
        weight_bytes=weight_bytes,
        kv_bytes=model.kv_bytes_per_token(limits.kv_dtype, num_devices) * limits.num_blocks * limits.block_size,
        limits=limits,
        programs=tuple(checks),
    )


def _check_program(
    name: str, lower: Callable[[], Any], mesh: Mesh, cache_dims: tuple[int, ...], layers: int
) -> ProgramCheck:
    begin = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:  # no room, or a program that it refuses: an answer, too
        needed = _NEEDED.search(str(error))
        return ProgramCheck(
            name,
            time.perf_counter() - begin,
            argument_bytes=_bytes(needed) if needed else 0,
            error=str(error).splitlines()[0],
        )
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    text = ProgramText(compiled.as_text(), cache_dims, layers)
    return ProgramCheck(
        name,
        seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        new_output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=text.collectives(),
        cache_copies=text.cache_copies(),
        cycles=text.cycles(),
    )
