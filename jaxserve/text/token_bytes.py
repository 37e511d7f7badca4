"""The exact bytes of every token, and how a tokenizer joins them to text.

Owns the reading of a tokenizer's decoder. Must not know prompts, streams or requests.

Two decoders are known, and they cover every family that jaxserve serves:

* byte-level BPE (GPT-2, Llama 3, SmolLM, Qwen): each character of a token stands for one byte;
* SentencePiece-like BPE (Llama 2, Mistral, Phi-3): `▁` is a space, `<0xE4>` is one byte, and the first
  space of a text is dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from jaxserve.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What each token adds to a text.

    Attributes:
        pieces: the bytes of each token id; b"" for an id that no token has.
        special_ids: tokens that `skip_special_tokens` hides.
        byte_ids: tokens that are one raw byte beside tokens that are whole characters (byte fallback);
            empty for a byte-level vocabulary, whose tokens may end anywhere in a character.
        leading_strip: how many spaces are dropped from the start of a text.
    """

    pieces: tuple[bytes, ...]
    special_ids: frozenset[int]
    byte_ids: frozenset[int]
    leading_strip: int

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token; b"" where the model's head is wider than the vocabulary."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""


@dataclass(frozen=True, slots=True)
class _DecoderPlan:
    """A decoder reduced to what it does to one token, and to the start of the text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    leading_strip: int = 0


def read_token_bytes(backend: Backend) -> TokenBytes:
    """Tabulates the bytes of every token.

    Raises:
        UnsupportedModelError: the decoder is neither byte-level nor SentencePiece-like.

    Cost: about 1 µs a token, once a load.
    """
    plan = _read_plan(backend)
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    byte_ids: list[int] = []
    byte_of = byte_of_char()
    for token, token_id in vocab.items():
        if plan.byte_level:
            try:
                pieces[token_id] = bytes([byte_of[char] for char in token])
            except KeyError:  # an added token, stored as plain text
                pieces[token_id] = token.encode()
            continue
        if plan.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            pieces[token_id] = bytes([int(match[1], 16)])
            byte_ids.append(token_id)
            continue
        for old, new in plan.replacements:
            token = token.replace(old, new)
        pieces[token_id] = token.encode()
    added = backend.get_added_tokens_decoder()
    special = frozenset(token_id for token_id, token in added.items() if token.special)
    return TokenBytes(tuple(pieces), special, frozenset(byte_ids), plan.leading_strip)


def byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others from U+0100 on.

    Source: GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read_plan(backend: Backend) -> _DecoderPlan:
    stages = _flatten(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    names = [stage["type"] for stage in stages]
    if names == ["ByteLevel"]:
        return _DecoderPlan(byte_level=True)
    replacements: list[tuple[str, str]] = []
    leading_strip, fused = 0, False
    for stage in stages:
        match stage:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                pass
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                leading_strip += start
            case _:
                raise _unsupported(names)
    if "ByteFallback" not in names:
        raise _unsupported(names)
    return _DecoderPlan(byte_fallback=True, replacements=tuple(replacements), leading_strip=leading_strip)


def _flatten(stage: dict) -> list[dict]:
    if stage["type"] != "Sequence":
        return [stage]
    return [leaf for inner in stage["decoders"] for leaf in _flatten(inner)]


def _unsupported(names: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The tokenizer's decoder {names or 'null'} is not supported. Supported are ['ByteLevel'] and "
        "['Replace', 'ByteFallback', 'Fuse', 'Strip'] (the last one optional)."
    )
