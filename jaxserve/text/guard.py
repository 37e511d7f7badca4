"""Client text that passes through a chat template and cannot become a control token.

A template mixes its own text with a client's, and a tokenizer cannot tell them apart afterwards. So every
character of a client's string that occurs in any control token's spelling is replaced, one for one, by a
stand-in from Unicode's private planes before rendering, and put back after the template's own control
tokens have been found. Whatever a template does to the text (cut, join, replace, print as JSON), a spelling
with even one of the client's characters in it is not recognised.

Templates also look at the text: `'</think>' in content`, `content.split('</think>')`. `GuardedText` answers
such questions as the original would. An operation that it does not know is still safe: at worst its answer
is that of the text with stand-ins.

Owns stand-ins and their removal. Must not know templates, messages or tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, SupportsIndex

from jaxserve.errors import ParameterError

STAND_INS = range(0x100000, 0x10FFFE)  # private use; nothing in practice is written with it


def is_guardable(char: str) -> bool:
    """Whether a character gets a stand-in: not if JSON must escape it, nor if strip() must find it."""
    return char > " " and not char.isspace() and char not in '"\\'


class Guard:
    """A set of stand-ins for the characters of `alphabet`, and one mark.

    Args:
        alphabet: the characters of all control tokens' spellings.
        base: code point of the first stand-in.

    Attributes:
        mark: a character that is no stand-in and that no client text has.
        stand_ins: matches one stand-in, or the mark.
    """

    __slots__ = ("_alphabet", "_backward", "_forward", "mark", "stand_ins")

    def __init__(self, alphabet: Iterable[str], base: int = STAND_INS.start):
        letters = sorted({char for char in alphabet if is_guardable(char)})
        self._alphabet = letters
        self._forward = {ord(letter): chr(base + i) for i, letter in enumerate(letters)}
        self._backward = {base + i: letter for i, letter in enumerate(letters)}
        self.mark = chr(base + len(letters))
        self.stand_ins = re.compile(f"[{chr(base)}-{self.mark}]")

    def clear_of(self, texts: Iterable[str]) -> Guard:
        """This guard, or one whose stand-ins occur in none of `texts`.

        Raises:
            ParameterError: the texts use up the private plane.
        """
        texts = list(texts)
        if not any(self.stand_ins.search(text) for text in texts if not text.isascii()):
            return self
        used = sorted({ord(char) for char in chain.from_iterable(texts) if ord(char) >= STAND_INS.start})
        size = len(self._alphabet) + 1
        start = STAND_INS.start
        for code in [*used, STAND_INS.stop]:
            if code - start >= size:
                return Guard(self._alphabet, start)
            start = code + 1
        raise ParameterError(
            f"The messages use so many private-use characters (U+100000 to U+10FFFD) that {size} in a row are not "
            "left for the server. Remove them.",
            param="messages",
        )

    def hide(self, text: str) -> str:
        """`text` with its stand-ins."""
        return text.translate(self._forward)

    def reveal(self, text: str) -> str:
        """The text as the client wrote it."""
        return str.translate(text, self._backward)

    def protect(self, value: Any, plain_keys: frozenset[str] = frozenset()) -> Any:
        """A copy of JSON-like `value` with every string guarded, but the keys in `plain_keys`."""
        if isinstance(value, str):
            return GuardedText(self.hide(value), self)
        if isinstance(value, Mapping):
            return {
                key if key in plain_keys else self.protect(key): self.protect(item, plain_keys)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.protect(item, plain_keys) for item in value]
        return value


class GuardedText(str):
    """A string with stand-ins that compares, searches and splits as the original.

    Positions are the original's, since stand-ins are one for one. Results that hold text are guarded again.
    """

    __slots__ = ("_guard",)
    _guard: Guard

    def __new__(cls, text: str, guard: Guard):
        self = super().__new__(cls, text)
        self._guard = guard
        return self

    def _plain(self) -> str:
        return self._guard.reveal(self)

    def _wrap(self, text: str) -> GuardedText:
        return GuardedText(text, self._guard)

    def _cut(self, spans: Iterable[tuple[int, int]]) -> list[GuardedText]:
        return [self._wrap(str.__getitem__(self, slice(start, stop))) for start, stop in spans]

    # What a template asks.

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return self._plain() == _plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._plain() < _plain(other)

    def __hash__(self) -> int:
        return hash(self._plain())

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self._plain()

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return self._plain().startswith(_plain(prefix), *bounds)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return self._plain().endswith(_plain(suffix), *bounds)

    def find(self, sub: str, *bounds: Any) -> int:
        return self._plain().find(_plain(sub), *bounds)

    def rfind(self, sub: str, *bounds: Any) -> int:
        return self._plain().rfind(_plain(sub), *bounds)

    def index(self, sub: str, *bounds: Any) -> int:
        return self._plain().index(_plain(sub), *bounds)

    def count(self, sub: str, *bounds: Any) -> int:
        return self._plain().count(_plain(sub), *bounds)

    # What a template takes from it.

    def __getitem__(self, key: SupportsIndex | slice) -> GuardedText:
        return self._wrap(str.__getitem__(self, key))

    def __iter__(self) -> Iterator[str]:
        return (self._wrap(char) for char in str.__iter__(self))

    def __add__(self, other: str) -> GuardedText:
        return self._wrap(str.__add__(self, other))

    def __radd__(self, other: str) -> GuardedText:
        return self._wrap(str.__add__(other, self))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._split(str.split, sep, maxsplit)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._split(str.rsplit, sep, maxsplit)

    def _split(self, how: Callable[..., list[str]], sep: str | None, maxsplit: SupportsIndex) -> list[GuardedText]:
        if sep is None:  # whitespace has no stand-ins
            return [self._wrap(part) for part in how(self, None, maxsplit)]
        parts = how(self._plain(), _plain(sep), maxsplit)
        spans, start = [], 0
        for part in parts:
            spans.append((start, start + len(part)))
            start += len(part) + len(sep)
        return self._cut(spans)

    def partition(self, sep: str) -> tuple[Any, Any, Any]:
        at = self.find(sep)
        return self._part_at(at, len(sep)) if at >= 0 else (self, self._wrap(""), self._wrap(""))

    def rpartition(self, sep: str) -> tuple[Any, Any, Any]:
        at = self.rfind(sep)
        return self._part_at(at, len(sep)) if at >= 0 else (self._wrap(""), self._wrap(""), self)

    def _part_at(self, at: int, width: int) -> tuple[GuardedText, GuardedText, GuardedText]:
        before, sep, after = self._cut([(0, at), (at, at + width), (at + width, len(self))])
        return before, sep, after

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return [self._wrap(line) for line in str.splitlines(self, keepends)]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> GuardedText:
        if not old:
            return self._wrap(str.replace(self, old, new, count))
        return self._wrap(str.join(new, self.split(old, count)))

    def strip(self, chars: str | None = None) -> GuardedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> GuardedText:
        return self[len(self) - len(self._plain().lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> GuardedText:
        return self[: len(self._plain().rstrip(_plain(chars)))]

    def lower(self) -> GuardedText:
        return self._change(str.lower)

    def upper(self) -> GuardedText:
        return self._change(str.upper)

    def capitalize(self) -> GuardedText:
        return self[:1]._change(str.capitalize) + self[1:].lower()

    def removeprefix(self, prefix: str) -> GuardedText:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> GuardedText:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def _change(self, change: Callable[[str], str]) -> GuardedText:
        """Applies a change of case: to the original of each stand-in, and to the rest as it is."""
        guard = self._guard
        return self._wrap(
            guard.stand_ins.sub(lambda match: guard.hide(change(guard.reveal(match[0]))), change(str.__str__(self)))
        )


def join_guarded(pieces: Iterable[str]) -> str:
    """`"".join(pieces)`, guarded where one of them is."""
    pieces = list(pieces)
    guard = next((piece._guard for piece in pieces if type(piece) is GuardedText), None)
    text = "".join(pieces)
    return text if guard is None else GuardedText(text, guard)


def _plain(value: Any) -> Any:
    if isinstance(value, GuardedText):
        return value._plain()
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value
