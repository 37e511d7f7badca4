"""The sandbox: Hugging Face's semantics, and nothing that reaches the host."""

from __future__ import annotations

import ast
from datetime import datetime
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.text import chat as chat_module
from jaxserve.text.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}
ROOT = Path(__file__).parents[3]


def rendered(source: str, content: str = "hi") -> str:
    return ChatTemplate(source, {}, now=lambda: datetime(2025, 3, 9)).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("  {% if true %}\na\n  {% endif %}\nb\n", "a\nb"),  # trim_blocks, lstrip_blocks; the last newline goes
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': '<é>'} | tojson(ensure_ascii=True) }}", '{"b": "<\\u00e9>"}'),
        ("{{ {'b': 2, 'a': [1]} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": [\n    1\n  ],\n  "b": 2\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            "013",
        ),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "abhic"),
        ("{{ strftime_now('%d %B %Y') }}", "09 March 2025"),
        ("{{ '<b>' }}{{ missing }}", "<b>"),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ dict(a=1).a }}{% for k, v in {'x': 2} | items %}{{ k }}{{ v }}{% endfor %}", "1x2"),
        ("{{ 3 * 4 }}{{ '-' * 5 }}{{ 2 ** 10 }}{{ [0] * 2 }}", "12-----1024[0, 0]"),
        ("{{ 'a,b'.split(',')[1].upper() }}{{ '%s-%s' | format('x', 1) }}", "Bx-1"),
    ],
)
def test_semantics_are_those_of_the_reference(source, expected):
    assert rendered(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ '{0.__class__}'.format(1) + undefined.x }}",
        "{{ messages[0].content.__class__ }}{{ messages[0].content._guard.hide }}",
        "{{ messages[0].content._guard.stand_ins }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum(n=10) }}",
        "{{ 'a' * 200000000 }}",
        "{{ 200000000 * 'a' }}",
        "{{ [0] * 200000000 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_reach_nothing_of_the_host(source):
    with pytest.raises(ConfigError):
        ChatTemplate(source, {})


HIDDEN = ("raise_exception.__globals__", "strftime_now.__globals__", "dict.__base__", "''.format.__self__")


@pytest.mark.parametrize("expression", [*HIDDEN, "messages[0].content._guard", "messages[0].content._plain"])
def test_private_attributes_are_undefined(expression):
    assert rendered("{{ " + expression + " }}") == ""
    with pytest.raises(ConfigError):
        ChatTemplate("{{ " + expression + ".x }}", {})


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ a", "{% endfor %}", "{{ 1 | nofilter }}", "{% nosuchtag %}", "{{ a.b.c }}"]
)
def test_broken_templates_are_refused_at_load(source):
    with pytest.raises(ConfigError, match="The chat template"):
        ChatTemplate(source, {})


def test_a_template_that_refuses_the_trial_message_may_still_be_right():
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}ok"
    assert ChatTemplate(source, {}).render([{"role": "system", "content": "x"}]) == "ok"


def test_a_template_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(chat_module, "TRIAL_LIMIT_S", 0.02)
    source = "{% for i in range(3000) %}{% for j in range(600) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"within 0\.02 s"):
        ChatTemplate(source, {})


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="at most 1048576 characters"):
        ChatTemplate("a" * (1024 * 1024 + 1), {})


def test_there_is_one_jinja_environment_and_it_is_the_sandbox():
    """SGLang CVE-2026-5760: one endpoint used a plain Environment()."""
    importers, made = set(), []
    for folder in ("jaxserve", "server/jaxserve_server", "checkpoints/jaxserve_checkpoints"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                importers |= {path.name for module in modules if module.split(".")[0] == "jinja2"}
                name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
                made += [(path.name, name)] if name.endswith("Environment") else []
    assert importers == {"chat.py", "template_environment.py"}
    assert made == [("template_environment.py", "ImmutableSandboxedEnvironment")]
