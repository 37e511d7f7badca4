"""What a client sees of a request's deltas."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ParameterError
from jaxserve.text.assembler import Continuations, TextAssembler, TextDelta
from jaxserve.text.bad_words import resolve_bad_words
from jaxserve.types import BeamSearchParams, Delta, SamplingParams, TokenLogprobs


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def chars(tokenizer, text: str) -> list[int]:
    """One token a byte."""
    byte_ids = {piece: i for i, piece in enumerate(tokenizer.token_bytes_table.pieces) if len(piece) == 1}
    return [byte_ids[bytes([byte])] for byte in text.encode()]


def run(assembler: TextAssembler, token_ids, sizes=(), **last) -> list[TextDelta]:
    """Feeds `token_ids` in deltas of the given sizes (then one each); the last delta carries `last`."""
    last = {"finish_reason": "length"} | last
    deltas, start = [], 0
    for size in itertools.chain(sizes, itertools.repeat(1)):
        stop = min(start + size, len(token_ids))
        final = last if stop == len(token_ids) else {}
        deltas.append(assembler.push(Delta(tuple(token_ids[start:stop]), **final)))
        if deltas[-1].finish_reason or final:
            return deltas
        start = stop
    raise AssertionError


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab<\né", min_size=1, max_size=20),
    stop=st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=6),
    min_tokens=st.integers(0, 6),
)
def test_text_tokens_and_reason_do_not_depend_on_the_deltas(byte_level, text, stop, sizes, min_tokens):
    token_ids = chars(byte_level, text)
    params = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=100)
    singly = run(TextAssembler(byte_level, params), token_ids)
    chunked = run(TextAssembler(byte_level, params), token_ids, sizes)
    expected, used, reason = text, len(token_ids), "length"
    for count in range(min_tokens + 1, len(token_ids) + 1):
        shown = bytes(text.encode()[:count]).decode(errors="ignore")
        found = [word for word in stop if shown.endswith(word)]
        if found and len(shown.encode()) == count:
            expected, used, reason = shown.removesuffix(max(found, key=len)), count, "stop"
            break
    for deltas in (singly, chunked):
        assert text_of(deltas) == expected
        assert sum(len(delta.token_ids) for delta in deltas) == used
        assert deltas[-1].finish_reason == reason
        assert (deltas[-1].stop_reason in stop) == (reason == "stop")


def test_a_stop_string_ends_everything(byte_level):
    assembler = TextAssembler(byte_level, SamplingParams(stop=["end"]))
    logprobs = tuple(TokenLogprobs(i, -1.0, 1) for i in chars(byte_level, "an end.."))
    delta = assembler.push(Delta(tuple(chars(byte_level, "an end..")), logprobs=logprobs))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("an ", "stop", "end")
    assert delta.token_ids == tuple(chars(byte_level, "an end"))
    assert delta.logprobs == logprobs[:6]
    assert assembler.push(Delta((1,), finish_reason="abort")) == TextDelta("")


def test_a_stop_string_can_be_shown(byte_level):
    assembler = TextAssembler(byte_level, SamplingParams(stop=["end"], include_stop_str_in_output=True))
    assert text_of(run(assembler, chars(byte_level, "an end.."))) == "an end"


@pytest.mark.parametrize(
    ("include", "skip", "expected"),
    [(False, True, "ab"), (True, True, "ab"), (False, False, "ab"), (True, False, "ab</s>")],
)
def test_the_stop_token_has_no_text_unless_asked_for(byte_level, include, skip, expected):
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
    token_ids = [*chars(byte_level, "ab"), byte_level.eos_token_id]
    deltas = run(TextAssembler(byte_level, params), token_ids, finish_reason="stop", stop_reason=7)
    assert byte_level.eos_token_id in byte_level.special_ids
    assert text_of(deltas) == expected
    assert deltas[-1].token_ids == (byte_level.eos_token_id,)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", 7)


def test_held_text_is_released_at_the_end(byte_level):
    for finish_reason in ("length", "abort", "error"):
        assembler = TextAssembler(byte_level, SamplingParams(stop=["endless"]))
        deltas = run(assembler, chars(byte_level, "the end"), finish_reason=finish_reason)
        assert [delta.text for delta in deltas[-4:]] == ["e ", "", "", "end"]


def test_an_unfinished_character_is_shown_at_the_end(byte_level):
    token_ids = chars(byte_level, "a世")[:-1]
    assert [delta.text for delta in run(TextAssembler(byte_level, SamplingParams()), token_ids)] == ["a", "", "\ufffd"]


def test_each_token_s_text_has_its_place(byte_level):
    token_ids = chars(byte_level, "a世bc")
    deltas = run(TextAssembler(byte_level, SamplingParams()), token_ids, (2, 3))
    assert [delta.text_starts for delta in deltas] == [(0, 1), (1, 1, 2), (3,)]


def test_min_tokens_suspends_stop_strings(byte_level):
    params = SamplingParams(stop=["ab"], min_tokens=4)
    assert text_of(run(TextAssembler(byte_level, params), chars(byte_level, "ababab"))) == "abab"


def test_without_detokenization_there_are_tokens_only(byte_level):
    deltas = run(TextAssembler(byte_level, SamplingParams(detokenize=False)), chars(byte_level, "ab"))
    assert (text_of(deltas), [delta.token_ids for delta in deltas]) == ("", [(i,) for i in chars(byte_level, "ab")])
    with pytest.raises(ParameterError, match="set detokenize to true"):
        TextAssembler(byte_level, SamplingParams(detokenize=False, stop=["a"]))


def test_the_prompt_decides_on_the_first_space(sentencepiece_like):
    the = ids_of(sentencepiece_like, "the")
    assembler = TextAssembler(sentencepiece_like, SamplingParams(), prompt_token_ids=the)
    assert text_of(run(assembler, the)) == " the"
    assert text_of(run(TextAssembler(sentencepiece_like, SamplingParams()), the)) == "the"


def test_bad_words_are_forbidden_at_the_start_and_after_a_space(tokenizer):
    sequences = resolve_bad_words(tokenizer, ["hello", " hello", "  "])
    assert len(sequences) == len(set(sequences))
    texts = {tokenizer.decode(sequence).strip() for sequence in sequences}
    assert texts == {"hello", ""}
    assert tuple(ids_of(tokenizer, "hello")) in sequences
    assert tuple(ids_of(tokenizer, " hello")) in sequences


def test_bad_words_are_bounded(byte_level):
    assert resolve_bad_words(byte_level, []) == ()
    with pytest.raises(ParameterError, match="at most 16 are allowed") as caught:
        resolve_bad_words(byte_level, ["曜" * 6])
    assert (caught.value.param, caught.value.code) == ("bad_words", "string_above_max_length")
    with pytest.raises(ParameterError, match="40 words make 80 token sequences") as caught:
        resolve_bad_words(byte_level, [f"x{i}" for i in range(40)])
    assert caught.value.code == "array_above_max_length"
    with pytest.raises(ParameterError, match="maximum length 64"):
        resolve_bad_words(byte_level, ["x"] * 65)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab<", min_size=1, max_size=12), min_size=1, max_size=4),
    stop=st.lists(st.text("ab<", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_continuations_are_each_what_an_assembler_of_its_own_makes(byte_level, texts, stop, data):
    """In whatever order and sizes their deltas come."""
    params = SamplingParams(n=len(texts), stop=stop, max_tokens=100)
    together = Continuations(byte_level, params)
    got: dict[int, list] = {index: [] for index in range(len(texts))}
    left = {index: chars(byte_level, text) for index, text in enumerate(texts)}
    while not together.finished:
        index = data.draw(st.sampled_from(sorted(left)))
        size = data.draw(st.integers(1, 4))
        ids, left[index] = left[index][:size], left[index][size:]
        reason = None if left[index] else "length"
        parts = together.push(Delta(tuple(ids), finish_reason=reason, index=index))
        assert all(part.index == index and len(part.gain.token_ids) <= 1 for part in parts)
        assert [part.cut for part in parts[:-1]] == [False] * len(parts[:-1])
        got[index] += [part.gain for part in parts]
        if reason or (parts and parts[-1].cut):
            del left[index]
    for index, text in enumerate(texts):
        alone = run(TextAssembler(byte_level, params), chars(byte_level, text))
        assert text_of(got[index]) == text_of(alone)
        assert sum(len(gain.token_ids) for gain in got[index]) == sum(len(gain.token_ids) for gain in alone)
        assert got[index][-1].finish_reason == alone[-1].finish_reason
        assert got[index][-1].stop_reason == alone[-1].stop_reason


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_abort_or_error_of_one_continuation_ends_those_that_are_open(byte_level, reason):
    together = Continuations(byte_level, SamplingParams(n=3, max_tokens=9))
    (letter,) = chars(byte_level, "a")
    together.push(Delta((letter,), finish_reason="stop", index=1))
    parts = together.push(Delta((letter,), finish_reason=reason, index=2))
    assert [(part.index, part.gain.finish_reason, part.cut) for part in parts] == [
        (2, reason, False),
        (0, reason, False),
    ]
    assert parts[0].gain.text == "a"
    assert together.finished
    assert together.push(Delta((letter,), index=0)) == []


def test_a_hypothesis_comes_whole_and_is_taken_token_by_token(byte_level):
    together = Continuations(byte_level, BeamSearchParams(beam_width=2, max_tokens=9))
    parts = together.push(Delta(tuple(chars(byte_level, "abc")), finish_reason="length", index=1))
    assert [part.gain.text for part in parts] == ["a", "b", "c"]
    assert [part.gain.finish_reason for part in parts] == [None, None, "length"]
    assert not together.finished
