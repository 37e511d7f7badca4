"""`LLM`: the offline facade. Has an engine, a tokenizer and a chat template; is none of them."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.checks import check_cache_salt
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.errors import ConfigError, ParameterError
from jaxserve.results import Collected, ranked_params
from jaxserve.text.bad_words import resolve_bad_words
from jaxserve.text.chat import ChatOptions, encode_chat, load_chat_template
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import BeamSearchOutput, BeamSearchParams, RequestOutput, SamplingParams
from jaxserve_checkpoints.load import load_for_engine
from jaxserve_checkpoints.source import resolve

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Input:
    """One prompt as the engine takes it; `text` is None where the caller gave token ids or messages."""

    text: str | None
    token_ids: Sequence[int]
    cache_salt: str | None


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
        config: any field of `EngineConfig`, such as tensor_parallel_size=8 to cut the model over eight devices.

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
        try:
            engine_config = EngineConfig(**config)
        except TypeError as error:
            fields = ", ".join(EngineConfig.__dataclass_fields__)
            raise ConfigError(f"LLM does not know one of {sorted(config)}. It knows: {fields}.") from error
        if "stream_interval_ms" not in config:  # nobody reads before the end
            engine_config = replace(engine_config, stream_interval_ms=math.inf)
        loaded = load_for_engine(model, engine_config, dtype=dtype, revision=revision)
        folder = loaded.folder if tokenizer is None else resolve(tokenizer).folder
        self._tokenizer = Tokenizer.from_folder(folder)
        self._chat_template = load_chat_template(folder, self._tokenizer, chat_template)
        progress = _CompileProgress()
        try:
            self._core = EngineCore(loaded.config, loaded.params, engine_config, on_progress=progress)
        finally:
            progress.close()
        defaults: dict[str, Any] = dict(loaded.generation_defaults)
        self._default_params = SamplingParams(**defaults)
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self._default_params

    def reset_prefix_cache(self) -> int:
        """Forgets the KV of past prompts and outputs; returns how many blocks of it there were."""
        return self._core.reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        cache_salt: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt; results in the order of the prompts.

        Args:
            prompts: a text, or token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}, which may
                have a "cache_salt" of its own; or a list of these.
            sampling_params: one for all, or one each; the model's defaults if None.
            cache_salt: one for all, or one each: the prefix cache shows a prompt only what was computed
                under the same salt.

        Raises:
            RequestError: a prompt or parameter cannot be served; nothing was generated.
        """
        inputs = self._inputs(prompts, cache_salt)
        params = self._params_for(len(inputs), sampling_params)
        return [collected.request_output() for collected in self._run(inputs, params, use_tqdm)]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt that a search over `params.beam_width` beams finds.

        Args:
            prompts: as for `generate`.

        Raises:
            RequestError: a prompt or parameter cannot be served; nothing was generated.
        """
        inputs = self._inputs(prompts, None)
        return [collected.beam_output() for collected in self._run(inputs, [params] * len(inputs), use_tqdm)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        cache_salt: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
            cache_salt: as for `generate`.
        """
        if not messages:
            raise ParameterError("'messages' must not be empty.", param="messages", code="empty_array")
        several = not isinstance(messages[0], dict)
        conversations: Sequence[Any] = messages if several else [messages]
        params = self._params_for(len(conversations), sampling_params)
        salts = _salts_for(len(conversations), cache_salt)
        options = ChatOptions(add_generation_prompt=add_generation_prompt)
        encoded = [encode_chat(self._tokenizer, self._chat_template, list(c), options) for c in conversations]
        inputs = [_Input(None, ids, salt) for ids, salt in zip(encoded, salts, strict=True)]
        return [collected.request_output() for collected in self._run(inputs, params, use_tqdm)]

    def _inputs(
        self, prompts: Prompt | Sequence[Prompt], cache_salt: str | Sequence[str | None] | None
    ) -> list[_Input]:
        listed = _as_prompts(prompts)
        salts = _salts_for(len(listed), cache_salt)
        return [self._input(prompt, salt) for prompt, salt in zip(listed, salts, strict=True)]

    def _input(self, prompt: Prompt, salt: str | None) -> _Input:
        if isinstance(prompt, str):
            return _Input(prompt, self._tokenizer.encode(prompt), salt)
        if not isinstance(prompt, Mapping):
            return _Input(None, list(prompt), salt)
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if token_ids is None and isinstance(text, str):
            token_ids = self._tokenizer.encode(text)
        if token_ids is None or prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}:
            raise ParameterError(
                "A prompt's dict has a string 'prompt' or a list 'prompt_token_ids', and may have a 'cache_salt'; "
                f"got {sorted(prompt)}.",
                param="prompts",
            )
        own_salt = prompt.get("cache_salt")
        check_cache_salt(own_salt)
        return _Input(text, list(token_ids), salt if own_salt is None else own_salt)

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
        self, inputs: Sequence[_Input], params: Sequence[SamplingParams] | Sequence[BeamSearchParams], use_tqdm: bool
    ) -> list[Collected]:
        core = self._core
        asked = [ranked_params(p) if isinstance(p, SamplingParams) else p for p in params]
        admitted = [core.check(i.token_ids, p, i.cache_salt) for i, p in zip(inputs, asked, strict=True)]
        collected = [
            Collected(place, f"llm-{next(self._ids)}", i.text, i.token_ids, p, self._tokenizer)
            for place, (i, p) in enumerate(zip(inputs, params, strict=True))
        ]
        progress = _Progress(len(inputs), use_tqdm)
        waiting = iter(collected)
        num_open, bound = 0, core.limits.max_num_seqs + core.limits.max_num_queued_reqs // 2  # sequences
        try:
            while True:
                while num_open < bound and (owner := next(waiting, None)) is not None:
                    core.add(owner.request_id, admitted[owner.place], owner)
                    num_open += owner.params.num_sequences
                if not num_open:
                    break
                for owner, delta in core.step():
                    if owner.finished:
                        continue
                    for index in owner.push(delta):  # a stop string, which the engine cannot see
                        core.abort_sequence(owner.request_id, index, "stop")
                    if owner.finished:
                        num_open -= owner.params.num_sequences
                        progress.finish(owner.num_prompt_tokens, owner.num_output_tokens)
        finally:
            for owner in collected:
                core.abort(owner.request_id)
            progress.close()
        return collected


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed  # type: ignore[list-item]


def _salts_for(count: int, salts: str | Sequence[str | None] | None) -> list[str | None]:
    listed = [salts] * count if salts is None or isinstance(salts, str) else list(salts)
    if len(listed) != count:
        raise ParameterError(
            f"Got {len(listed)} cache salts for {count} prompts: give one for all or one each.", param="cache_salt"
        )
    for salt in listed:
        check_cache_salt(salt)
    return listed


class _CompileProgress:
    """A bar of the programs that are compiled, or loaded; shown once that has taken two seconds."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc="Compiling step programs", delay=2, leave=False, dynamic_ncols=True)
        self._lock = threading.Lock()

    def __call__(self, num_done: int, num_all: int, name: str, seconds: float) -> None:
        with self._lock:  # programs are compiled in several threads
            self._bar.total = num_all
            self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


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
