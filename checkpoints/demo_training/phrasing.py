"""How a question may be worded and spelled, and which wordings are held out for validation."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 1 / 16
_POLITE = re.compile(r"^(hi|hello|hey|please|okay|so|quick question|i have a question|one more question) ")
_IMPERATIVE = (
    "Tell",
    "Explain",
    "Write",
    "Name",
    "Give",
    "Say",
    "Describe",
    "List",
    "Teach",
    "Repeat",
    "Count",
    "Spell",
)
_PREFIXES = (
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "Okay, ",
    "So, ",
    "Quick question: ",
    "I have a question: ",
    "One more question: ",
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer.

    Attributes:
        brief: the answer under a system prompt that asks for few words; the same answer if empty.
        follow_ups: (question, answer) pairs that make sense right after this answer.
        fixed: the wording is never held out (the first wording of each question, and all follow-ups).
    """

    prompt: str
    answer: str
    kind: str
    brief: str = ""
    follow_ups: tuple[tuple[str, str], ...] = ()
    fixed: bool = False


def wording_key(prompt: str) -> str:
    """The prompt without case, punctuation, polite openings and spelling variants."""
    text = prompt.lower().replace("'s", " is").replace("’s", " is").replace("whats", "what is")
    text = text.replace("color", "colour").replace("favorite", "favourite")
    text = " ".join(re.sub(r"[^\w\s]", " ", text).split())
    while (shorter := _POLITE.sub("", text)) != text:
        text = shorter
    return text


def is_held_out(prompt: str) -> bool:
    """True for the 1 in 16 wordings that only validation sees."""
    digest = hashlib.sha256(wording_key(prompt).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def vary(rng: Random, prompt: str) -> str:
    """The prompt as different people would type it: with or without capitals, signs and greetings."""
    if rng.random() < 0.4:
        prompt = prompt.replace("colour", "color").replace("favourite", "favorite")
    if rng.random() < 0.12:
        prompt = prompt.replace("What is ", "What's ", 1)
    draw = rng.random()
    if prompt.startswith(_IMPERATIVE) and draw < 0.1:
        prompt = "Please " + prompt[0].lower() + prompt[1:]
    elif draw < 0.08:
        opening = rng.choice(_PREFIXES)
        prompt = opening + (prompt if opening.endswith("! ") else _lower_first(prompt))
    has_sign = prompt.endswith(("?", ".", "!"))
    style = rng.random()
    if style < 0.25:
        prompt = prompt.lower()
        return prompt.rstrip("?.!") if has_sign and rng.random() < 0.7 else prompt
    if style < 0.37:
        return prompt.rstrip("?.!") or prompt
    return prompt if has_sign or rng.random() < 0.4 else prompt + "."


def _lower_first(text: str) -> str:
    """Lower-cases the first letter, unless the first word is a name or "I"."""
    first = text.split(" ", 1)[0]
    common = {"What", "Which", "Why", "How", "Who", "Where", "When", "Is", "Are", "Can", "Do", "Does", "Tell", "Name"}
    return text[0].lower() + text[1:] if first in common else text


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(text: str) -> str:
    """Turns "a owl" into "an owl" everywhere in the text."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
