"""Executables on disk: a warm start reads machine code, where it would trace and lower every program again.

jax's own compilation cache is keyed by the lowered program, so that each start has to lower it to ask. Here the key is
what the program is made from: our source, the model, the sizes, the arguments, the compiler and its flags, the
processor. A file that cannot be used, for whatever reason, costs a compilation and a line in the log.

jax keeps the same things in a pickle (`jax.experimental.serialize_executable`), which would run what it is told to. A
file here is JSON and machine code. That code is executed, too: the folder must be this user's alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve import state as state_types
from jaxserve.config import EngineLimits, ModelConfig

MAGIC = b"jaxserve executable 1\n"
SUFFIX = ".executable"
MAX_FOLDER_BYTES = 2**30  # some 50 to 500 sets of programs: 2 MB for the demo model, 20 MB for 30 layers
MAX_UNUSED_S = 30 * 86_400.0
SOURCE_SUFFIXES = (".py", ".h", ".cc")
HOST_PACKAGES = ("cache", "scheduler", "text")  # the layer contracts keep them out of what is traced
JAX_ENTRY = re.compile(r"[\w.-]+-[0-9a-f]{64}-(cache|atime)")
# Variables that compilers read beside XLA_FLAGS.
COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES")
# Of jax's UnloadedMeshExecutable, 0.10.2 to 0.12.
EXECUTABLE_FIELDS = frozenset(
    (
        *("xla_executable", "device_list", "backend", "committed", "name", "keepalive", "mut", "kept_var_idx"),
        *("input_avals", "output_avals", "input_shardings", "output_shardings", "unordered_effects"),
        *("ordered_effects", "host_callbacks", "xla_in_layouts", "dispatch_in_layouts", "xla_out_layouts"),
        *("all_args_info", "pgle_profiler"),
    )
)

logger = logging.getLogger(__name__)


@functools.cache
def is_supported() -> bool:
    """Whether this jax has the parts that `_load` puts together."""
    try:
        from jax._src.interpreters import pxla

        found = {field.name for field in fields(pxla.UnloadedMeshExecutable)}
        return found == EXECUTABLE_FIELDS and hasattr(jax.stages, "ArgInfo")
    except (ImportError, AttributeError, TypeError):
        return False


class ExecutableStore:
    """The executables of one model in one set of sizes, in a folder that others use as well.

    Args:
        folder: checked by `compiled.use_compilation_cache`: what lies there is executed.
        mesh: the devices that programs run over; None is the first one.
    """

    def __init__(self, folder: Path, model: ModelConfig, limits: EngineLimits, mesh: Mesh | None = None) -> None:
        self._folder = folder / "executables"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._mesh = mesh
        devices = [jax.devices()[0]] if mesh is None else mesh.devices.flatten().tolist()
        self._facts = [*_environment(devices[0]), repr(model), repr(limits), f"on {[device.id for device in devices]}"]

    def load(self, name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The program `name` for arguments of these shapes; None if it is not here or cannot be used."""
        path = self._path(name, args)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read %s, compiling %s instead: %s", path, name, error)
            return None
        try:
            header, code = _parse(content)
            loaded = _load(header, code, args, self._mesh)
        except Exception as error:  # jax's internals may have changed in any way: compiling always works
            logger.warning("cannot use %s, compiling %s instead: %r", path, name, error)
            return None
        os.utime(path)  # what is not used for long is removed
        return loaded

    def save(self, name: str, args: tuple[Any, ...], executable: jax.stages.Compiled) -> None:
        """Keeps a compiled program, if it is of a kind that can be kept."""
        path = self._path(name, args)
        try:
            content = _format(executable, self._mesh)
        except Exception as error:  # a backend that does not serialise, or internals that have changed
            logger.warning("cannot keep the program %s for the next start: %r", name, error)
            return
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_bytes(content)
            part.replace(path)  # a reader sees all or nothing
        except OSError as error:
            part.unlink(missing_ok=True)
            logger.warning("cannot keep the program %s in %s: %s", name, self._folder, error)

    def _path(self, name: str, args: tuple[Any, ...]) -> Path:
        leaves, tree = jax.tree.flatten(args)
        arrays = [f"{leaf.dtype}{list(leaf.shape)} {getattr(leaf, 'sharding', None)}" for leaf in leaves]
        digest = hashlib.sha256()
        for fact in (*self._facts, name, str(tree), *arrays):
            digest.update(f"{len(fact)} {fact}\n".encode())
        return self._folder / f"{digest.hexdigest()[:40]}{SUFFIX}"


def prune(folder: Path, *, max_bytes: int = MAX_FOLDER_BYTES, max_unused_s: float = MAX_UNUSED_S) -> int:
    """Removes what has not been used for long, and the oldest past a size; returns how many files.

    Programs of an older version, or of other sizes, are never asked for again and would stay for ever.

    Args:
        folder: with our executables, the CPU's kernels and jax's own entries, whose time is that of their writing. No
            other file is touched: it may be somebody's home.
    """
    found: list[tuple[float, int, Path]] = []
    own = [path for path in (folder / "executables").glob("*") if path.suffix in (SUFFIX, ".part")]
    own += [path for path in (folder / "kernels").glob("kernels-*") if path.suffix in (".so", ".part")]
    for path in (*own, *(path for path in folder.glob("*-*") if JAX_ENTRY.fullmatch(path.name))):
        with contextlib.suppress(FileNotFoundError):  # another process removes, too
            info = path.lstat()
            found.append((info.st_mtime, info.st_size, path))
    oldest, kept, num_removed = time.time() - max_unused_s, 0, 0
    for modified, size, path in sorted(found, reverse=True):
        kept += size
        if modified >= oldest and kept <= max_bytes:
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove %s: %s", path, error)
            continue
        num_removed += 1
    return num_removed


def _environment(device: Any) -> list[str]:
    """All that a program depends on beside its model, its sizes and its arguments."""
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    return [
        f"jax {jax.__version__} jaxlib {metadata.version('jaxlib')}",
        f"{device.platform} {device.device_kind} {device.client.platform_version}",
        f"{jax.device_count()} devices, {jax.process_count()} processes",
        processor(),
        repr(sorted((name, os.environ.get(name)) for name in COMPILER_VARIABLES)),
        repr(sorted((name, repr(value)) for name, value in settings.items())),
        source_digest(),
    ]


@functools.cache
def processor() -> str:
    """What machine code for this processor may use: a file from another one could crash here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    seen = dict.fromkeys(line for line in lines if line.partition(":")[0].strip() in wanted)
    return "\n".join((platform.machine(), *seen))


@functools.cache
def source_digest() -> str:
    """SHA-256 over the source that programs are traced from: any change in it makes new programs.

    Cost: 3 ms for 0.3 MB.
    """
    root = Path(__file__).parents[2]
    paths = [path for package in ("jaxserve", "pallas_kernels") for path in (root / package).rglob("*.*")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.parent.name in HOST_PACKAGES or path.suffix not in SOURCE_SUFFIXES:
            continue
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _format(executable: jax.stages.Compiled, mesh: Mesh | None) -> bytes:
    """The file of an executable: magic, a line of JSON, the machine code, compressed (2.0 MB to 0.4 in 20 ms)."""
    unloaded: Any = executable._executable._unloaded_executable  # type: ignore[attr-defined]
    assert not executable._params.const_args, "constants that are arguments"
    assert not [*unloaded.unordered_effects, *unloaded.ordered_effects, *unloaded.host_callbacks], "effects"
    assert unloaded.mut is None, "mutable arrays"
    assert all(layout is None for layout in unloaded.dispatch_in_layouts), "layouts of its own"
    for sharding in unloaded.input_shardings:  # as the arguments say, which are at hand when it is loaded
        _describe_sharding(sharding, mesh)
    code = unloaded.xla_executable.serialize()
    header = {
        "name": unloaded.name,
        "committed": unloaded.committed,
        "kept_args": sorted(unloaded.kept_var_idx),
        "donated": [info.donated for info in jax.tree.leaves(executable.args_info)],
        "results": [_describe_array(aval) for aval in unloaded.output_avals],
        "result_parts": [_describe_sharding(sharding, mesh) for sharding in unloaded.output_shardings],
        "result_tree": describe_tree(jax.tree.unflatten(executable.out_tree, range(executable.out_tree.num_leaves))),
        "sha256": hashlib.sha256(code).hexdigest(),
    }
    return MAGIC + json.dumps(header).encode() + b"\n" + zlib.compress(code, 1)


def _parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    magic, body = content[: len(MAGIC)], content[len(MAGIC) :]
    line, newline, compressed = body.partition(b"\n")
    if magic != MAGIC or not newline:
        raise ValueError("it is no executable")
    header, code = json.loads(line), zlib.decompress(compressed)
    if hashlib.sha256(code).hexdigest() != header["sha256"]:
        raise ValueError("its checksum is wrong")
    return header, code


def _load(header: dict[str, Any], code: bytes, args: tuple[Any, ...], mesh: Mesh | None) -> Callable[..., Any]:
    """What `jax.experimental.serialize_executable.deserialize_and_load` makes, of a header and our own arguments."""
    from jax._src.interpreters import pxla

    leaves, in_tree = jax.tree.flatten((args, {}))
    whole = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    devices: Any = whole._internal_device_list
    client = next(iter(whole.device_set)).client
    avals = [ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves]
    kept = header["kept_args"]
    results = [ShapedArray(tuple(r["shape"]), jax.numpy.dtype(r["dtype"])) for r in header["results"]]
    unloaded = pxla.UnloadedMeshExecutable(
        xla_executable=client.deserialize_executable(code, executable_devices=devices),
        device_list=devices,
        backend=client,
        input_avals=[avals[place] for place in kept],
        input_shardings=[getattr(leaves[place], "sharding", None) or whole for place in kept],
        output_avals=results,
        output_shardings=[
            whole if parts is None else NamedSharding(whole.mesh, PartitionSpec(*parts))  # type: ignore[union-attr]
            for parts in header["result_parts"]
        ],
        committed=header["committed"],
        name=header["name"],
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(kept),
        mut=None,
        xla_in_layouts=[None] * len(kept),
        dispatch_in_layouts=[None] * len(kept),
        xla_out_layouts=[None] * len(results),
        all_args_info=None,
        pgle_profiler=None,
    )
    infos = [jax.stages.ArgInfo(aval, donated) for aval, donated in zip(avals, header["donated"], strict=True)]
    out_tree = jax.tree.structure(rebuild_tree(header["result_tree"]))
    args_info = jax.tree.unflatten(in_tree, infos)
    return jax.stages.Compiled(unloaded.load(), [], args_info, out_tree)


def _describe_sharding(sharding: Any, mesh: Mesh | None) -> list[str | None] | None:
    """How an array lies on the store's mesh, as JSON; None where it is whole."""
    if mesh is None:
        assert isinstance(sharding, SingleDeviceSharding), f"several devices: {sharding}"
        return None
    assert isinstance(sharding, NamedSharding), sharding
    assert sharding.mesh == mesh, f"another mesh: {sharding}"
    assert all(part is None or isinstance(part, str) for part in sharding.spec), sharding
    return list(sharding.spec) or None


def _describe_array(aval: Any) -> dict[str, Any]:
    assert not aval.weak_type, "a weak type"
    return {"shape": list(aval.shape), "dtype": str(aval.dtype)}


def describe_tree(tree: Any) -> Any:
    """A tree of tuples and of the dataclasses of `jaxserve.state`, as JSON.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(tree, int):
        return None
    if type(tree) is tuple:
        return [describe_tree(part) for part in tree]
    kind = type(tree).__name__
    if is_dataclass(tree) and getattr(state_types, kind, None) is type(tree):
        parts = ((f, getattr(tree, f.name)) for f in fields(tree))
        described = {f.name: describe_tree(part) if _is_node(f) else part for f, part in parts}
        return {"kind": kind, "fields": described}
    raise TypeError(f"a result of {type(tree)}, which is none of jaxserve.state's")


def rebuild_tree(described: Any) -> Any:
    """The tree that `describe_tree` was given, its leaves zeros."""
    if described is None:
        return 0
    if isinstance(described, list):
        return tuple(rebuild_tree(part) for part in described)
    kind = getattr(state_types, described["kind"])
    if not is_dataclass(kind):
        raise ValueError(f"{described['kind']} is no dataclass of jaxserve.state")
    values = {
        field.name: rebuild_tree(described["fields"][field.name])
        if _is_node(field)
        else described["fields"][field.name]
        for field in fields(kind)
    }
    return kind(**values)  # type: ignore[operator]


def _is_node(field: Any) -> bool:
    return not field.metadata.get("static", False)
