"""Reads the hand-written text in `data/` into typed records.

Owns the formats of those files. Knows nothing of phrasing, chance or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Term:
    """One name of a topic, and the verb that asks for it: "is", "are" or "was" (a person of the past)."""

    text: str
    verb: str


@dataclass(frozen=True, slots=True)
class Topic:
    terms: tuple[Term, ...]
    sentence: str
    rest: str


@dataclass(frozen=True, slots=True)
class QA:
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """Questions about {a}, answers with {b}, and the pairs that fill them."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    short: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Category:
    plural: str
    singular: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Titled:
    """A text in pieces (steps, lines, one paragraph) under a title and its other names."""

    titles: tuple[str, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    terms: tuple[str, ...]
    questions: tuple[str, ...]


def _lines(name: str) -> list[str]:
    text = (DATA / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _split(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def _term(text: str, canonical: str) -> Term:
    if text.startswith("+"):
        return Term(text[1:], "are")
    if text.startswith("@") or canonical.startswith("@"):
        return Term(text.removeprefix("@"), "was")
    has_article = text.startswith(("a ", "an ", "the "))
    plural = not has_article and canonical.startswith(("a ", "an ")) and text.endswith("s")
    return Term(text, "are" if plural else "is")


@cache
def topics(name: str) -> tuple[Topic, ...]:
    """`term; other names | one sentence | the rest`, one topic a line."""
    found = []
    for line in _lines(name):
        names, sentence, rest = _split(line, "|")
        terms = _split(names, ";")
        found.append(Topic(tuple(_term(t, terms[0]) for t in terms), sentence, rest))
    return tuple(found)


@cache
def questions(name: str) -> tuple[QA, ...]:
    """`Q: … | …` lines, each followed by its `A: … | …`."""
    lines = _lines(name)
    return tuple(
        QA(_split(q.removeprefix("Q:"), "|"), _split(a.removeprefix("A:"), "|"))
        for q, a in zip(lines[::2], lines[1::2], strict=True)
    )


@cache
def relations() -> tuple[Relation, ...]:
    found: list[Relation] = []
    for block in "\n".join(_lines("relations.txt")).split("[")[1:]:
        head, q, a, s, *rows = block.strip().splitlines()
        pairs = tuple((left.strip(), right.strip()) for left, right in (row.split(" = ") for row in rows))
        found.append(
            Relation(
                head.removesuffix("]"),
                _split(q.removeprefix("q:"), "|"),
                _split(a.removeprefix("a:"), "|"),
                s.removeprefix("s:").strip(),
                pairs,
            )
        )
    return tuple(found)


@cache
def categories() -> tuple[Category, ...]:
    found = []
    for line in _lines("categories.txt"):
        names, members = line.split(": ", 1)
        plural, singular = _split(names, ";")
        found.append(Category(plural, singular, _split(members, ",")))
    return tuple(found)


@cache
def titled(name: str, separator: str = "|") -> tuple[Titled, ...]:
    """`title; other names | piece | piece …`; poems split their lines by "/"."""
    found = []
    for line in _lines(name):
        names, body = line.split("|", 1)
        found.append(Titled(_split(names, ";"), _split(body, separator)))
    return tuple(found)


@cache
def jokes() -> tuple[str, ...]:
    return tuple(_lines("jokes.txt"))


@cache
def riddles() -> tuple[tuple[str, str], ...]:
    found = []
    for line in _lines("riddles.txt"):
        riddle, answer = _split(line, "|")
        found.append((riddle, answer))
    return tuple(found)


@cache
def unknown() -> Unknown:
    terms, asked = "\n".join(_lines("unknown.txt")).split("---")
    return Unknown(_split(terms, "|"), _split(asked, "|"))


@cache
def word_lists(name: str = "words.txt") -> dict[str, tuple[str, ...]]:
    """`name: item, item` lines; the lists of systems.txt are split by "|"."""
    separator = "|" if name == "systems.txt" else ","
    return {key: _split(items, separator) for key, items in (line.split(": ", 1) for line in _lines(name))}


@cache
def plots() -> tuple[str, ...]:
    """Story plots: `= title`, then one line of text with [a/b] choices and $names."""
    return tuple(line for line in _lines("stories.txt") if not line.startswith("="))
