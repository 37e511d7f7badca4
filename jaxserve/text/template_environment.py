"""The one jinja environment: a sandbox with Hugging Face's semantics.

Owns what a template may use. Must not know messages or tokens.

A template comes with a model and is not trusted with the host: no attribute that starts with an
underscore, nothing that changes its arguments. The sandbox does not bound time and memory, so products of
strings and powers are bounded here, the output in `chat.py`, and loops by jinja's `range` (100,000).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxserve.text.guard import STAND_INS, join_guarded

_ESCAPABLE = re.compile(f"[^\x00-\x7f{chr(STAND_INS.start)}-{chr(STAND_INS[-1])}]")
MAX_PRODUCT = 1_000_000  # items in a repeated string or list, or bits in a power


class RaisedByTemplateError(TemplateError):
    """The template called `raise_exception`: it does not accept these messages."""


def make_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """The environment in which chat templates are compiled.

    Args:
        now: the clock of `strftime_now`.

    Source: transformers, utils/chat_template_utils.py, `_cached_compile_jinja_template`.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: now().strftime(format),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself has too many methods
        namespace=_namespace,
    )
    del environment.globals["lipsum"]
    environment.intercepted_binops = frozenset(("*", "**"))
    environment.binop_table["*"] = _bounded_product
    environment.binop_table["**"] = _bounded_power
    environment.concat = join_guarded  # type: ignore[reportAttributeAccessIssue]
    return environment


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise RaisedByTemplateError(str(message))


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    for name in values:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace must not have the attribute {str(name)!r}")
    return Namespace(values)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML. Stand-ins are never escaped: they are to be revealed."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPABLE.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _bounded_product(left: Any, right: Any) -> Any:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > MAX_PRODUCT:
            raise SecurityError(f"a template must not repeat {len(many)} items {times} times")
    return left * right


def _bounded_power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_PRODUCT:
        raise SecurityError(f"a template must not raise to the power {right}")
    return left**right
