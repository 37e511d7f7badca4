"""Tokens to text, a few at a time, so that the pieces join to the whole.

Owns the bytes that do not make a character yet. Must not know stop strings or requests.

Why not `tokenizers.decoders.DecodeStream`: it decodes its window again for every token, which is
quadratic while bytes stay ill-formed (171 µs a token after 2,000 of them), and it fails with "Invalid
prefix" when a later byte changes how an earlier one is shown. Joining bytes costs 0.4 µs a token always.

The text is what `tokenizers` decodes, but for one case: in a SentencePiece-like vocabulary, a run of
byte tokens that is ill-formed anywhere is shown there as U+FFFD from its first byte to its last. A stream
cannot take back a character, so here only the ill-formed bytes are.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from jaxserve.text.token_bytes import TokenBytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHAR_BYTES = 4
_MAX_TAIL_TOKENS = 16  # of a prompt, looked at for an unfinished character; tokens may be empty or special


class Detokenizer:
    """The text of one sequence.

    Args:
        table: the tokenizer's bytes.
        skip_special_tokens: special tokens add no text.
        prompt_token_ids: what stands before. Its text is never given again; it decides whether the first
            space is dropped, and a character that it leaves unfinished can be finished here.
    """

    __slots__ = ("_hidden", "_pending", "_pending_is_prompt", "_strip", "_table")

    def __init__(self, table: TokenBytes, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()):
        self._table = table
        self._hidden = table.special_ids if skip_special_tokens else frozenset[int]()
        self._strip = table.leading_strip if table.leading_strip and not self._shows_text(prompt_token_ids) else 0
        self._pending = self._unfinished_tail(prompt_token_ids)
        self._pending_is_prompt = bool(self._pending)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; bytes of an unfinished character are held back."""
        hidden, piece = self._hidden, self._table.piece
        if self._table.byte_ids:
            text = "".join([self._push_mixed(i) for i in token_ids if i not in hidden])
        else:
            text = self._push_bytes(b"".join([piece(i) for i in token_ids if i not in hidden]))
        return self._strip_start(text) if self._strip and text else text

    def finish(self) -> str:
        """The rest: U+FFFD for bytes that never became a character."""
        if self._pending_is_prompt:
            self._pending = b""
        if self._table.byte_ids:
            text = self._close_run()
            return self._strip_start(text) if self._strip and text else text
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text

    def _push_bytes(self, data: bytes) -> str:
        """Byte-level: one U+FFFD for each maximal ill-formed part."""
        if self._pending:
            if self._pending_is_prompt:
                self._resume(data)
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def _push_mixed(self, token_id: int) -> str:
        """A vocabulary in which a token is whole characters or one raw byte."""
        data = self._table.piece(token_id)
        if self._pending_is_prompt:
            self._resume(data)
        if token_id not in self._table.byte_ids:
            return self._close_run() + data.decode() if data else ""
        try:
            text, used = utf_8_decode(self._pending + data, "strict", False)
        except UnicodeDecodeError:
            return self._close_run() + self._push_mixed(token_id) if self._pending else REPLACEMENT
        self._pending = (self._pending + data)[used:]
        return text

    def _close_run(self) -> str:
        """Ends a run of byte tokens: one U+FFFD for each byte that made no character."""
        unfinished, self._pending = self._pending, b""
        return REPLACEMENT * len(unfinished)

    def _resume(self, data: bytes) -> None:
        """Forgets the prompt's unfinished character, unless `data` goes on with it."""
        if data:
            self._pending_is_prompt = False
            if not _is_character_start((self._pending + data)[: _num_bytes(self._pending[0])]):
                self._pending = b""

    def _strip_start(self, text: str) -> str:
        dropped = min(len(text) - len(text.lstrip(" ")), self._strip)
        self._strip = self._strip - dropped if dropped == len(text) else 0
        return text[dropped:]

    def _shows_text(self, token_ids: Sequence[int]) -> bool:
        return any(i not in self._hidden and self._table.piece(i) for i in token_ids)

    def _unfinished_tail(self, token_ids: Sequence[int]) -> bytes:
        """The bytes at the prompt's end that begin a character and do not finish it."""
        tail = b""
        for token_id in reversed(token_ids[-_MAX_TAIL_TOKENS:]):
            if token_id in self._hidden:
                continue
            if self._table.byte_ids and token_id not in self._table.byte_ids:
                break
            tail = self._table.piece(token_id) + tail
            if len(tail) >= _MAX_CHAR_BYTES:
                break
        for start in range(max(0, len(tail) - _MAX_CHAR_BYTES + 1), len(tail)):
            if _num_bytes(tail[start]) > len(tail) - start and _is_character_start(tail[start:]):
                return tail[start:]
        return b""


def _num_bytes(lead: int) -> int:
    """How many bytes the character has that a lead byte announces; 1 for any other byte."""
    return 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1


def _is_character_start(data: bytes) -> bool:
    """Whether more bytes, or none, can make `data` well-formed UTF-8."""
    try:
        utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def decode_tokens(table: TokenBytes, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of `token_ids`: what a stream of them joins to."""
    detokenizer = Detokenizer(table, skip_special_tokens=skip_special_tokens)
    return detokenizer.push(token_ids) + detokenizer.finish()
