"""A continuation's tokens to its text: detokenised, cut at stop strings, and accounted for.

Owns what of a delta a client may see. Must not know HTTP or the engine: whoever reads the deltas aborts
the continuation when a stop string has ended its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxserve.errors import ParameterError
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stop import StopChecker
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import BeamSearchParams, Delta, FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one delta adds for the client.

    Attributes:
        text: characters that are certain: no part of a stop string, no unfinished character.
        token_ids: the delta's tokens; those after a stop string's end are left out.
        logprobs: one entry a token in `token_ids`, or None.
        text_starts: one entry a token in `token_ids`: where its text starts, in characters from the start
            of the completion as generated (before any cut).
        finish_reason: None until the last delta.
        stop_reason: the stop string or the stop token that ended it; None for end-of-sequence.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    text_starts: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class TextAssembler:
    """The text of one continuation.

    Args:
        params: `stop`, `min_tokens`, `include_stop_str_in_output`, `skip_special_tokens` and `detokenize`
            are honoured here; a beam search has neither of the first two.
        prompt_token_ids: decide whether the completion starts in the middle of a text.

    Raises:
        ParameterError: stop strings without detokenisation.

    Cost: about 2 µs a token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams | BeamSearchParams,
        prompt_token_ids: Sequence[int] = (),
    ):
        stop, self._min_tokens = (params.stop, params.min_tokens) if isinstance(params, SamplingParams) else ((), 0)
        if stop and not params.detokenize:
            raise ParameterError("'stop' needs the text: set detokenize to true, or use stop_token_ids.", param="stop")
        self._params = params
        self._detokenizer = Detokenizer(
            tokenizer.token_bytes_table,
            skip_special_tokens=params.skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._stop = StopChecker(stop, include_stop=params.include_stop_str_in_output) if stop else None
        self._num_tokens = 0
        self._num_chars = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        return self._finished

    def push(self, delta: Delta) -> TextDelta:
        """The client's view of `delta`. After the end, nothing more."""
        if self._finished:
            return TextDelta("")
        self._finished = delta.finish_reason is not None
        if not self._params.detokenize:
            return _whole(delta, "", (0,) * len(delta.token_ids))
        silent_last = delta.finish_reason == "stop" and not self._params.include_stop_str_in_output
        num_shown = len(delta.token_ids) - silent_last
        pieces: list[str] = []
        starts: list[int] = []
        for number, token_id in enumerate(delta.token_ids):
            starts.append(self._num_chars)
            self._num_tokens += 1
            piece = self._detokenizer.push((token_id,)) if number < num_shown else ""
            if piece and (stop := self._show(piece, pieces)) is not None:
                return self._cut(delta, pieces, starts, stop)
        if self._finished:
            if (stop := self._show(self._detokenizer.finish(), pieces)) is not None:
                return self._cut(delta, pieces, starts, stop)
            if self._stop is not None:
                pieces.append(self._stop.finish())
        return _whole(delta, "".join(pieces), tuple(starts))

    def _show(self, piece: str, pieces: list[str]) -> str | None:
        """Appends what of `piece` is certain; returns the stop string that it completes."""
        self._num_chars += len(piece)
        if self._stop is None:
            pieces.append(piece)
            return None
        result = self._stop.push(piece, armed=self._num_tokens > self._min_tokens)
        pieces.append(result.text)
        return result.stop

    def _cut(self, delta: Delta, pieces: list[str], starts: list[int], stop: str) -> TextDelta:
        """Ends the text at a stop string: the token that completed it is the last one that counts."""
        self._finished = True
        kept = len(starts)
        logprobs = None if delta.logprobs is None else delta.logprobs[:kept]
        return TextDelta("".join(pieces), delta.token_ids[:kept], logprobs, tuple(starts), "stop", stop)


def _whole(delta: Delta, text: str, starts: tuple[int, ...]) -> TextDelta:
    return TextDelta(text, delta.token_ids, delta.logprobs, starts, delta.finish_reason, delta.stop_reason)


@dataclass(frozen=True, slots=True)
class TextPart:
    """What one continuation of a request gained.

    Attributes:
        index: which one.
        cut: a stop string ended it, which the engine cannot see: it must be told.
    """

    index: int
    gain: TextDelta
    cut: bool = False


class Continuations:
    """The texts of all continuations of one request.

    Args:
        params: one `TextAssembler` for each of its `num_sequences`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams | BeamSearchParams,
        prompt_token_ids: Sequence[int] = (),
    ):
        self._assemblers = [TextAssembler(tokenizer, params, prompt_token_ids) for _ in range(params.num_sequences)]

    @property
    def finished(self) -> bool:
        """Whether all have ended."""
        return all(assembler.finished for assembler in self._assemblers)

    def push(self, delta: Delta) -> list[TextPart]:
        """The client's view of `delta`: one part a token, none for a continuation that had ended.

        "abort" and "error" end all continuations: then there is a part for each that was open.
        """
        parts = self._push_tokens(delta)
        if delta.finish_reason in ("abort", "error"):
            for index, assembler in enumerate(self._assemblers):
                if not assembler.finished:
                    parts.append(TextPart(index, assembler.push(Delta(finish_reason=delta.finish_reason))))
        return parts

    def _push_tokens(self, delta: Delta) -> list[TextPart]:
        assembler, parts = self._assemblers[delta.index], []
        for token in one_by_one(delta):
            if assembler.finished:
                break
            gain = assembler.push(token)
            parts.append(TextPart(delta.index, gain, cut=assembler.finished and delta.finish_reason is None))
        return parts


def one_by_one(delta: Delta) -> list[Delta]:
    """`delta` as deltas of one token each; the last has its end."""
    count = len(delta.token_ids)
    if count <= 1:
        return [delta]
    return [
        replace(
            delta,
            token_ids=(token_id,),
            logprobs=None if delta.logprobs is None else (delta.logprobs[i],),
            finish_reason=delta.finish_reason if i == count - 1 else None,
            stop_reason=delta.stop_reason if i == count - 1 else None,
        )
        for i, token_id in enumerate(delta.token_ids)
    ]
