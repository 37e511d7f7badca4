"""Chat templates: what is rendered, what is refused, and where a template comes from."""

from __future__ import annotations

import json

import pytest

from jaxserve.errors import CheckpointError, ConfigError, ParameterError
from jaxserve.text import chat as chat_module
from jaxserve.text.chat import ChatOptions, ChatTemplate, encode_chat, load_chat_template
from jaxserve.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
USER = {"role": "user", "content": "hi"}


def refusal(template: ChatTemplate, messages, **options) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        template.render(messages, ChatOptions(**options))
    return caught.value


def test_content_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate(PLAIN, {}).render([{"role": "user", "content": parts}]) == "user: a\nb\n>"


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user", "content": None}, "messages[0].content", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "invalid_value"),
        ({"role": "assistant"}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": 3}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": ["a"]}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content", "invalid_value"),
        ({"role": "end", "content": "a"}, "messages[0].role", "invalid_value"),
        ({"role": ["user"], "content": "a"}, "messages[0].role", "invalid_value"),
        ({"content": "a"}, "messages[0].role", "invalid_value"),
        ({"role": "assistant", "content": "a", "tool_calls": "b"}, "messages[0].tool_calls", "invalid_value"),
        ("user", "messages[0]", "invalid_type"),
    ],
)
def test_bad_messages_are_refused_by_field(message, param, code):
    error = refusal(ChatTemplate(PLAIN, {}), [message])
    assert (error.param, error.code) == (param, code)


def test_no_messages_and_too_many_are_refused():
    template = ChatTemplate(PLAIN, {})
    assert refusal(template, []).code == "empty_array"
    assert refusal(template, [USER] * 4097).code == "array_above_max_length"
    assert "'end'. Supported values are: 'system', 'developer'" in str(refusal(template, [{**USER, "role": "end"}]))


def test_developers_are_the_system_where_a_template_does_not_know_them():
    message = [{"role": "developer", "content": "x"}]
    assert ChatTemplate(PLAIN, {}).render(message) == "system: x\n>"
    assert ChatTemplate(PLAIN + "{# developer #}", {}).render(message) == "developer: x\n>"


def test_nothing_of_a_template_s_failure_reaches_the_client():
    secret = "{% if messages|length > 1 %}{{ raise_exception('secret /path') }}{% endif %}" + PLAIN
    undefined = "{% if messages|length > 1 %}{{ secret.path.to }}{% endif %}" + PLAIN
    insecure = "{% if messages|length > 1 %}{{ messages.__class__.__mro__ }}{% endif %}" + PLAIN
    wrong = "{% if messages|length > 1 %}{{ 1 / 0 }}{{ 'a' + 1 }}{% endif %}" + PLAIN
    texts = set()
    for source in (secret, undefined, insecure, wrong):
        error = refusal(ChatTemplate(source, {}), [USER, USER])
        assert (error.code, error.param) == ("invalid_prompt", "messages")
        texts.add(str(error))
    assert len(texts) == 1
    assert "secret" not in texts.pop()


def test_a_prompt_that_grows_too_long_is_stopped_on_the_way(monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_RENDERED_CHARS", 1000)
    source = "{% if messages|length > 1 %}{% for i in range(90000) %}{{ 'a' * 100 }}{% endfor %}{% endif %}" + PLAIN
    error = refusal(ChatTemplate(source, {}), [USER, USER])
    assert error.code == "invalid_prompt"
    assert "more than 1000 characters" in str(error)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"messages": 1}, "not for a request"),
        ({"chat_template": "{{ 1 }}"}, "not for a request"),
        ({"tokenize": True}, "not for a request"),
        ({"bos_token": "<s>"}, "not for a request"),
        ({"add_generation_prompt": False}, "not for a request"),
        ({"raise_exception": 1}, "not for a request"),
        ({"__class__": 1}, "not for a request"),
        ({"not a name": 1}, "not for a request"),
        ({"mood": ["a"]}, "string, number or boolean, got list"),
        ({"mood": {"a": 1}}, "string, number or boolean, got dict"),
        ({"mood": "a" * 1025}, "at most 1024 characters, got 1025"),
        ({"other": 1}, "'other' is not a variable of this model's chat template. It has: mood."),
        ({"inner": 1}, "'inner' is not a variable"),
        ({f"k{i}": 1 for i in range(17)}, "maximum length 16"),
    ],
)
def test_only_scalars_for_a_template_s_own_variables_pass(kwargs, message):
    template = ChatTemplate("{% set inner = 1 %}{{ mood }}{{ bos_token }}" + PLAIN, {})
    with pytest.raises(ParameterError) as caught:
        template.render([USER], ChatOptions(template_kwargs=kwargs))
    assert message in str(caught.value)
    assert caught.value.param is not None
    assert caught.value.param.startswith("chat_template_kwargs")


def test_scalars_reach_the_template_with_their_types():
    source = "{% if mood is not defined %}{% set mood = 'none' %}{% endif %}{{ mood is true }}{{ mood }}"
    template = ChatTemplate(source, {})
    assert template.variables == {"mood"}
    rendered = [template.render([USER], ChatOptions(template_kwargs={"mood": mood})) for mood in (True, "up", 3, None)]
    assert rendered == ["TrueTrue", "Falseup", "False3", "FalseNone"]
    assert template.render([USER]) == "Falsenone"


def test_the_last_message_is_continued():
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]\n{% endfor %}", {})
    last = {"role": "assistant", "content": " Sure, "}
    assert template.render([USER, last], ChatOptions(continue_final_message=True)) == "[hi]\n[Sure,"
    plain = ChatTemplate(PLAIN, {})
    assert plain.render([USER, last], ChatOptions(continue_final_message=True)) == "user: hi\nassistant:  Sure, "
    dropping = ChatTemplate("{{ messages[0].content }}", {})
    assert refusal(dropping, [USER, last], continue_final_message=True).code == "invalid_prompt"


def test_tool_calls_and_reasoning_have_the_reference_s_shape():
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    rendered = json.loads(ChatTemplate(source, {}).render([message]))
    assert "content" not in rendered
    assert rendered["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert (rendered["reasoning_content"], rendered["thinking"]) == ("hm", "hm")
    call["function"]["arguments"] = "not json"
    assert "not json" in ChatTemplate(source, {}).render([message])


def test_messages_of_the_caller_are_not_changed():
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    before = json.dumps(message)
    ChatTemplate(PLAIN, {}).render([message])
    assert json.dumps(message) == before


def test_a_model_without_a_template_says_what_to_do(byte_level, tmp_path):
    assert load_chat_template(tmp_path, byte_level) is None
    with pytest.raises(ParameterError, match="--chat-template FILE") as caught:
        encode_chat(byte_level, None, [USER])
    assert caught.value.param == "messages"


def test_text_that_is_not_unicode_is_refused(byte_level):
    with pytest.raises(ParameterError, match="lone surrogate") as caught:
        encode_chat(byte_level, ChatTemplate(PLAIN, {}), [{"role": "user", "content": "a\ud800"}])
    assert caught.value.param == "messages"


def test_bos_is_added_only_where_asked(byte_level):
    template = ChatTemplate(PLAIN, byte_level.special_tokens)
    ids = encode_chat(byte_level, template, [USER])
    assert encode_chat(byte_level, template, [USER], add_special_tokens=True) == [byte_level.bos_token_id, *ids]


def test_the_nearest_source_of_a_template_wins(byte_level, tmp_path):
    def source(override: str | None = None, tokenizer: Tokenizer = byte_level) -> str:
        template = load_chat_template(tmp_path, tokenizer, override)
        assert template is not None
        return template.source

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend = byte_level._backend
    backend.save(str(folder / "tokenizer.json"))
    several = [{"name": "default", "template": "config {{ messages }}"}, {"name": "tool_use", "template": "tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert source(tokenizer=Tokenizer.from_folder(folder)) == "config {{ messages }}"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json {{ messages }}"}')
    assert source(tokenizer=Tokenizer.from_folder(folder)) == "json {{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages }}")
    assert source() == "file {{ messages }}"
    assert source(str(tmp_path / "chat_template.json")).startswith('{"chat_template"')
    assert source("inline {{ messages }}") == "inline {{ messages }}"
    with pytest.raises(ConfigError, match="neither a file nor a template"):
        source("missing.jinja")
    (tmp_path / "chat_template.json").write_text("[")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        source()


def test_several_templates_need_a_default(byte_level, tmp_path):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    several = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    with pytest.raises(ConfigError, match="none is 'default': rag, tool_use"):
        load_chat_template(tmp_path, Tokenizer.from_folder(tmp_path))
