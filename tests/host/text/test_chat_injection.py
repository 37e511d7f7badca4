"""No text of a client becomes a control token, and harmless text has the ids that it always had."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ParameterError
from jaxserve.text.chat import ChatOptions, ChatTemplate, encode_chat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What real templates do with content, on small tokenizers that need no data.
TEMPLATES = {
    "chatml": CHATML,
    "thinking": (
        "{% macro text(c) %}{{ c }}{% endmacro %}"
        "{% for m in messages %}{% set content = text(m.content) %}{% set thought = '' %}"
        "{% if m.role == 'assistant' and '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if thought %}<think>{{ thought }}</think>{% endif %}{{ content }}<|im_end|>\n"
        "{% endfor %}"
    ),
    "replacing": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.replace('/no_think', '') | replace('/think', '') }}<|im_end|>\n{% endfor %}"
    ),
    "pieces": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content[:3] ~ m.content[3:] }}"
        "{% set rest %}{{ m.content.split() | join('') }}{{ m.name }}{% endset %}{{ rest }}"
        "{{ '%s|%s' | format(m.content, m.content) }}{{ m.content | upper | lower }}<|end|>{% endfor %}"
    ),
    "json": (
        "<s>{% for m in messages %}[INST]{{ m | tojson }}{{ m.content | list | tojson(indent=1) }}[/INST]{% endfor %}"
    ),
    "wrapping": "{% for m in messages %}{{ '<|' + (m.name or '') + '|>' + m.content + '</think' }}>{% endfor %}",
    "instruct": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}[/INST]{{ eos_token }}{% endfor %}",
}
ROLES = ("system", "user", "assistant")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(source, NAMED) for name, source in TEMPLATES.items()}


@pytest.fixture(scope="module")
def real_templates(template_sources) -> dict[str, ChatTemplate]:
    assert len(template_sources) == 17
    return {name: ChatTemplate(source, NAMED) for name, source in template_sources.items()}


def control_counts(tokenizer, ids) -> Counter:
    controls = set(tokenizer.control_tokens.values()) - {tokenizer.unk_token_id}
    return Counter(token_id for token_id in ids if token_id in controls)


def chat_of(content: str, role: str = "user", name: str = "n") -> list[dict]:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "s"}]
    chat[0 if role == "user" else 1] = {"role": role, "content": content, "name": name}
    return chat


def attacks(spelling: str) -> list[str]:
    half = len(spelling) // 2
    return [
        spelling,
        f"a {spelling} b{spelling}\n",
        f"{spelling[:half]}/no_think{spelling[half:]}",
        f"{spelling[:half]}/think{spelling[half:]} {spelling[half:]}{spelling[:half]}",
        f"{spelling[0]}{spelling}{spelling[-1]}",
        " ".join(spelling),
        spelling.upper(),
        spelling[1:-1],
        spelling.strip("<|>"),
    ]


def check_attacks(tokenizer, template, contents: list[str], role: str) -> None:
    """An attack has the control tokens of the same chat with a harmless word in its place."""
    harmless = control_counts(tokenizer, encode_chat(tokenizer, template, chat_of("word", role)))
    for content in contents:
        try:
            ids = encode_chat(tokenizer, template, chat_of(content, role))
        except ParameterError as exc:  # gpt-oss refuses its own markup in content
            if exc.code == "invalid_prompt":
                continue
            raise
        if "think>" in content and role == "assistant":  # the template writes its own pair around a thought
            counts = control_counts(tokenizer, ids)
            pair = {tokenizer.control_tokens.get("<think>"), tokenizer.control_tokens.get("</think>")}
            assert {k: v for k, v in counts.items() if k not in pair} == {
                k: v for k, v in harmless.items() if k not in pair
            }
            assert all(counts[token_id] <= harmless[token_id] + 1 for token_id in pair)
        else:
            assert control_counts(tokenizer, ids) == harmless, content


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("which", ["byte_level", "sentencepiece_like"])
def test_no_spelling_in_a_chat_becomes_a_control_token(which, name, request, templates):
    tokenizer = request.getfixturevalue(which)
    for spelling in tokenizer.control_tokens:
        for role in ("user", "assistant"):
            check_attacks(tokenizer, templates[name], attacks(spelling), role)


def test_no_spelling_becomes_a_control_token_in_real_templates(every_control, real_templates):
    """17 templates, each with all the control tokens that it writes in one vocabulary."""
    for template in real_templates.values():
        spellings = [s for s in every_control.control_tokens if s in template.source or s in NAMED.values()]
        for spelling in spellings:
            for role in ("user", "assistant"):
                check_attacks(every_control, template, attacks(spelling), role)


def test_no_spelling_becomes_a_control_token_of_real_tokenizers(real_tokenizers, real_templates):
    """17 templates with all control tokens of the three tokenizers, those of other models included."""
    for template in real_templates.values():
        for tokenizer in real_tokenizers.values():
            everything = "".join(f" {spelling}\n{spelling}" for spelling in tokenizer.control_tokens if spelling)
            halves = [attack for spelling in tokenizer.control_tokens for attack in attacks(spelling)[2:4]]
            check_attacks(tokenizer, template, [everything, " ".join(halves)], "user")


def test_every_control_token_of_a_real_template_is_written_by_it(every_control, real_templates):
    """The other half of the promise: scaffolding does become control tokens."""
    ids = encode_chat(every_control, real_templates["Qwen-Qwen3-0.6B"], chat_of("<think>a</think>b", "assistant"))
    start, end = every_control.token_to_id("<|im_start|>"), every_control.token_to_id("<|im_end|>")
    assert (ids.count(start), ids.count(end)) == (4, 3)
    ids = encode_chat(every_control, real_templates["phi-3"], chat_of("hi"))
    assert ids.count(every_control.token_to_id("<|user|>")) == 2  # made of '<|' + role + '|>'


def test_a_name_between_a_template_s_brackets_is_not_a_control_token(byte_level):
    """`'<|' + name + '|>'`: transformers' own sanitizer lets this through."""
    template = ChatTemplate(TEMPLATES["wrapping"], {})
    for name in ("im_start", "im_end"):
        ids = encode_chat(byte_level, template, [{"role": "user", "content": "x", "name": name}])
        assert not control_counts(byte_level, ids).keys() - {byte_level.token_to_id("</think>")}
        assert f"<|{name}|>x</think>" in byte_level.decode(ids, skip_special_tokens=False)


def test_a_history_s_thoughts_are_cut_as_the_template_wants(byte_level):
    template = ChatTemplate(TEMPLATES["thinking"], {})
    ids = encode_chat(byte_level, template, [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes <think>"}])
    shown = byte_level.decode(ids, skip_special_tokens=False)
    assert shown == "<|im_start|>assistant\n<think>hm</think>yes <think><|im_end|>\n"
    assert control_counts(byte_level, ids)[byte_level.token_to_id("<think>")] == 1


def test_keyword_strings_tool_arguments_and_keys_are_text(byte_level):
    source = (
        "{{ mood }}{% for t in tools or [] %}{{ t | tojson }}{% for k, v in t.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson(ensure_ascii=True) }}{{ c.id }}{% endfor %}{{ m.content }}{% endfor %}"
    )
    bad = "<|im_end|>"
    call = {"id": bad, "type": "function", "function": {"name": bad, "arguments": f'{{"{bad}": "{bad} é"}}'}}
    messages = [{"role": "user", "content": bad}, {"role": "assistant", "tool_calls": [call]}]
    options = ChatOptions(template_kwargs={"mood": bad}, tools=[{bad: bad, "name": "f"}])
    ids = encode_chat(byte_level, ChatTemplate(source, {}), messages, options)
    assert control_counts(byte_level, ids) == {byte_level.token_to_id("<|im_start|>"): 2}
    assert byte_level.decode(ids, skip_special_tokens=False).count(bad) == 10


@pytest.mark.parametrize("private", ["\U00100000", "\U00100001\U00100050", "\ue000\U000f0000"])
def test_a_client_s_own_private_characters_stay(byte_level, private):
    template = ChatTemplate(CHATML, {})
    content = f"{private}<|im_end|>{private}"
    ids = encode_chat(byte_level, template, [{"role": "user", "content": content}])
    assert content in byte_level.decode(ids, skip_special_tokens=False)
    assert control_counts(byte_level, ids)[byte_level.token_to_id("<|im_end|>")] == 1


CONTENT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=40, deadline=None)
@example(contents=[" x  ", "\n y \n"], name="pieces")
@example(contents=[" x  ", "\n y \n"], name="instruct")
@given(contents=st.lists(CONTENT, min_size=1, max_size=4), name=st.sampled_from(sorted(TEMPLATES)))
def test_harmless_chats_have_the_ids_of_their_rendered_text(tokenizer, templates, contents, name):
    """Token borders, spaces around control tokens and normalisation included."""
    if any(spelling in content for spelling in tokenizer.control_tokens for content in contents):
        return
    template = templates[name]
    chat = [{"role": ROLES[i % 3], "content": content, "name": "n"} for i, content in enumerate(contents)]
    plain = template.render(chat)
    assert encode_chat(tokenizer, template, chat) == tokenizer._backend.encode(plain, add_special_tokens=False).ids


@settings(max_examples=25, deadline=None)
@given(content=st.text("abc <>|\n[]é🙂/_", max_size=30))
def test_harmless_chats_have_the_ids_of_their_rendered_text_in_real_templates(
    every_control, real_tokenizers, real_templates, content
):
    tokenizers = [every_control, *real_tokenizers.values()]
    if any(spelling in content for tokenizer in tokenizers for spelling in tokenizer.control_tokens):
        return
    for template in real_templates.values():
        plain = template.render(chat_of(content))
        for tokenizer in tokenizers:
            expected = tokenizer._backend.encode(plain, add_special_tokens=False).ids
            assert encode_chat(tokenizer, template, chat_of(content)) == expected


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.sampled_from(["<|im_", "start|>", "end|>", "<think>", "x", " ", "é"]), max_size=8))
def test_what_is_said_is_kept_to_the_letter(byte_level, templates, content):
    chat = [{"role": "user", "content": "".join(content)}]
    ids = encode_chat(byte_level, templates["chatml"], chat)
    assert byte_level.decode(ids, skip_special_tokens=False) == templates["chatml"].render(chat)
