"""docs/api.md names every field of every request: what is honoured, what has no effect and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jaxserve_server.routes import api_routes
from jaxserve_server.schemas import REFUSED, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


@pytest.fixture(scope="module")
def page(repo: Path) -> str:
    return (repo / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest])
def test_every_field_is_documented(page: str, kind: Any):
    assert [name for name in kind.__struct_fields__ if f"`{name}`" not in page] == []


def test_the_list_of_refused_fields_is_the_servers(page: str):
    section = page.partition("## Known and refused")[2].partition("## ")[0].partition("`unsupported_parameter`:")[2]
    listed = set(re.findall(r"`([a-z_]+)`", section))
    assert listed == REFUSED.keys() - {"echo"}  # which is only refused of chat


@pytest.mark.parametrize("section", ["Accepted, with no effect"])
def test_fields_without_effect_are_accepted(page: str, section: str, server: Any):
    names = re.findall(r"`([a-z_]+)`", page.partition(f"## {section}")[2].partition("## ")[0])
    values: dict[str, Any] = {
        "metadata": {"a": "b"},
        "store": True,
        "parallel_tool_calls": False,
        "service_tier": "auto",
    }
    assert len(names) == 8
    server.chat(**{name: values.get(name, "x") for name in names})


def test_every_route_is_documented(page: str):
    for route in api_routes():
        (method,) = (route.methods or set()) - {"HEAD"}
        path = route.path.replace("{model:path}", "{id}")
        assert f"`{method} {path}`" in page
