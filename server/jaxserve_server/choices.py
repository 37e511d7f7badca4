"""Choices between the engine and the wire: what each gained and has not shown yet, and which are answered.

A whole answer is a stream of one chunk: both are written by the same code, so their shapes cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET

from jaxserve.results import likeliest
from jaxserve.text.assembler import TextDelta
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.types import SamplingParams, TokenLogprobs
from jaxserve_server.generation import Gain, Job
from jaxserve_server.prompts import Prompt
from jaxserve_server.responses import ChatLogprobs, CompletionChoice, CompletionLogprobs, Usage, usage
from jaxserve_server.token_text import chat_logprobs, finite, prompt_maps, token_text, top_map


@dataclass(frozen=True, slots=True)
class Style:
    """How one request wants its choices written.

    Attributes:
        num_logprobs: likeliest tokens to list with each token; None for no logprobs.
        num_prompt_logprobs: the same for vLLM's `prompt_logprobs`.
        tokens_as_ids: tokens are written `token_id:N`.
        token_ids: ids are listed too.
        interval: tokens a chunk.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    tokens_as_ids: bool = False
    token_ids: bool = False
    interval: int = 1

    @property
    def every_token(self) -> bool:
        """Whether a token without text of its own is shown too."""
        return self.token_ids or self.num_logprobs is not None


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token with its logprobs; `entry` is None for a prompt's first. `start` is its place in the text."""

    token_id: int
    entry: TokenLogprobs | None
    start: int


@dataclass(slots=True)
class PromptState:
    """What all choices of one prompt have in common."""

    prompt: Prompt
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(slots=True)
class Choice:
    """The state of one choice. `add` what it gained, and `clear` what was shown.

    Attributes:
        num_tokens: completion tokens so far.
        logprob_sum: of these tokens, where the engine gives logprobs.
        begun: whether it gained anything yet.
        shown: chunks made so far.
        pieces, tokens, token_ids: not shown yet.
        base: where the completion begins in the choice's text: behind an echoed prompt.
    """

    index: int
    source: PromptState
    style: Style
    num_tokens: int = 0
    logprob_sum: float = 0.0
    begun: bool = False
    shown: int = 0
    base: int = 0
    pieces: list[str] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def prompt(self) -> Prompt:
        return self.source.prompt

    def add(self, part: TextDelta) -> None:
        self.begun = True
        self.num_tokens += len(part.token_ids)
        if part.text:
            self.pieces.append(part.text)
        self.token_ids += part.token_ids
        if part.logprobs is not None:
            self.logprob_sum += sum(entry.logprob for entry in part.logprobs)
            starts = (self.base + start for start in part.text_starts)
            self.tokens += map(ShownToken, part.token_ids, part.logprobs, starts)
        self.finish_reason, self.stop_reason = part.finish_reason, part.stop_reason

    def echo(self, text: str, starts: list[int], entries: tuple[TokenLogprobs | None, ...] | None) -> None:
        """Puts the prompt before the completion."""
        self.pieces += [text] if text else []
        self.base = len(text)
        if entries is not None:
            self.tokens += map(ShownToken, self.prompt.token_ids, entries, starts)

    @property
    def text(self) -> str:
        """What is not shown yet. Joined when it is read: adding to a string copies it each time."""
        return "".join(self.pieces)

    @property
    def due(self) -> bool:
        """Whether a chunk should be made now: the first and the last at once, others every `interval` tokens."""
        if self.finish_reason is not None:
            return True
        visible = bool(self.pieces) or (self.style.every_token and bool(self.token_ids))
        return visible and (self.shown == 0 or len(self.token_ids) >= self.style.interval)

    def clear(self) -> None:
        self.shown += 1
        self.pieces, self.tokens, self.token_ids = [], [], []

    def usage(self) -> Usage:
        return usage(len(self.prompt.token_ids), self.num_tokens, self.source.num_cached_tokens)


class Candidates:
    """The continuations of one prompt, of which some or all are answered.

    Attributes:
        choices: one a continuation; all of them, be they answered or not.
    """

    def __init__(self, job: Job, style: Style) -> None:
        self.source = PromptState(job.prompt)
        self._job = job
        first = job.index * job.num_choices
        self.choices = [Choice(first + i, self.source, style) for i in range(job.params.num_sequences)]

    def note(self, gain: Gain) -> None:
        """Keeps what the gain says of the prompt."""
        self.source.num_cached_tokens = max(self.source.num_cached_tokens, gain.num_cached_tokens)
        if gain.prompt_logprobs is not None:
            self.source.logprobs = gain.prompt_logprobs

    def best(self) -> list[Choice]:
        """The choices to answer, once all have ended: of more than were asked the likeliest, renumbered."""
        job, found = self._job, self.choices
        if len(found) == job.num_choices:
            return found
        if isinstance(job.params, SamplingParams):
            order = likeliest([c.logprob_sum for c in found], [c.num_tokens for c in found], job.num_choices)
        else:
            order = range(job.num_choices)  # a beam search gives the best first
        best = [found[i] for i in order]
        for index, choice in enumerate(best, start=job.index * job.num_choices):
            choice.index = index
        return best

    def num_completion_tokens(self) -> int:
        """Of all continuations, those that are not answered included."""
        return sum(choice.num_tokens for choice in self.choices)


def total_usage(prompts: list[Candidates]) -> Usage:
    """Each prompt counted once, however many continuations it has."""
    return usage(
        sum(len(candidates.source.prompt.token_ids) for candidates in prompts),
        sum(candidates.num_completion_tokens() for candidates in prompts),
        sum(candidates.source.num_cached_tokens for candidates in prompts),
    )


def completion_choice(choice: Choice, tokenizer: Any) -> CompletionChoice:
    """What `choice` has not shown yet, as /v1/completions writes it."""
    style = choice.style
    first = choice.shown == 0
    return CompletionChoice(
        index=choice.index,
        text=choice.text,
        logprobs=None if style.num_logprobs is None else completion_logprobs(choice, tokenizer, style.num_logprobs),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids if style.token_ids else UNSET,
        prompt_token_ids=list(choice.prompt.token_ids) if style.token_ids and first else UNSET,
        prompt_logprobs=choice_prompt_logprobs(choice, tokenizer) if first else UNSET,
    )


def completion_logprobs(choice: Choice, tokenizer: Any, count: int) -> CompletionLogprobs:
    as_id = choice.style.tokens_as_ids
    return CompletionLogprobs(
        text_offset=[token.start for token in choice.tokens],
        token_logprobs=[None if token.entry is None else finite(token.entry.logprob) for token in choice.tokens],
        tokens=[token_text(tokenizer, token.token_id, as_id=as_id) for token in choice.tokens],
        top_logprobs=[
            None if token.entry is None else top_map(tokenizer, token.entry, count, as_id=as_id)
            for token in choice.tokens
        ],
    )


def chat_choice_logprobs(choice: Choice, tokenizer: Any) -> ChatLogprobs | None:
    """The logprobs of what `choice` has not shown yet, as chat writes them; None if not asked."""
    if choice.style.num_logprobs is None:
        return None
    entries = [token.entry for token in choice.tokens if token.entry is not None]
    return chat_logprobs(tokenizer, entries, choice.style.num_logprobs, as_id=choice.style.tokens_as_ids)


def choice_prompt_logprobs(choice: Choice, tokenizer: Any) -> Any:
    count = choice.style.num_prompt_logprobs
    if count is None or choice.source.logprobs is None:
        return UNSET
    return prompt_maps(tokenizer, choice.source.logprobs, count)


def echoed(prompt: Prompt, tokenizer: Any) -> tuple[str, list[int]]:
    """The prompt's text, and where each of its tokens begins in it.

    A client's own text is echoed as it came. Tokens that were added before it begin at 0.
    """
    detokenizer = Detokenizer(tokenizer.token_bytes_table, skip_special_tokens=False)
    pieces, starts, length = [], [], 0
    for token_id in prompt.token_ids:
        starts.append(length)
        pieces.append(detokenizer.push((token_id,)))
        length += len(pieces[-1])
    decoded = "".join(pieces) + detokenizer.finish()
    if prompt.text is None:
        return decoded, starts
    added = len(decoded) - len(prompt.text) if decoded.endswith(prompt.text) else 0
    return prompt.text, [min(max(0, start - added), len(prompt.text)) for start in starts]
