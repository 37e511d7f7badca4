"""`load_model`: a name to a configuration and parameters that lie where they are served.

Owns the reading of weights into our tree. It knows nothing of engines. All names, dtypes and shapes are
checked against the spec tree first; then each leaf is filled from its files, a device's part at a time,
and handed to the device, so that host memory holds about a layer more than the model. Of stacked layers the devices
hold a layer more, too: each is read as if it stood alone and then written to its place.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.cpu_kernels import has_panels
from jaxserve.errors import WeightsError
from jaxserve.models.params import choose_layers, decoder_specs, in_panels
from jaxserve.parallel.mesh import mesh_for
from jaxserve.parallel.rules import check_divides, placements_on
from jaxserve.parallel.specs import tree_bytes
from jaxserve_checkpoints import hf_config, manifest, orbax
from jaxserve_checkpoints.names import Leaf, Place, is_ignorable, leaves
from jaxserve_checkpoints.safetensors import FLOATS, MappedFiles, TensorInfo, read_folder
from jaxserve_checkpoints.source import Source, resolve
from jaxserve_checkpoints.stacking import LayerStacks

# Leaves in flight: a layer has four large ones, so peak memory is the model and about one layer.
MAX_THREADS = 4
REPORTED_TENSORS = 10
EMBEDDING = "model.embed_tokens.weight"
TILE = 64  # 64 x 64 tiles turn float32 at 2.1 GB/s where one strided copy does 0.6
ALIGNMENT = 64  # bytes; jax on a CPU adopts buffers that are so aligned instead of copying them


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to be given to an engine.

    Attributes:
        params: the tree of `decoder_specs(config)`, stacked where that was asked for, as committed arrays.
        generation_defaults: the sampling defaults of the model's authors, by SamplingParams' names.
        version: identifies the weights, 64 hex digits. Of a converted checkpoint it is its manifest's
            digest; of a Hugging Face folder a SHA-256 over the configuration, all names, dtypes and shapes,
            and the first and last 4 KiB of each tensor.
        seconds: from reading the first header to the last array's being in place.
        num_bytes: of the parameters as served.
    """

    name: str
    folder: Path
    config: ModelConfig
    params: dict[str, Any]
    generation_defaults: Mapping[str, int | float]
    version: str
    seconds: float
    num_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Parameters loaded a second, 10^9 bytes."""
        return self.num_bytes / 1e9 / max(self.seconds, 1e-9)


def load_model(
    name_or_dir: str | Path,
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    stacked_layers: bool | None = False,
) -> LoadedModel:
    """Reads a model into the memory of its devices.

    Args:
        name_or_dir: what `source.resolve` takes.
        dtype: of the weights as served: "auto" is the checkpoint's.
        mesh: the devices; None is the first local one.
        revision: of a hub repository.
        stacked_layers: each parameter of all layers in one array. None decides as an engine does whose
            `EngineConfig.stacked_layers` is None.

    Raises:
        ConfigError: the model cannot be cut over so many devices, or its layers cannot be stacked.
        UnsupportedModelError: an architecture or feature that is not implemented.
        WeightsError: missing, unexpected, ill-shaped or truncated tensors, all in one message.
        ManifestError: a converted checkpoint whose bytes are not those that were written.
        CheckpointError: anything else that is wrong with the folder or the name.
    """
    source = resolve(name_or_dir, revision=revision)
    start = time.perf_counter()
    if mesh is not None:  # refused before a weight is read, and before a manifest is compared with all of them
        check_divides(hf_config.read_config(source.folder, dtype="float32"), mesh.size)
    read = _read_huggingface if source.kind == "huggingface" else _read_converted
    config, params, version = read(source, dtype, mesh, stacked_layers)
    jax.block_until_ready(params)
    return LoadedModel(
        name=source.name,
        folder=source.folder,
        config=config,
        params=params,
        generation_defaults=hf_config.generation_defaults(source.folder),
        version=version,
        seconds=time.perf_counter() - start,
        num_bytes=tree_bytes(decoder_specs(config)),
    )


def load_for_engine(
    name_or_dir: str | Path, config: EngineConfig, *, dtype: str = "auto", revision: str | None = None
) -> LoadedModel:
    """`load_model` onto the devices, and in the form, that an engine of this configuration takes."""
    mesh = mesh_for(config.tensor_parallel_size)
    loaded = load_model(name_or_dir, dtype=dtype, mesh=mesh, revision=revision, stacked_layers=config.stacked_layers)
    if not has_panels(config, loaded.config):
        return loaded
    start = time.perf_counter()
    return replace(loaded, params=in_panels(loaded.params), seconds=loaded.seconds + time.perf_counter() - start)


def _read_converted(
    source: Source, dtype: str, mesh: Mesh | None, stacked_layers: bool | None
) -> tuple[ModelConfig, Any, str]:
    found = manifest.verify(source.folder)
    config = orbax.read_config(source.folder, found, dtype)
    stacked = choose_layers(config, stacked_layers).stacked
    return config, orbax.restore(source.folder, config, mesh, found, stacked=stacked), found.digest


def _read_huggingface(
    source: Source, dtype: str, mesh: Mesh | None, stacked_layers: bool | None
) -> tuple[ModelConfig, Any, str]:
    # Refuses an architecture, or a stack of it, before weights are looked for.
    stacked = choose_layers(hf_config.read_config(source.folder, dtype="float32"), stacked_layers).stacked
    tensors = read_folder(source.folder)
    stored = tensors[EMBEDDING].dtype if EMBEDDING in tensors else None
    names = {code: str(kind) for code, kind in FLOATS.items()}
    config = hf_config.read_config(source.folder, dtype=dtype, stored_dtype=names.get(stored or ""))
    specs = decoder_specs(config, _num_devices(mesh))
    targets = tuple(leaves(specs, decoder_specs(config)))
    check_tensors(tensors, targets, config)
    placements = placements_on(mesh, specs)
    with MappedFiles(tensors) as files:
        version = _version(source.folder, tensors, files)
        params = _fill_tree(targets, placements, tensors, files, LayerStacks(config, mesh) if stacked else None)
    return config, params, version


def _num_devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


def check_tensors(tensors: Mapping[str, TensorInfo], targets: Sequence[Leaf], config: ModelConfig) -> None:
    """Compares what the files hold with what the spec tree asks for, before anything is allocated.

    Raises:
        WeightsError: with all that is missing, unexpected, ill-shaped or of a dtype that is not read.
    """
    places = {place.name: place for leaf in targets for place in leaf.places}
    unexpected = [
        repr(name)
        for name in sorted(tensors.keys() - places.keys())
        if not is_ignorable(name, tied=config.tied_embeddings)
    ]
    present = [(place, tensors[name]) for name, place in places.items() if name in tensors]
    problems = {
        "missing": [name for name in places if name not in tensors],
        "unexpected": unexpected,
        "ill-shaped": [
            f"{place.name} is {list(info.shape)} and should be {list(place.shape)}"
            for place, info in present
            if info.shape != place.shape
        ],
        "of an unread dtype": [
            f"{place.name} is {info.dtype}; {', '.join(FLOATS)} are read"
            for place, info in present
            if info.dtype not in FLOATS
        ],
    }
    if any(problems.values()):
        lines = [f"The weights do not fit config.json ({config.architecture}, {config.num_layers} layers):"]
        lines += [f"  {kind} ({len(found)}): {_some(found)}" for kind, found in problems.items() if found]
        raise WeightsError("\n".join(lines))


def _some(items: Sequence[str]) -> str:
    shown = "; ".join(item[:200] for item in items[:REPORTED_TENSORS])
    return shown if len(items) <= REPORTED_TENSORS else f"{shown}; and {len(items) - REPORTED_TENSORS} more"


def _version(folder: Path, tensors: Mapping[str, TensorInfo], files: MappedFiles) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for info in (tensors[name] for name in sorted(tensors)):
        digest.update(f"{info.name!r} {info.dtype} {info.shape}\n".encode())
        if info.dtype in FLOATS:
            ends = files.array(info).reshape(-1).view(np.uint8)
            digest.update(ends[:4096].tobytes() + ends[-4096:].tobytes())
    return digest.hexdigest()


def _fill_tree(
    targets: Sequence[Leaf],
    placements: Any,
    tensors: Mapping[str, TensorInfo],
    files: MappedFiles,
    stacks: LayerStacks | None,
) -> dict[str, Any]:
    """The tree of arrays, leaves being filled by a few threads (numpy's copies release the GIL).

    Args:
        stacks: where the layers' arrays go; None for each on its own.
    """
    top: dict[str, jax.Array] = {}
    layers: tuple[dict[str, jax.Array], ...] = tuple({} for _ in placements["layers"])

    def fill(leaf: Leaf) -> None:
        placement, name = placements, str(leaf.path[-1])
        for key in leaf.path:
            placement = placement[key]
        array = _fill_leaf(leaf, placement, tensors, files)
        if leaf.path[0] != "layers":
            top[name] = array
        elif stacks is None:
            layers[int(leaf.path[1])][name] = array
        else:
            stacks.put(int(leaf.path[1]), name, array)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "load") as pool:
        for _ in pool.map(fill, targets):
            pass  # an error of a thread is raised here
    return {**top, "layers": layers if stacks is None else stacks.arrays}


def _fill_leaf(leaf: Leaf, placement: Sharding, tensors: Mapping[str, TensorInfo], files: MappedFiles) -> jax.Array:
    """One array of the tree; each device's part is read from the files on its own."""
    shape, dtype = leaf.spec.shape, np.dtype(leaf.spec.dtype)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        cut = tuple(slice(*at.indices(size)) for at, size in zip(index, shape, strict=True))
        buffer = aligned_empty(tuple(at.stop - at.start for at in cut), dtype)
        for place in leaf.places:
            info = tensors[place.name]
            target, tensor = _views(place, buffer, files.array(info), cut)
            files.read_ahead(info, tensor)
            with np.errstate(over="ignore", invalid="ignore"):  # _check_range tells, and names the tensor
                _copy(target, tensor)
            if dtype == np.float16 and info.dtype != "F16":
                _check_range(place, target)
        return buffer

    return jax.block_until_ready(jax.make_array_from_callback(shape, placement, part, dtype=dtype))


def _views(
    place: Place, buffer: np.ndarray, tensor: np.ndarray, cut: tuple[slice, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The part of a device's buffer that a tensor fills, and the part of the tensor that fills it."""
    kept = []
    for axis, at in enumerate(cut):
        own = place.index[axis] if axis < len(place.index) else slice(None)
        if own == slice(None):
            kept.append(at)
        else:  # the axis that a leaf's parts lie along: never cut over devices
            assert at == slice(0, buffer.shape[axis], 1)
            kept += [slice(None)] if isinstance(own, slice) else []
    target, tensor = buffer[place.index], tensor.reshape(place.view_shape)
    kept[0] = slice(kept[0].start // place.copies, min(-(-kept[0].stop // place.copies), len(tensor)))
    num = max(kept[0].stop - kept[0].start, 0)
    assert place.copies == 1 or len(target) == num == 1  # a device has no two copies
    target[num:] = 0
    return target[:num], tensor[tuple(kept)]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that jax on a CPU takes over without a copy. Nobody may write to it after that."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + num_bytes].view(dtype).reshape(shape)


def _copy(target: np.ndarray, tensor: np.ndarray) -> None:
    """`target[...] = tensor`, converting; in tiles where the two run along different axes."""
    fast, slow = int(np.argmin(tensor.strides)), tensor.ndim - 1
    if tensor.ndim < 2 or fast == slow:
        np.copyto(target, tensor, casting="unsafe")
        return
    target, tensor = (np.moveaxis(array, (fast, slow), (-2, -1)) for array in (target, tensor))
    rows, columns = target.shape[-2:]
    for outer in np.ndindex(target.shape[:-2]):
        into, source = target[outer], tensor[outer]
        for row in range(0, rows, TILE):
            for column in range(0, columns, TILE):
                tile = (slice(row, row + TILE), slice(column, column + TILE))
                np.copyto(into[tile], source[tile], casting="unsafe")


def _check_range(place: Place, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise WeightsError(
            f"{place.name} has values beyond float16 (65504) or not finite. Serve it with --dtype bfloat16."
        )
