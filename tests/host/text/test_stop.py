"""Stop strings: what is shown is the text up to the cut, for all chunkings."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.stop import StopChecker

SMALL = st.text("ab\n<", max_size=24)
STOPS = st.lists(st.text("ab\n<", min_size=1, max_size=5), min_size=1, max_size=4)


def first_cut(text: str, stop: list[str], start: int = 0) -> tuple[int, int, str] | None:
    """Start, end and name of the stop string that is complete first; of several, the longest."""
    for end in range(start + 1, len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            word = max(found, key=len)
            return end - len(word), end, word
    return None


def run(text: str, stop: list[str], splits, **options) -> tuple[str, str | None, list[str]]:
    checker = StopChecker(stop, **options)
    borders = sorted({0, len(text), *(split for split in splits if split <= len(text))})
    shown: list[str] = []
    for begin, end in itertools.pairwise(borders):
        piece = checker.push(text[begin:end])
        shown.append(piece.text)
        if piece.stop is not None:
            return "".join(shown), piece.stop, shown
    shown.append(checker.finish())
    return "".join(shown), None, shown


@settings(max_examples=400, deadline=None)
@given(text=SMALL, stop=STOPS, splits=st.sets(st.integers(0, 24)), include=st.booleans())
def test_shown_text_is_the_text_up_to_the_cut(text, stop, splits, include):
    shown, found, _ = run(text, stop, splits, include_stop=include)
    cut = first_cut(text, stop)
    if cut is None:
        assert (shown, found) == (text, None)
    else:
        start, end, word = cut
        assert (shown, found) == (text[: end if include else start], word)


@settings(max_examples=200, deadline=None)
@given(text=SMALL, word=st.text("ab\n<", min_size=1, max_size=5))
def test_one_stop_string_splits_as_str_split_does(text, word):
    shown, _, _ = run(text, [word], range(len(text)))
    assert shown == text.split(word)[0]


@settings(max_examples=200, deadline=None)
@given(text=SMALL, stop=STOPS)
def test_nothing_is_held_longer_than_needed(text, stop):
    """After each character, exactly the longest end of the text that begins a stop string is held back."""
    if first_cut(text, stop):
        return
    checker, shown = StopChecker(stop), ""
    for end in range(1, len(text) + 1):
        shown += checker.push(text[end - 1]).text
        prefixes = {word[:n] for word in stop for n in range(1, len(word))}
        held = max((n for n in range(end + 1) if text[end - n : end] in prefixes), default=0)
        assert len(shown) == end - held


def test_a_part_of_a_stop_string_never_leaks():
    """vLLM #57052 and others: "<|im_" was shown before "<|im_end|>" was complete."""
    checker = StopChecker(["<|im_end|>"])
    assert [checker.push(piece).text for piece in ("Hi", "<", "|im", "_end|")] == ["Hi", "", "", ""]
    assert checker.push(">and more").stop == "<|im_end|>"


def test_held_back_text_is_released_when_it_turns_out_harmless():
    checker = StopChecker(["<|im_end|>"])
    assert checker.push("a <|im").text == "a "
    assert checker.push("possible").text == "<|impossible"
    assert checker.push("\n<").text == "\n"
    assert checker.finish() == "<"
    assert checker.finish() == ""


def test_unarmed_text_ends_nothing_but_may_begin_a_stop_string():
    checker = StopChecker(["end"])
    assert checker.push("the end e", armed=False).text == "the end "
    piece = checker.push("nd")
    assert (piece.text, piece.stop) == ("", "end")


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["b", "abc"], "xabc", ("xa", "b")),  # complete first wins, however the text is chunked
        (["bc", "abc"], "xabc", ("x", "abc")),  # complete together: the one that starts first
        (["aab"], "aaab", ("a", "aab")),
        (["abab", "ba"], "ababa", ("a", "ba")),
    ],
)
def test_which_of_several_wins(stop, text, expected):
    for splits in (range(len(text)), ()):
        assert run(text, stop, splits)[:2] == expected
