"""`bad_words` as token sequences: what the device can forbid.

Owns how a word may stand in a text. Must not know sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.checks import check_length
from jaxserve.errors import ParameterError
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS


def resolve_bad_words(tokenizer: Tokenizer, bad_words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell each word at the start of a text and after a space.

    vLLM leaves out the second where it has another number of tokens; then " word" could still be
    generated, so here both are always forbidden. Other splits of the same letters are not.

    Raises:
        ParameterError: the words make more than `MAX_BAD_WORDS` sequences, or one of more than
            `MAX_BAD_WORD_TOKENS` tokens.
    """
    check_length("bad_words", bad_words, MAX_BAD_WORDS)
    if not bad_words:
        return ()
    sequences: dict[tuple[int, ...], None] = {}  # a set that keeps the order
    for word in bad_words:
        bare = word.lstrip() or word
        for row in tokenizer.encode_batch([bare, f" {bare}"], add_special_tokens=False):
            if len(row) > MAX_BAD_WORD_TOKENS:
                raise ParameterError(
                    f"Invalid 'bad_words': {word[:64]!r} has {len(row)} tokens, at most {MAX_BAD_WORD_TOKENS} are "
                    "allowed. Forbid a shorter part of it.",
                    param="bad_words",
                    code="string_above_max_length",
                )
            if row:
                sequences[tuple(row)] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise ParameterError(
            f"Invalid 'bad_words': {len(bad_words)} words make {len(sequences)} token sequences (each with and "
            f"without a space before it), at most {MAX_BAD_WORDS} are allowed. Send fewer words.",
            param="bad_words",
            code="array_above_max_length",
        )
    return tuple(sequences)
