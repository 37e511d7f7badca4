"""The corpus: an endless, seeded stream of documents, split by wording into training and validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from demo_training.dialogue import Message, conversation, prose

Split = Literal["train", "validation"]
PROSE_SHARE = 0.08
_LENGTHS = ((1, 45), (2, 22), (3, 15), (4, 10), (6, 8))


@dataclass(frozen=True, slots=True)
class Document:
    """Either a chat (`messages`) or plain text (`text`).

    Attributes:
        wordings: the user prompts that put the document into its split.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    wordings: tuple[str, ...] = ()


def documents(seed: int, split: Split) -> Iterator[Document]:
    """An endless stream; equal seeds give equal streams.

    Validation holds chats only: plain text has no wording that could be held out.
    """
    rng = Random(f"{split}-{seed}")  # noqa: S311  (text, not secrets)
    counts, weights = zip(*_LENGTHS, strict=True)
    while True:
        if split == "train" and rng.random() < PROSE_SHARE:
            yield Document(text=prose(rng))
            continue
        number = rng.choices(counts, weights)[0]
        messages, wordings = conversation(rng, number, held_out=split == "validation")
        yield Document(messages=tuple(messages), wordings=tuple(wordings))
