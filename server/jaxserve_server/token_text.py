"""How single tokens and their logprobs are written: completions' four lists, chat's entries, vLLM's maps.

The same float stands wherever one token's logprob does: clients compare them exactly to see whether a token
was the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from jaxserve.types import TokenLogprobs
from jaxserve_server.responses import ChatLogprobs, PromptLogprobs, TokenLogprob, TopLogprob

LOWEST: Final = -9999.0  # JSON has no -infinity; OpenAI and vLLM write this


def token_text(tokenizer: Any, token_id: int, *, as_id: bool = False) -> str:
    """A token as text; bytes that are no character by themselves as `bytes:\\xe4\\xb8`, so that none look alike."""
    if as_id:
        return f"token_id:{token_id}"
    data: bytes = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def likeliest(entry: TokenLogprobs, count: int) -> Iterator[tuple[int, float]]:
    """(token id, logprob) of the `count` likeliest tokens."""
    for token_id, logprob in entry.top[:count]:
        yield token_id, finite(entry.logprob if token_id == entry.token_id else logprob)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def top_map(tokenizer: Any, entry: TokenLogprobs, count: int, *, as_id: bool) -> dict[str, float]:
    """Completions' `top_logprobs` of one token: it, and the `count` likeliest.

    Of tokens that are written alike the likeliest stands.
    """
    pairs = [(entry.token_id, finite(entry.logprob)), *likeliest(entry, count)]
    found: dict[str, float] = {}
    for token_id, logprob in pairs:
        text = token_text(tokenizer, token_id, as_id=as_id)
        found[text] = max(logprob, found.get(text, logprob))
    return found


def chat_logprobs(tokenizer: Any, entries: Sequence[TokenLogprobs], count: int, *, as_id: bool) -> ChatLogprobs:
    """Chat's `logprobs` of some tokens, each with the `count` likeliest."""

    def described(token_id: int) -> tuple[str, list[int]]:
        return token_text(tokenizer, token_id, as_id=as_id), list(tokenizer.token_bytes(token_id))

    content = []
    for entry in entries:
        tops = []
        for token_id, logprob in likeliest(entry, count):
            text, data = described(token_id)
            tops.append(TopLogprob(text, logprob, data))
        text, data = described(entry.token_id)
        content.append(TokenLogprob(text, finite(entry.logprob), data, tops))
    return ChatLogprobs(content)


def prompt_maps(tokenizer: Any, entries: Sequence[TokenLogprobs | None], count: int) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: for each prompt token but the first, a map from token id."""
    maps: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            maps.append(None)
            continue
        ranked = [(entry.token_id, finite(entry.logprob), entry.rank)]
        ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(likeliest(entry, count), start=1)]
        found: dict[int, dict[str, Any]] = {}
        for token_id, logprob, rank in ranked:
            found.setdefault(
                token_id, {"logprob": logprob, "rank": rank, "decoded_token": token_text(tokenizer, token_id)}
            )
        maps.append(found)
    return maps
