"""Renderings and ids equal those of transformers (made by `scripts/make_chat_goldens.py`)."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest

from jaxserve.errors import ParameterError
from jaxserve.text.chat import ChatOptions, ChatTemplate, encode_chat, load_chat_template

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
NOW = datetime.fromisoformat(GOLDENS["now"])


def options_of(chat: dict) -> ChatOptions:
    given = dict(chat["options"])
    continued = given.pop("continue_final_message", False)
    header = given.pop("add_generation_prompt", False)
    return ChatOptions(add_generation_prompt=header, continue_final_message=continued, template_kwargs=given)


@pytest.mark.parametrize("name", GOLDENS["rendered"])
def test_every_rendering_is_that_of_the_reference(name, template_sources):
    template = ChatTemplate(template_sources[name], GOLDENS["special_tokens"], now=lambda: NOW)
    num_compared = 0
    for case, expected in GOLDENS["rendered"][name].items():
        chat = GOLDENS["chats"][case]
        unknown = set(chat["options"]) - {"add_generation_prompt", "continue_final_message"} - template.variables
        if unknown or "raises" in expected:
            with pytest.raises(ParameterError):
                template.render(chat["messages"], options_of(chat))
            continue
        rendered = template.render(chat["messages"], options_of(chat))
        found = {"chars": len(rendered), "sha256": hashlib.sha256(rendered.encode()).hexdigest()}
        assert found == expected, f"{case}: {rendered!r}"
        num_compared += 1
    assert num_compared >= 6


@pytest.mark.parametrize("name", GOLDENS["text_ids"])
def test_ids_of_texts_are_those_of_the_reference(name, real_tokenizers):
    for text, expected in zip(GOLDENS["texts"], GOLDENS["text_ids"][name], strict=True):
        assert real_tokenizers[name].encode(text) == expected, text


@pytest.mark.parametrize("name", GOLDENS["chat_ids"])
def test_ids_of_chats_are_those_of_the_reference(name, real_tokenizers, data):
    tokenizer = real_tokenizers[name]
    template = load_chat_template(data / "tokenizers" / name, tokenizer)
    for case, expected in GOLDENS["chat_ids"][name].items():
        chat = GOLDENS["chats"][case]
        assert encode_chat(tokenizer, template, chat["messages"], options_of(chat)) == expected, case
