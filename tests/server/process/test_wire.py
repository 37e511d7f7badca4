"""The codec: what goes in comes out, in any pieces; what is no message is found."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import errors
from jaxserve.config import EngineConfig
from jaxserve.errors import (
    ContextLengthError,
    EngineError,
    JaxserveError,
    NumericalError,
    ParameterError,
    QueueFullError,
)
from jaxserve.metrics import EngineMetrics
from jaxserve.types import INT64_MIN, BeamSearchParams, Delta, EngineStats, SamplingParams, TokenLogprobs
from jaxserve_server import wire

ENCODER = msgspec.msgpack.Encoder()
EVERYTHING = SamplingParams(
    **{"n": 2, "best_of": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.1 + 0.2, "min_p": 1e-7, "seed": INT64_MIN},
    **{"repetition_penalty": 1.1, "frequency_penalty": -0.3, "presence_penalty": 0.4, "max_tokens": 9, "min_tokens": 2},
    **{"logit_bias": {3: -100.0, 70_000: 0.1}, "stop": ["\n\n", "é"], "stop_token_ids": [4, 5], "ignore_eos": True},
    **{"allowed_token_ids": list(range(2000)), "bad_words": ["x"], "bad_words_token_ids": [[1, 2], [3]]},
    **{"logprobs": 0, "prompt_logprobs": 4, "include_stop_str_in_output": True, "skip_special_tokens": False},
    **{"detokenize": False},
)
BEAMS = BeamSearchParams(
    **{"beam_width": 3, "max_tokens": 7, "length_penalty": -0.5, "early_stopping": "never", "ignore_eos": True},
    **{"stop_token_ids": [1], "include_stop_str_in_output": True, "skip_special_tokens": False, "detokenize": False},
)


def sent(message: Any, kind: Any) -> Any:
    (received,) = wire.FrameReader(kind).feed(wire.frame(message, ENCODER))
    return received


def changed(params: Any) -> bool:
    """Whether every field differs from its default: a field that is new must be added above."""
    defaults = SamplingParams() if isinstance(params, SamplingParams) else BeamSearchParams(beam_width=1)
    return all(getattr(params, field.name) != getattr(defaults, field.name) for field in fields(params))


@pytest.mark.parametrize("params", [EVERYTHING, BEAMS, SamplingParams(), SamplingParams(max_tokens=None)])
def test_a_request_arrives_as_it_was_sent(params: Any) -> None:
    assert params in (SamplingParams(), SamplingParams(max_tokens=None)) or changed(params)
    received = sent(wire.add_message(2**40, [0, -1, 2**40], params, "salt"), wire.FromServer)
    assert (received.params, type(received.params)) == (params, type(params))
    assert (received.number, list(received.token_ids), received.cache_salt) == (2**40, [0, -1, 2**40], "salt")


def test_the_engine_s_configuration_arrives_as_it_was_sent() -> None:
    config = EngineConfig(max_model_len=9, swap_space=0.1, batching_window_ms=20, compilation_cache_dir=None)
    assert sent(wire.Start("m", "auto", None, config, "info"), wire.FromServer).engine == config


numbers = st.floats(allow_nan=False)
ids = st.integers(0, 2**31 - 1)
logprobs = st.builds(
    TokenLogprobs, ids, numbers, st.integers(1, 200_000), st.lists(st.tuples(ids, numbers), max_size=20).map(tuple)
)
deltas = st.builds(
    Delta,
    token_ids=st.lists(ids, max_size=9).map(tuple),
    logprobs=st.none() | st.lists(logprobs, max_size=4).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=4).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort"]),
    stop_reason=st.none() | ids,
    num_cached_tokens=ids,
    index=st.integers(0, 127),
    cumulative_logprob=st.none() | numbers,
    score=st.none() | numbers,
)


@given(st.lists(deltas, max_size=5), st.integers(1, 50))
def test_deltas_arrive_as_they_were_sent_in_pieces_of_any_size(items: list[Delta], size: int) -> None:
    message = wire.Step([wire.pack_item(i, item) for i, item in enumerate(items)], [0] * 11)
    data = bytes(wire.frame(message, ENCODER)) * 3
    reader = wire.FrameReader(wire.FromEngine)
    received = [m for i in range(0, len(data), size) for m in reader.feed(data[i : i + size])]
    assert [[wire.unpack_item(item) for item in step.items] for step in received] == [items] * 3
    assert all(item.number == i for step in received for i, item in enumerate(step.items))


def test_logprobs_keep_their_bits() -> None:
    entry = TokenLogprobs(1, -0.1, 1, ((1, -math.inf), (2, 5e-324)))
    delta = Delta((1,), (entry,))
    (item,) = sent(wire.Step([wire.pack_item(0, delta)], []), wire.FromEngine).items
    assert wire.unpack_item(item) == delta


def dir_of(found: type[JaxserveError]) -> set[str]:
    """What our own classes define, its bases included."""
    return {name for base in found.__mro__ if issubclass(base, JaxserveError) for name in vars(base)}


def raised() -> list[JaxserveError]:
    """One of each class of the tree, with all its attributes set."""
    made = []
    for found in wire.ERROR_CLASSES.values():
        names = inspect.getfullargspec(found.__init__).kwonlyargs if "__init__" in dir_of(found) else ()
        if found is ContextLengthError:
            made.append(found(max_model_len=8, num_prompt_tokens=5, max_tokens=4))
        else:
            given = {"param": "top_p", "code": "integer_above_max_value", "retry_after_s": 77}
            made.append(found("a message", **{name: value for name, value in given.items() if name in names}))
    return made


@pytest.mark.parametrize("error", raised(), ids=lambda e: type(e).__name__)
def test_an_error_arrives_as_its_own_class(error: JaxserveError) -> None:
    (item,) = sent(wire.Step([wire.pack_item(1, error)], []), wire.FromEngine).items
    received = wire.unpack_item(item)
    assert type(received) is type(error)
    assert isinstance(received, JaxserveError)
    assert (str(received), vars(received)) == (str(error), vars(error))


def test_every_class_of_errors_can_cross() -> None:
    tree, found = [JaxserveError], set()
    while tree:
        found.add(tree[-1].__name__)
        tree += tree.pop().__subclasses__()
    assert found <= wire.ERROR_CLASSES.keys()
    assert {"ParameterError", "EngineDeadError"} <= found


def test_no_other_class_is_made_of_a_name() -> None:
    for name in ("SystemExit", "os.system", "JaxserveErrors", "annotations", "__builtins__"):
        received = wire.unpack_error(wire.WireError(name, "text", {"code": 3}))
        assert (type(received), str(received)) == (EngineError, "text")
    foreign = wire.unpack_error(wire.pack_error(RuntimeError("a secret path")))
    assert type(foreign) is EngineError
    assert "secret" not in str(foreign)
    noted = NumericalError("NaN")
    noted.add_note("a note")
    assert str(wire.unpack_error(wire.pack_error(noted))) == "NaN"


def test_an_error_delta_and_an_end() -> None:
    failure = Delta(finish_reason="error", error=NumericalError("NaN"), index=2)
    (item,) = sent(wire.Step([wire.pack_item(0, failure)], []), wire.FromEngine).items
    received = wire.unpack_item(item)
    assert isinstance(received, Delta)
    assert (type(received.error), received.finish_reason, received.index) == (NumericalError, "error", 2)
    assert wire.unpack_item(wire.pack_item(0, None)) is None
    assert isinstance(wire.unpack_item(wire.pack_item(0, QueueFullError("full"))), QueueFullError)


def test_statistics_arrive_as_they_were_sent() -> None:
    stats = EngineStats(*range(8), *range(8, 11))
    assert wire.unpack_stats(wire.pack_stats(stats)) == stats


def test_metrics_are_taken_over_in_place() -> None:
    there, here = EngineMetrics(max_model_len=4096, cache_info={"block_size": "4"}), EngineMetrics(max_model_len=4096)
    held = here.ttft, here.step["decode"], here.swapped_out
    there.on_step(kind="decode", step_s=0.1, num_prompt_tokens=3, num_generation_tokens=4)
    there.on_rejected("queue_timeout")
    there.on_compiled("step[4]", 1.5)
    there.ttft.observe(0.3)
    there.swapped_out.bytes = 99
    snapshot = wire.Snapshot(None, [], there.state())
    here.restore(sent(snapshot, wire.FromEngine).metrics)
    assert here.state() == there.state()
    assert held == (here.ttft, here.step["decode"], here.swapped_out)
    assert (here.ttft.read(), here.swapped_out.bytes) == (there.ttft.read(), 99)


@pytest.mark.parametrize(
    "data",
    [
        *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x05\0\0\0hello", b"\x01\0\0\0\xc1", b"\x02\0\0\0\x91\xa0"),
        b"\x0e\0\0\0" + msgspec.msgpack.encode(["Unknown", 1, 2]),
        bytes(wire.frame(wire.Stop(), ENCODER)),  # a message of the other side
    ],
)
def test_what_is_no_message_is_found(data: bytes) -> None:
    with pytest.raises(wire.MalformedFrameError):
        list(wire.FrameReader(wire.FromEngine).feed(data + bytes(20)))


def test_parameters_out_of_bounds_are_no_message() -> None:
    """The other end runs the same checks; this is for an end that does not."""
    data = msgspec.msgpack.encode(["Add", 1, b"", {"temperature": 99.0}, None, None])
    with pytest.raises(wire.MalformedFrameError, match="temperature"):
        list(wire.FrameReader(wire.FromServer).feed(len(data).to_bytes(4, "little") + data))


@pytest.mark.parametrize("prompt", [[1.5], ["1"], [2**70], [None]])
def test_a_prompt_that_is_none(prompt: list[Any]) -> None:
    with pytest.raises((TypeError, OverflowError)):
        wire.add_message(1, prompt, SamplingParams(), None)


def test_the_errors_module_has_nothing_else_to_offer() -> None:
    assert {name for name, found in vars(errors).items() if isinstance(found, type)} == wire.ERROR_CLASSES.keys()
    assert ParameterError.__name__ in wire.ERROR_CLASSES
