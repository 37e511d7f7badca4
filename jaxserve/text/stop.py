"""Stop strings, found over any borders of the pieces that a text comes in.

Owns the characters held back because they may begin a stop string. Must not know tokens.

The text is cut at the stop string that is complete first; of several that are complete at the same
character, the one that starts first. So the cut is a property of the text, not of how it was chunked.
Found with an Aho-Corasick automaton: its state is the longest end of the text that begins a stop string,
which is exactly what must be held back.

Source: Aho and Corasick, "Efficient string matching", CACM 18(6), 1975.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopPiece:
    """What one piece made certain.

    Attributes:
        text: characters that can be shown.
        stop: the stop string that ended the text, or None.
    """

    text: str
    stop: str | None = None


class StopChecker:
    """Cuts one text at the first stop string.

    Args:
        stop: non-empty strings, each of at most a few hundred characters.
        include_stop: the stop string itself is shown.

    Cost: the automaton takes about 1 µs a character of `stop`, each character of the text about 0.1 µs.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state")

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False):
        self._automaton = _Automaton(stop)
        self._include = include_stop
        self._state = 0
        self._held = ""

    def push(self, piece: str, *, armed: bool = True) -> StopPiece:
        """Adds `piece`. Where a stop string is complete, what follows it is dropped.

        Args:
            armed: False where no stop string may be complete yet (min_tokens); one may begin there.
        """
        automaton, state = self._automaton, self._state
        depth, cut = automaton.depth, automaton.longest_match
        for position, char in enumerate(piece):
            state = automaton.step(state, char)
            if armed and (length := cut[state]):
                text = self._held + piece[: position + 1]
                self._state, self._held = 0, ""
                return StopPiece(text if self._include else text[:-length], text[-length:])
        self._state = state
        text = self._held + piece
        shown = len(text) - depth[state]
        self._held = text[shown:]
        return StopPiece(text[:shown])

    def finish(self) -> str:
        """What was held back and now begins no stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """The trie of the stop strings with its failure links; node 0 is the root.

    Attributes:
        depth: of each node, in characters.
        longest_match: length of the longest stop string that ends at each node, 0 for none.
    """

    __slots__ = ("_children", "_fail", "depth", "longest_match")

    def __init__(self, words: Sequence[str]):
        self._children: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.longest_match = [0]
        for word in words:
            self._insert(word)
        self._link()

    def step(self, node: int, char: str) -> int:
        children = self._children
        while char not in children[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return children[node][char]

    def _insert(self, word: str) -> None:
        node = 0
        for char in word:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._children)
                self._children[node][char] = child
                self._children.append({})
                self._fail.append(0)
                self.depth.append(self.depth[node] + 1)
                self.longest_match.append(0)
            node = child
        self.longest_match[node] = len(word)

    def _link(self) -> None:
        """Points each node to the longest proper end of it that is a node too, breadth first."""
        level = list(self._children[0].values())
        while level:
            below: list[int] = []
            for node in level:
                if not self.longest_match[node]:
                    self.longest_match[node] = self.longest_match[self._fail[node]]
                for char, child in self._children[node].items():
                    self._fail[child] = self.step(self._fail[node], char)
                    below.append(child)
            level = below
