"""Guarded text answers as the original does, and never loses its stand-ins."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ParameterError
from jaxserve.text.guard import Guard, GuardedText, join_guarded

GUARD = Guard("<|im_end|></think> [INST]")
TEXT = st.text('<>|/[]imendthk \n\t"\\éß🙂X', max_size=16)
PART = st.text("<>|/imn \n", max_size=3)

QUESTIONS = {
    "eq": lambda s, p: s == p,
    "ne": lambda s, p: s != p,
    "reflected_eq": lambda s, p: p == s,
    "lt": lambda s, p: s < p,
    "hash": lambda s, p: hash(s),
    "in": lambda s, p: p in s,
    "len": lambda s, p: len(s),
    "bool": lambda s, p: bool(s),
    "startswith": lambda s, p: s.startswith(p),
    "startswith_several": lambda s, p: s.startswith((p, "x")),
    "endswith": lambda s, p: s.endswith(p, 1),
    "find": lambda s, p: s.find(p),
    "rfind": lambda s, p: s.rfind(p),
    "count": lambda s, p: s.count(p),
    "dict_lookup": lambda s, p: {"<im>": 1, p: 2}.get(s),
    "list_search": lambda s, p: s in ["<im>", p],
}
TRANSFORMS = {
    "index": lambda s, p: s[len(p) % len(s)] if s else s,
    "slice": lambda s, p: s[len(p) : -1],
    "reverse": lambda s, p: s[::-1],
    "iter": lambda s, p: list(s),
    "add": lambda s, p: s + p,
    "radd": lambda s, p: p + s,
    "strip": lambda s, p: s.strip(),
    "strip_chars": lambda s, p: s.strip(p),
    "lstrip": lambda s, p: s.lstrip("\n"),
    "rstrip": lambda s, p: s.rstrip(p),
    "split": lambda s, p: s.split(),
    "split_once": lambda s, p: s.split(None, 1),
    "splitlines": lambda s, p: s.splitlines(),
    "upper": lambda s, p: s.upper(),
    "lower": lambda s, p: s.lower(),
    "capitalize": lambda s, p: s.capitalize(),
    "removeprefix": lambda s, p: s.removeprefix(p),
    "removesuffix": lambda s, p: s.removesuffix(p) if p else s,
    "replace": lambda s, p: s.replace(p, "i<"),
    "replace_once": lambda s, p: s.replace(p, "", 1),
    "str": lambda s, p: str(s),
    "format": lambda s, p: f"{s}",
    "join": lambda s, p: p.join([s, s]),
}
WITH_SEPARATOR = {
    "split": lambda s, p: s.split(p),
    "split_last": lambda s, p: s.split(p)[-1].lstrip("\n"),
    "split_max": lambda s, p: s.split(p, 1),
    "rsplit": lambda s, p: s.rsplit(p, 1),
    "partition": lambda s, p: s.partition(p),
    "rpartition": lambda s, p: s.rpartition(p),
}


def reveal(value):
    if isinstance(value, list | tuple):
        return type(value)(reveal(item) for item in value)
    return GUARD.reveal(value) if isinstance(value, str) else value


@pytest.mark.parametrize("name", QUESTIONS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT, part=PART, guard_part=st.booleans())
def test_questions_are_answered_as_for_the_original(name, text, part, guard_part):
    asked = GUARD.protect(part) if guard_part else part
    assert QUESTIONS[name](GUARD.protect(text), asked) == QUESTIONS[name](text, part)


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT, part=PART)
def test_transformed_text_is_that_of_the_original(name, text, part):
    assert reveal(TRANSFORMS[name](GUARD.protect(text), part)) == TRANSFORMS[name](text, part)


@pytest.mark.parametrize("name", WITH_SEPARATOR)
@settings(max_examples=60, deadline=None)
@given(text=TEXT, part=PART.filter(bool))
def test_separated_text_is_that_of_the_original(name, text, part):
    assert reveal(WITH_SEPARATOR[name](GUARD.protect(text), part)) == WITH_SEPARATOR[name](text, part)


@settings(max_examples=60, deadline=None)
@given(before=TEXT, text=TEXT, sep=PART.filter(bool))
def test_a_template_s_own_text_is_left_unguarded_in_a_mixture(before, text, sep):
    mixed = before + GUARD.protect(text)
    assert str.startswith(mixed, before)
    assert reveal(mixed.split(sep)) == (before + text).split(sep)


def flat(value) -> str:
    """All characters of nested strings, stand-ins as they are."""
    return str.__str__("" + value) if isinstance(value, str) else "".join(map(flat, value))


@pytest.mark.parametrize("name", [*TRANSFORMS, *WITH_SEPARATOR])
@settings(max_examples=30, deadline=None)
@given(text=st.text('<>|/[]imendthk \n\t"\\é🙂X', max_size=16))
def test_no_transform_gives_back_a_character_in_the_open(name, text):
    """The separator is a space: every letter of a control token in the result is the client's, so hidden."""
    result = (TRANSFORMS | WITH_SEPARATOR)[name](GUARD.protect(text), " ")
    put_in = "i<" if name == "replace" else ""
    assert not set("".join(str.__iter__(flat(result)))) & (set("<>|im_end/thkINST[]") - set(put_in))


@settings(max_examples=60, deadline=None)
@given(value=st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)))
def test_json_of_guarded_values_reveals_to_the_json_of_the_values(value):
    guarded = GUARD.protect(value)
    for options in ({}, {"indent": 2}, {"sort_keys": True}):
        expected = json.dumps(value, ensure_ascii=False, **options)
        assert reveal(json.dumps(guarded, ensure_ascii=False, **options)) == expected


def test_joined_pieces_stay_guarded_and_plain_ones_plain():
    assert type(join_guarded(["a", "b"])) is str
    joined = join_guarded(["<a>", GUARD.protect("<b>")])
    assert isinstance(joined, GuardedText)
    assert "<b>" in joined
    assert str.find(joined, "<b>") == -1


def test_another_block_is_taken_where_the_text_uses_the_first():
    text = "private \U00100000\U00100003 <|im_end|>"
    other = GUARD.clear_of(["plain", text])
    assert other is not GUARD
    assert other.reveal(other.hide(text)) == text
    assert other.mark not in text
    assert GUARD.clear_of(["nothing private \ue000"]) is GUARD


def test_a_text_that_uses_up_the_private_plane_is_refused():
    with pytest.raises(ParameterError, match="private-use"):
        GUARD.clear_of(["".join(chr(code) for code in range(0x100000, 0x10FFFE, 5))])
