"""`LLM`: the offline facade. Has an engine, a tokenizer and a chat template; is none of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.errors import ConfigError, ParameterError
from jaxserve.text.assembler import TextAssembler, TextDelta
from jaxserve.text.bad_words import resolve_bad_words
from jaxserve.text.chat import ChatOptions, encode_chat, load_chat_template
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import CompletionOutput, Delta, RequestOutput, SamplingParams, TokenLogprobs
from jaxserve_checkpoints.load import load_model
from jaxserve_checkpoints.source import resolve

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(slots=True, eq=False)
class _Collected:
    """One prompt's result while it grows."""

    index: int
    prompt: str | None
    token_ids: tuple[int, ...]
    assembler: TextAssembler
    text: list[str] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    last: TextDelta | None = None


class LLM:
    """A model to generate with, in this process and thread.

        llm = LLM("demo")
        for output in llm.generate(["The moon is", "A cat can"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Args:
        model: "demo", a folder in Hugging Face or converted form, or "org/name" of the hub.
        dtype: of the weights: "auto", "float32", "bfloat16" or "float16".
        tokenizer: folder of the tokenizer where it is not the model's.
        chat_template: file, or text, of a template that replaces the model's.
        revision: of a hub name.
        config: any field of `EngineConfig`.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: it cannot be served in these sizes.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        dtype: str = "auto",
        tokenizer: str | None = None,
        chat_template: str | None = None,
        revision: str | None = None,
        **config: Any,
    ) -> None:
        loaded = load_model(model, dtype=dtype, revision=revision)
        folder = loaded.folder if tokenizer is None else resolve(tokenizer).folder
        self._tokenizer = Tokenizer.from_folder(folder)
        self._chat_template = load_chat_template(folder, self._tokenizer, chat_template)
        try:
            engine_config = EngineConfig(**config)
        except TypeError as error:
            fields = ", ".join(EngineConfig.__dataclass_fields__)
            raise ConfigError(f"LLM does not know one of {sorted(config)}. It knows: {fields}.") from error
        self._core = EngineCore(loaded.config, loaded.params, engine_config)
        defaults: dict[str, Any] = dict(loaded.generation_defaults)
        self._default_params = SamplingParams(**defaults)
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self._default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt; results in the order of the prompts.

        Args:
            prompts: a text, or token ids, or a list of either.
            sampling_params: one for all, or one each; the model's defaults if None.

        Raises:
            RequestError: a prompt or parameter cannot be served; nothing was generated.
        """
        listed = _as_prompts(prompts)
        params = self._params_for(len(listed), sampling_params)
        encoded = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed]
        texts = [p if isinstance(p, str) else None for p in listed]
        return self._run(texts, encoded, params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
        """
        if not messages:
            raise ParameterError("'messages' must not be empty.", param="messages", code="empty_array")
        several = not isinstance(messages[0], dict)
        conversations: Sequence[Any] = messages if several else [messages]
        params = self._params_for(len(conversations), sampling_params)
        options = ChatOptions(add_generation_prompt=add_generation_prompt)
        encoded = [encode_chat(self._tokenizer, self._chat_template, list(c), options) for c in conversations]
        return self._run([None] * len(encoded), encoded, params, use_tqdm)

    def _params_for(self, count: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            listed = [params or self._default_params] * count
        else:
            listed = list(params)
        if len(listed) != count:
            raise ParameterError(
                f"Got {len(listed)} sampling_params for {count} prompts: give one for all or one each.",
                param="sampling_params",
            )
        return [
            replace(p, bad_words_token_ids=resolve_bad_words(self._tokenizer, p.bad_words)) if p.bad_words else p
            for p in listed
        ]

    def _run(
        self,
        texts: Sequence[str | None],
        encoded: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        core = self._core
        admitted = [core.check(ids, p) for ids, p in zip(encoded, params, strict=True)]
        results: list[RequestOutput | None] = [None] * len(encoded)
        ids = [f"llm-{next(self._ids)}" for _ in encoded]
        progress = _Progress(len(encoded), use_tqdm)
        waiting = iter(range(len(encoded)))
        num_open, bound = 0, core.limits.max_num_seqs + core.limits.max_num_queued_reqs // 2
        try:
            while True:
                while num_open < bound and (index := next(waiting, None)) is not None:
                    assembler = TextAssembler(self._tokenizer, params[index], encoded[index])
                    owner = _Collected(index, texts[index], tuple(encoded[index]), assembler)
                    core.add(ids[index], admitted[index], owner)
                    num_open += 1
                if not num_open:
                    break
                for owner, delta in core.step():
                    if results[owner.index] is None and _push(owner, delta):
                        results[owner.index] = _result(ids[owner.index], owner, params[owner.index])
                        core.abort(ids[owner.index], "stop")  # if a stop string ended it before the engine did
                        num_open -= 1
                        progress.finish(len(owner.token_ids), len(owner.output_ids))
        finally:
            for request_id in ids:
                core.abort(request_id)
            progress.close()
        return [r for r in results if r is not None]


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed  # type: ignore[list-item]


def _push(owner: _Collected, delta: Delta) -> bool:
    """Adds a delta; True when the result is complete, be it with finish_reason "error": the others go on."""
    if delta.prompt_logprobs is not None:
        owner.prompt_logprobs = delta.prompt_logprobs
    text = owner.assembler.push(delta)
    owner.text.append(text.text)
    owner.output_ids.extend(text.token_ids)
    owner.logprobs.extend(text.logprobs or ())
    owner.last = text
    return text.finish_reason is not None


def _result(request_id: str, owner: _Collected, params: SamplingParams) -> RequestOutput:
    assert owner.last is not None
    logprobs = tuple(owner.logprobs) if params.logprobs is not None else None
    output = CompletionOutput(
        index=0,
        text="".join(owner.text),
        token_ids=tuple(owner.output_ids),
        cumulative_logprob=sum(t.logprob for t in logprobs) if logprobs is not None else None,
        logprobs=logprobs,
        finish_reason=owner.last.finish_reason,
        stop_reason=owner.last.stop_reason,
    )
    return RequestOutput(
        request_id=request_id,
        prompt=owner.prompt,
        prompt_token_ids=owner.token_ids,
        outputs=(output,),
        finished=True,
        prompt_logprobs=owner.prompt_logprobs,
    )


class _Progress:
    """vLLM's progress bar: prompts done, and token rates in and out."""

    def __init__(self, total: int, shown: bool) -> None:
        from tqdm import tqdm  # costs 30 ms; only offline runs show a bar

        self._bar = tqdm(total=total, desc="Processed prompts", disable=not shown, dynamic_ncols=True)
        self._input = self._output = 0

    def finish(self, num_input: int, num_output: int) -> None:
        self._input += num_input
        self._output += num_output
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9) if not self._bar.disable else 1.0
        self._bar.set_postfix_str(
            f"est. speed input: {self._input / elapsed:.2f} toks/s, output: {self._output / elapsed:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
