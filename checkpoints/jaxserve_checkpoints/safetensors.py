"""Reading safetensors files: headers that are not believed, and bytes through mmap.

Owns the file format and the sharded index. It knows nothing of models: which tensors there should be, and
where they go, is `load`'s and `names`' business. Everything a header says is checked against the file's
real size before a byte of data is touched.

Source: https://huggingface.co/docs/safetensors (format: u64 header size, JSON header, data without holes).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import ml_dtypes
import msgspec
import numpy as np

from jaxserve.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000  # the bound of the reference implementation
MAX_INDEX_BYTES = 100_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS: Mapping[str, np.dtype] = MappingProxyType(
    {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
)
# Bits an item of every dtype of the format; those not in FLOATS are measured, never read.
_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
    | {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
    | {"F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}
)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file.

    Attributes:
        dtype: the format's code, such as "BF16".
        start, stop: where its bytes are, counted from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's `model.safetensors`, or of the shards of its index, by name.

    Raises:
        WeightsError: no safetensors weights, or a file or index that does not hold what it declares.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise WeightsError(_no_weights(folder))
    weight_map = _read_index(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise WeightsError(f"{INDEX_FILE} names {shard!r}, which is not in {folder.name}/. Download it again.")
        for name, info in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise WeightsError(
                    f"{shard} holds {name!r}, which {INDEX_FILE} places in {weight_map.get(name, 'no file')!r}. "
                    "Index and shards are not of one checkpoint."
                )
            tensors[name] = info
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise WeightsError(
            f"{INDEX_FILE} places {absent[0]!r} in {weight_map[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors). Index and shards are not of one checkpoint."
        )
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, each within the file's real size, without overlap or hole.

    Raises:
        WeightsError: the file is not safetensors, is truncated, has bytes too many, or its header lies.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise WeightsError(
                f"{path.name}: the header claims {length} bytes; the file has {file_bytes} and the bound is "
                f"{MAX_HEADER_BYTES}. The file is truncated or is not safetensors."
            )
        header = _parse_header(path, file.read(length))
    tensors = {}
    data_start = expected_start = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        start, stop = (data_start + offset for offset in entry.data_offsets)
        _check_entry(path, name, entry, start, expected_start)
        tensors[name] = TensorInfo(name, entry.dtype, tuple(entry.shape), path, start, stop)
        expected_start = stop
    if expected_start != file_bytes:
        state = "truncated" if expected_start > file_bytes else "followed by bytes that belong to no tensor"
        raise WeightsError(
            f"{path.name} has {file_bytes} bytes and its header describes {expected_start}: it is {state}. "
            "Download it again."
        )
    return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, _Entry]:
    try:
        # The stdlib parser, because it can be made to notice a name that is given twice.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        return msgspec.convert(header, dict[str, _Entry])
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise WeightsError(f"{path.name}: the header is not valid: {str(error)[:200]}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_entry(path: Path, name: str, entry: _Entry, start: int, expected_start: int) -> None:
    where = f"{path.name}: tensor {name[:200]!r}"
    if entry.dtype not in _BITS:
        raise WeightsError(f"{where} has the unknown dtype {entry.dtype[:40]!r}.")
    if any(size < 0 for size in entry.shape):
        raise WeightsError(f"{where} has the impossible shape {entry.shape}.")
    begin, end = entry.data_offsets
    if start != expected_start:
        raise WeightsError(f"{where} begins at offset {begin}: it overlaps its neighbour or leaves a hole.")
    if (end - begin) * 8 != math.prod(entry.shape) * _BITS[entry.dtype]:
        raise WeightsError(f"{where} has {end - begin} bytes for shape {entry.shape} of {entry.dtype}.")


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to file, every file being a plain name of this folder."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES} bytes")
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise WeightsError(f"{path.name} is not a valid index: {str(error)[:200]}") from None
    for shard in set(weight_map.values()):
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise WeightsError(
                f"{path.name} names the file {shard[:200]!r}: only *.safetensors beside the index are read."
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    foreign = sorted(
        path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5"}
    )
    if foreign:
        return (
            f"{folder.name}/ has its weights only as {foreign[0]}, which jaxserve does not open (pickled files can "
            f"run code). Convert the model to safetensors: there must be a {SINGLE_FILE} or {INDEX_FILE}."
        )
    return f"{folder.name}/ holds no weights: there must be a {SINGLE_FILE} or {INDEX_FILE}."


class MappedFiles:
    """Files mapped into memory while their tensors are copied out; a context manager.

    A file that shrinks while it is mapped ends the process (SIGBUS); nothing but its owner can do that.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self._maps: dict[Path, mmap.mmap] = {}
        for path in {info.path for info in tensors.values()}:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        # A view that an exception's traceback still holds keeps its map open; the collector closes it later.
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                assert value is not None, "a view of a mapped file outlives the loading"

    def array(self, info: TensorInfo) -> np.ndarray:
        """A read-only view of a tensor's bytes in their file, as its dtype and shape."""
        view = np.frombuffer(self._maps[info.path], np.uint8, info.num_bytes, info.start)
        return view.view(FLOATS[info.dtype]).reshape(info.shape)

    def read_ahead(self, info: TensorInfo, part: np.ndarray) -> None:
        """Has the system fetch the pages that `part`, a view into a tensor's `array`, lies on; waits for none."""
        mapped = self._maps[info.path]
        if not part.size or not hasattr(mapped, "madvise"):
            return
        low, high = np.lib.array_utils.byte_bounds(part)
        begin = np.frombuffer(mapped, np.uint8, 1).ctypes.data
        page = (low - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, high - begin - page)
