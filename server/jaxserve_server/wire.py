"""What the server and the engine's process say to each other: typed messages in frames of msgpack.

A frame is a length of four bytes, little endian, and one message. Both ends run the same version. Only types
that are named here are ever made of what was read: an error crosses by its class' name. Knows no sockets.
"""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Final

import msgspec
from msgspec import Struct

from jaxserve import errors
from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine.stream import Item
from jaxserve.errors import ContextLengthError, EngineError, JaxserveError
from jaxserve.types import BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams, TokenLogprobs

LENGTH_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 2**30  # the logprobs of a prompt of 131,072 tokens take 40 MB; more than this is no frame

ERROR_CLASSES: Final = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, JaxserveError)
}
_STATS_FIELDS: Final = tuple(field.name for field in fields(EngineStats))


class MalformedFrameError(Exception):
    """The other end sent what is no message. Nothing after it can be understood."""


class WireError(Struct, array_like=True):
    """A `JaxserveError`: its class by name, what it says, and its attributes."""

    name: str
    message: str
    attributes: dict[str, str | int | None]


class WireLogprobs(Struct, array_like=True):
    """A `TokenLogprobs`."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class WireItem(Struct, array_like=True):
    """An item of the stream `number`: a `Delta`, or its request's error where there is one but no finish_reason.

    `is_end` says that nothing follows.
    """

    number: int
    token_ids: tuple[int, ...] = ()
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: list[WireLogprobs] | None = None
    prompt_logprobs: list[WireLogprobs | None] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None
    error: WireError | None = None
    is_end: bool = False


# From the server.


class Start(Struct, tag=True, array_like=True):
    """The first message: what to serve."""

    model: str
    dtype: str
    revision: str | None
    engine: EngineConfig
    log_level: str


class Add(Struct, tag=True, array_like=True):
    """A request, of one kind or the other. `prompt` holds native int64 ids, unchecked: the engine knows its vocabulary.

    `number` names it from here on; it is never used again.
    """

    number: int
    prompt: bytes
    sampling: SamplingParams | None
    beam: BeamSearchParams | None
    cache_salt: str | None

    @property
    def params(self) -> SamplingParams | BeamSearchParams:
        params = self.sampling or self.beam
        assert params is not None
        return params

    @property
    def token_ids(self) -> Sequence[int]:
        return array.array("q", self.prompt)


def add_message(
    number: int, token_ids: Sequence[int], params: SamplingParams | BeamSearchParams, cache_salt: str | None
) -> Add:
    """The request as it is sent.

    Raises:
        TypeError, OverflowError: token ids that are no integers, or wider than 64 bits.
    """
    prompt = array.array("q", token_ids).tobytes()
    if isinstance(params, SamplingParams):
        return Add(number, prompt, params, None, cache_salt)
    return Add(number, prompt, None, params, cache_salt)


class Abort(Struct, tag=True, array_like=True):
    number: int
    reason: FinishReason
    index: int | None


class ResetPrefixCache(Struct, tag=True, array_like=True):
    call: int


class Refresh(Struct, tag=True, array_like=True):
    """Asks for a `Snapshot` now."""

    call: int


class Stop(Struct, tag=True, array_like=True):
    pass


# From the engine's process.


class ModelRead(Struct, tag=True, array_like=True):
    """The weights are in place; the engine is not ready yet."""

    folder: str
    config: ModelConfig
    generation_defaults: dict[str, int | float]


class Ready(Struct, tag=True, array_like=True):
    limits: EngineLimits
    system_fingerprint: str
    stats: list[int | float]
    metrics: dict[str, Any]


class Step(Struct, tag=True, array_like=True):
    """What a step, or a message, gave to all streams."""

    items: list[WireItem]
    stats: list[int | float]


class Snapshot(Struct, tag=True, array_like=True):
    """The engine's numbers, once a second and upon `Refresh`, whose `call` it answers."""

    call: int | None
    stats: list[int | float]
    metrics: dict[str, Any]


class PrefixCacheReset(Struct, tag=True, array_like=True):
    call: int
    num_blocks: int


class Failed(Struct, tag=True, array_like=True):
    """The engine cannot start, or has ended: the last message."""

    error: WireError


FromServer = Start | Add | Abort | ResetPrefixCache | Refresh | Stop
FromEngine = ModelRead | Ready | Step | Snapshot | PrefixCacheReset | Failed


def frame(message: FromServer | FromEngine, encoder: msgspec.msgpack.Encoder) -> bytearray:
    """`message` as it is sent.

    Raises:
        ValueError, TypeError, OverflowError: it holds what msgpack cannot say, such as half of a surrogate pair.
    """
    buffer = bytearray(LENGTH_BYTES)
    encoder.encode_into(message, buffer, LENGTH_BYTES)
    buffer[:LENGTH_BYTES] = (len(buffer) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return buffer


class FrameReader:
    """Messages from bytes that come in any pieces.

    Args:
        kind: the union of the messages that may come.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes.

        Raises:
            MalformedFrameError: a length out of bounds, or what is none of the messages.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
            if not 0 < length <= MAX_FRAME_BYTES:
                raise MalformedFrameError(f"A frame of {length} bytes: 1 to {MAX_FRAME_BYTES} are possible.")
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            try:
                with memoryview(self._buffer) as view:
                    message = self._decoder.decode(view[LENGTH_BYTES:end])
            except (msgspec.MsgspecError, ValueError) as exc:
                raise MalformedFrameError(f"A frame of {length} bytes is no message: {exc}") from exc
            del self._buffer[:end]
            yield message


def pack_stats(stats: EngineStats) -> list[int | float]:
    return [getattr(stats, name) for name in _STATS_FIELDS]


def unpack_stats(values: Sequence[int | float]) -> EngineStats:
    return EngineStats(**dict(zip(_STATS_FIELDS, values, strict=True)))  # pyright: ignore[reportArgumentType]


def pack_error(error: BaseException) -> WireError:
    """An error that is not jaxserve's own crosses as an EngineError without details."""
    if not isinstance(error, JaxserveError):
        return WireError("EngineError", f"The engine failed with {type(error).__name__}.", {})
    attributes = {name: held for name, held in vars(error).items() if held is None or isinstance(held, str | int)}
    return WireError(type(error).__name__, str(error), attributes)


def unpack_error(wire: WireError) -> JaxserveError:
    """The error, of its own class if there is one of this name."""
    found = ERROR_CLASSES.get(wire.name, EngineError)
    attributes: dict[str, Any] = wire.attributes if found.__name__ == wire.name else {}
    if found is ContextLengthError:  # its message is made of its numbers
        return ContextLengthError(**{name: attributes[name] for name in attributes.keys() - {"param"}})
    return found(wire.message, **attributes)


def pack_item(number: int, item: Item) -> WireItem:
    if item is None:
        return WireItem(number, is_end=True)
    if not isinstance(item, Delta):
        return WireItem(number, error=pack_error(item))
    return WireItem(
        number,
        item.token_ids,
        item.index,
        item.finish_reason,
        item.stop_reason,
        item.num_cached_tokens,
        None if item.logprobs is None else [_pack_logprobs(entry) for entry in item.logprobs],
        None if item.prompt_logprobs is None else [entry and _pack_logprobs(entry) for entry in item.prompt_logprobs],
        item.cumulative_logprob,
        item.score,
        None if item.error is None else pack_error(item.error),
    )


def unpack_item(wire: WireItem) -> Item:
    if wire.is_end:
        return None
    error = None if wire.error is None else unpack_error(wire.error)
    if error is not None and wire.finish_reason is None:
        return error
    return Delta(
        wire.token_ids,
        None if wire.logprobs is None else tuple(_unpack_logprobs(entry) for entry in wire.logprobs),
        None if wire.prompt_logprobs is None else tuple(e and _unpack_logprobs(e) for e in wire.prompt_logprobs),
        wire.finish_reason,
        wire.stop_reason,
        wire.num_cached_tokens,
        error,
        wire.index,
        wire.cumulative_logprob,
        wire.score,
    )


def _pack_logprobs(entry: TokenLogprobs) -> WireLogprobs:
    return WireLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top)


def _unpack_logprobs(wire: WireLogprobs) -> TokenLogprobs:
    return TokenLogprobs(wire.token_id, wire.logprob, wire.rank, wire.top)
