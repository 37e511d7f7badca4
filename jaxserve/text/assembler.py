"""A request's tokens to its text: detokenised, cut at stop strings, and accounted for.

Owns what of a delta a client may see. Must not know HTTP or the engine: whoever reads the deltas aborts
the request when a stop string has ended the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import ParameterError
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stop import StopChecker
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Delta, FinishReason, SamplingParams, TokenLogprobs


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
    """The text of one request.

    Args:
        params: `stop`, `min_tokens`, `include_stop_str_in_output`, `skip_special_tokens` and `detokenize`
            are honoured here.
        prompt_token_ids: decide whether the completion starts in the middle of a text.

    Raises:
        ParameterError: stop strings without detokenisation.

    Cost: about 2 µs a token.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()):
        if params.stop and not params.detokenize:
            raise ParameterError("'stop' needs the text: set detokenize to true, or use stop_token_ids.", param="stop")
        self._params = params
        self._detokenizer = Detokenizer(
            tokenizer.token_bytes_table,
            skip_special_tokens=params.skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._stop = StopChecker(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None
        self._num_tokens = 0
        self._num_chars = 0
        self._finished = False

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
        result = self._stop.push(piece, armed=self._num_tokens > self._params.min_tokens)
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
