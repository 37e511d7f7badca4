"""Folders to tokenizers, text to ids, ids to bytes."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.errors import CheckpointError, ParameterError, UnsupportedModelError
from jaxserve.text import tokenizer as tokenizer_module
from jaxserve.text.tokenizer import Tokenizer

VALID_TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
# Text made mostly of what control tokens are made of.
MARKUP_TEXT = st.lists(
    st.sampled_from(["<", "|", ">", "im_", "start", "end", "<|im_end|>", "<think>", "<s>", " ", "\n", "é"]), max_size=12
).map("".join)


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(VALID_TEXT, MARKUP_TEXT), add=st.booleans())
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_raw_prompts_have_the_ids_of_the_backend(name, request, backends, text, add):
    ours = request.getfixturevalue(name)
    if name == "sentencepiece_like" and add:  # its config asks for BOS, its file does not
        expected = [1, *backends[name].encode(text, add_special_tokens=False).ids]
    else:
        expected = backends[name].encode(text, add_special_tokens=add).ids
    assert ours.encode(text, add) == expected


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(VALID_TEXT, MARKUP_TEXT))
def test_unparsed_text_has_no_control_token_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    allowed = {tokenizer.unk_token_id} if text else set()
    assert not set(ids) & (set(tokenizer.control_tokens.values()) - allowed)
    plain = tokenizer._backend.normalizer.normalize_str(text) if tokenizer._backend.normalizer else text
    if not tokenizer.token_bytes_table.byte_ids:
        assert tokenizer.decode(ids, skip_special_tokens=False) == plain


@settings(max_examples=60, deadline=None)
@given(text=VALID_TEXT)
def test_parsing_changes_nothing_where_nothing_is_spelled(tokenizer, text):
    if any(spelling in text for spelling in tokenizer.control_tokens):
        return
    for add in (False, True):
        assert tokenizer.encode(text, add) == tokenizer.encode(text, add, parse_special=False)


def test_added_words_stay_text_and_markup_is_control(byte_level):
    word, spaces = byte_level.token_to_id("日本"), byte_level.token_to_id("    ")
    assert byte_level.encode("日本    ", False, parse_special=False) == [word, spaces]
    assert {"<think>", "<|im_end|>", "[INST]", "<s>"} <= byte_level.control_tokens.keys()
    assert not {"日本", "    "} & byte_level.control_tokens.keys()
    assert byte_level.token_to_id("<|im_start|>") in byte_level.special_ids
    assert byte_level.token_to_id("<|im_end|>") not in byte_level.special_ids


def test_named_tokens_and_sizes(byte_level, sentencepiece_like):
    assert byte_level.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert byte_level.bos_token_id == byte_level.token_to_id("<s>")
    assert (byte_level.pad_token_id, byte_level.unk_token_id) == (None, None)
    assert sentencepiece_like.unk_token_id == 0
    assert byte_level.max_token_id + 1 == byte_level.vocab_size


def test_empty_text_is_bos_alone(byte_level):
    assert byte_level.encode("") == [byte_level.bos_token_id]
    assert byte_level.encode("", parse_special=False) == [byte_level.bos_token_id]
    assert byte_level.encode("", add_special_tokens=False) == []


def test_a_control_token_that_the_model_itself_finds_in_text_is_undone(tmp_path):
    """Models with `ignore_merges`, as Llama 3's, look whole words up in their vocabulary."""
    whole = tiny_json()
    whole["model"] |= {"vocab": {"<": 0, "s": 1, ">": 2, "<s>": 3}, "merges": [], "ignore_merges": True}
    write(tmp_path, tokenizer__json=whole, tokenizer_config__json={"bos_token": "<s>", "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<s>") == [3, 3]
    assert tokenizer.encode("<s>", parse_special=False) == [3, 0, 1, 2]


def test_token_bytes_join_to_the_text(tokenizer):
    text = "naïve 世界 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    beyond = tokenizer.max_token_id + 1
    assert (tokenizer.token_bytes(beyond), tokenizer.token_bytes(-1)) == (b"", b"")
    assert (tokenizer.id_to_token(beyond), tokenizer.id_to_token(-1)) == (None, None)


def test_a_byte_token_gives_its_raw_byte(sentencepiece_like):
    token_id = sentencepiece_like.token_to_id("<0xE4>")
    assert sentencepiece_like.token_bytes(token_id) == b"\xe4"
    assert sentencepiece_like.token_text(token_id) == "\ufffd"
    assert sentencepiece_like.id_to_token(token_id) == "<0xE4>"


def test_a_spelled_byte_token_stays_text(sentencepiece_like):
    ids = sentencepiece_like.encode("<0xE4>", add_special_tokens=False)
    assert sentencepiece_like.token_to_id("<0xE4>") not in ids
    assert sentencepiece_like.decode(ids) == "<0xE4>"


def test_lone_surrogates_and_huge_texts_are_refused(byte_level, monkeypatch):
    for parse in (False, True):
        with pytest.raises(ParameterError, match="lone surrogate"):
            byte_level.encode("a\ud800", parse_special=parse)
    monkeypatch.setattr(tokenizer_module, "MAX_TEXT_CHARS", 10)
    with pytest.raises(ParameterError, match="at most 10 characters, got 11") as caught:
        byte_level.encode("a" * 11)
    assert caught.value.code == "string_above_max_length"


def test_encoding_lets_other_threads_run(byte_level):
    """`Tokenizer.encode` of the backend holds the GIL throughout: a long prompt would stall every stream."""
    text = "the quick brown fox " * 40_000
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    byte_level.encode(text)
    end = time.perf_counter()
    done.set()
    thread.join()
    # Only the copy of the ids out of the backend holds the GIL; a held GIL gives two ticks at most.
    assert sum(begin < tick < end for tick in ticks) > 5


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(VALID_TEXT, max_size=5))
def test_batches_are_texts_one_by_one(byte_level, texts):
    assert byte_level.encode_batch(texts) == [byte_level.encode(text) for text in texts]


def write(folder, **files) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)


def tiny_json() -> dict:
    vocab = {"a": 0, "b": 1, "ab": 2, "<s>": 3}
    backend = Backend(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.decoder = decoders.ByteLevel()
    return json.loads(backend.to_str())


def test_vocab_and_merges_need_a_known_class(tmp_path):
    write(tmp_path, vocab__json={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges__txt="#version: 0.2\na b\n")
    with pytest.raises(CheckpointError, match="Known are Qwen2Tokenizer and GPT2Tokenizer"):
        Tokenizer.from_folder(tmp_path)
    added = {"4": {"content": "<|im_end|>", "special": True}, "5": {"content": "<think>", "special": False}}
    config = {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    write(tmp_path, tokenizer_config__json=config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ab b<|im_end|><think>") == [2, 3, 1, 4, 5]
    assert (tokenizer.eos_token_id, tokenizer.special_ids) == (4, frozenset({4}))


def test_config_decides_on_bos_and_eos(tmp_path):
    write(tmp_path, tokenizer__json=tiny_json())
    config = {"bos_token": "<s>", "eos_token": {"content": "b"}, "add_bos_token": True, "add_eos_token": True}
    write(tmp_path, tokenizer_config__json=config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a") == tokenizer.encode("a", parse_special=False) == [3, 0, 1]
    assert 3 in tokenizer.special_ids  # a named token is special, whatever tokenizer.json says


def test_special_tokens_map_fills_what_the_config_leaves_out(tmp_path):
    write(tmp_path, tokenizer__json=tiny_json(), special_tokens_map__json={"eos_token": {"content": "<s>"}})
    assert Tokenizer.from_folder(tmp_path).eos_token_id == 3


def test_a_named_token_without_an_id_is_only_text(tmp_path):
    write(tmp_path, tokenizer__json=tiny_json(), tokenizer_config__json={"bos_token": "<none>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.vocab_size) == (None, 4)
    assert tokenizer.special_tokens["bos_token"] == "<none>"


def test_truncation_in_the_file_is_not_applied(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write(tmp_path, tokenizer__json=tiny_json() | {"truncation": truncation})
    assert len(Tokenizer.from_folder(tmp_path).encode("ba" * 8)) > 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "put tokenizer.json there, or vocab.json and merges.txt"),
        ({"tokenizer__json": "{]"}, "cannot be read"),
        ({"tokenizer__json": "{}"}, "cannot be read"),
        ({"tokenizer__json": tiny_json(), "tokenizer_config__json": "[1]"}, "must hold a JSON object"),
        ({"tokenizer__json": tiny_json(), "tokenizer_config__json": {"bos_token": 7}}, "non-empty string"),
        (
            {
                "tokenizer__json": tiny_json(),
                "tokenizer_config__json": {"added_tokens_decoder": {"9": {"content": "x"}}},
            },
            "'x' the id 9, but the vocabulary gives it 4",
        ),
        (
            {"tokenizer__json": tiny_json(), "tokenizer_config__json": {"added_tokens_decoder": {"4": {}}}},
            "malformed added_tokens_decoder",
        ),
        (
            {"tokenizer__json": tiny_json(), "tokenizer_config__json": {"bos_token": "?", "add_bos_token": True}},
            "wants '\\?' added to texts",
        ),
        ({"tokenizer__json": tiny_json(), "tokenizer_config__json": {"chat_template": 3}}, "expected text"),
        ({"tokenizer__json": tiny_json(), "tokenizer_config__json": {"chat_template": [3]}}, "malformed list"),
    ],
)
def test_broken_folders_are_refused(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_unknown_decoders_are_refused_by_name(tmp_path, decoder):
    write(tmp_path, tokenizer__json=tiny_json() | {"decoder": decoder})
    with pytest.raises(UnsupportedModelError, match="null" if decoder is None else "WordPiece"):
        Tokenizer.from_folder(tmp_path)


def test_a_vocabulary_with_gaps_is_refused(tmp_path):
    whole = tiny_json()
    whole["model"]["vocab"] = {"a": 0, "b": 1, "ab": 3}
    added = {"id": 3, "content": "<x>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    write(tmp_path, tokenizer__json=whole | {"added_tokens": [added | flags]})
    with pytest.raises(UnsupportedModelError, match="Number its ids without gaps"):
        Tokenizer.from_folder(tmp_path)
