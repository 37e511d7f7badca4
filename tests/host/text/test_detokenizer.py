"""The pieces of a stream join to the text that a plain decoder makes of all tokens."""

from __future__ import annotations

import codecs
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.detokenizer import Detokenizer

REPLACEMENT = "\ufffd"


def stream(tokenizer, ids, splits=None, **options) -> list[str]:
    """The pieces that `ids` come out in, cut into chunks at `splits` (default: one token each)."""
    detokenizer = Detokenizer(tokenizer.token_bytes_table, **options)
    borders = sorted({0, len(ids), *(splits if splits is not None else range(len(ids)))})
    pieces = [detokenizer.push(ids[start:stop]) for start, stop in itertools.pairwise(borders)]
    return [*pieces, detokenizer.finish()]


def mixed_oracle(tokenizer, ids, skip_special_tokens) -> str:
    """SentencePiece decoding, written from its description: join, one U+FFFD for each ill-formed byte."""
    codecs.register_error("each-byte", lambda exc: (REPLACEMENT * (exc.end - exc.start), exc.end))
    data = b""
    runs: list[bytes | str] = []
    for token_id in ids:
        token = tokenizer.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in tokenizer.special_ids):
            continue
        if len(token) == 6 and token.startswith("<0x"):
            data = runs.pop() if runs and isinstance(runs[-1], bytes) else b""
            runs.append(data + bytes.fromhex(token[3:5]))
        else:
            runs.append(token.replace("▁", " "))
    text = "".join(run if isinstance(run, str) else run.decode("utf-8", "each-byte") for run in runs)
    return text.removeprefix(" ")


def oracle(tokenizer, ids, skip_special_tokens) -> str:
    if tokenizer.token_bytes_table.byte_ids:
        return mixed_oracle(tokenizer, ids, skip_special_tokens)
    known = [i for i in ids if i <= tokenizer.max_token_id]
    return tokenizer._backend.decode(known, skip_special_tokens=skip_special_tokens)


@pytest.fixture(scope="module")
def pools(tokenizer) -> list[list[int]]:
    """Ids to draw from: all (and some beyond), special ones, and those of single odd bytes."""
    table = tokenizer.token_bytes_table
    odd = [i for i, piece in enumerate(table.pieces) if len(piece) <= 2 and any(byte >= 0x80 for byte in piece)]
    return [list(range(tokenizer.max_token_id + 40)), sorted(table.special_ids), odd]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_join_to_the_whole_for_every_split(tokenizer, pools, data, skip):
    ids = data.draw(st.lists(st.one_of([st.sampled_from(pool) for pool in pools]), max_size=24))
    splits = data.draw(st.sets(st.integers(0, len(ids))))
    expected = oracle(tokenizer, ids, skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == expected
    assert "".join(stream(tokenizer, ids, splits, skip_special_tokens=skip)) == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_text_comes_back_and_no_piece_is_a_replacement(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    pieces = stream(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer._backend.decode(ids, skip_special_tokens=False)
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_every_byte_split_of_characters_is_held_until_whole(byte_level):
    text = "é世🙂"
    byte_ids = {piece: i for i, piece in enumerate(byte_level.token_bytes_table.pieces) if len(piece) == 1}
    ids = [byte_ids[bytes([byte])] for byte in text.encode()]
    assert [piece for piece in stream(byte_level, ids) if piece] == list(text)


def test_unfinished_character_is_shown_as_full_decoding_does(tokenizer, pools):
    table = tokenizer.token_bytes_table
    lead = next(i for i in pools[2] if table.pieces[i] == b"\xf0")
    for count in (1, 2):
        assert "".join(stream(tokenizer, [lead] * count)) == tokenizer._backend.decode([lead] * count)
    assert stream(tokenizer, [lead]) == ["", REPLACEMENT]


def test_well_formed_characters_survive_a_later_ill_formed_byte(sentencepiece_like):
    """`tokenizers` shows the whole run as U+FFFD; DecodeStream fails here with "Invalid prefix"."""
    ids = [sentencepiece_like.token_to_id(f"<0x{byte:02X}>") for byte in (*"界".encode(), 0xFF)]
    assert stream(sentencepiece_like, ids) == ["", "", "界", REPLACEMENT, ""]


def test_leading_space_is_dropped_only_at_the_start_of_a_text(sentencepiece_like):
    the = sentencepiece_like.token_to_id("▁the")
    bos = sentencepiece_like.bos_token_id
    assert "".join(stream(sentencepiece_like, [the, the])) == "the the"
    assert "".join(stream(sentencepiece_like, [the], prompt_token_ids=[the])) == " the"
    assert "".join(stream(sentencepiece_like, [the], prompt_token_ids=[bos])) == "the"
    shown = {"prompt_token_ids": [bos], "skip_special_tokens": False}
    assert "".join(stream(sentencepiece_like, [the], **shown)) == " the"


def test_prompt_that_ends_inside_a_character_is_never_given_again(byte_level):
    """vLLM #48853: the stream repeated the prompt when it ended in the middle of UTF-8."""
    byte_ids = {piece: i for i, piece in enumerate(byte_level.token_bytes_table.pieces) if len(piece) == 1}
    world = [byte_ids[bytes([byte])] for byte in "世".encode()]
    hello = byte_level.encode("hello", add_special_tokens=False)
    for cut in (1, 2):
        prompt = [*hello, *world[:cut]]
        assert "".join(stream(byte_level, [*world[cut:], *hello], prompt_token_ids=prompt)) == "世hello"
        assert "".join(stream(byte_level, hello, prompt_token_ids=prompt)) == "hello"
        assert "".join(stream(byte_level, [], prompt_token_ids=prompt)) == ""
    assert "".join(stream(byte_level, hello, prompt_token_ids=[*hello, *world])) == "hello"


def test_prompt_that_ends_inside_a_byte_run_is_never_given_again(sentencepiece_like):
    world = [sentencepiece_like.token_to_id(f"<0x{byte:02X}>") for byte in "界".encode()]
    the = sentencepiece_like.token_to_id("▁the")
    assert "".join(stream(sentencepiece_like, [*world[2:], the], prompt_token_ids=[the, *world[:2]])) == "界 the"
    assert "".join(stream(sentencepiece_like, [the], prompt_token_ids=[the, *world[:2]])) == " the"
    assert "".join(stream(sentencepiece_like, [], prompt_token_ids=[the, *world[:2]])) == ""


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompt_text_and_completion_text_join(tokenizer, data):
    """Where the prompt ends between characters, decode(prompt) + stream == decode(prompt + completion)."""
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), min_size=1, max_size=20))
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer._backend.decode(ids[:cut], skip_special_tokens=True)
    if REPLACEMENT in before:
        return
    completion = "".join(stream(tokenizer, ids[cut:], prompt_token_ids=ids[:cut]))
    assert before + completion == tokenizer._backend.decode(ids, skip_special_tokens=True)


def test_ill_formed_bytes_cost_the_same_however_many_stand_before(byte_level):
    """DecodeStream decodes its whole window again for each: quadratic. Here nothing is kept."""
    continuation = next(i for i, piece in enumerate(byte_level.token_bytes_table.pieces) if piece == b"\x80")
    detokenizer = Detokenizer(byte_level.token_bytes_table)
    for _ in range(3000):
        assert detokenizer.push((continuation,)) == REPLACEMENT
        assert len(detokenizer._pending) < 4
