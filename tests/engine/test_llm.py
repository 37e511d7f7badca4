"""`LLM` on the demo model: what a user of the library meets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import CheckpointError, ConfigError, ContextLengthError, ParameterError

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> LLM:
    config: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "compilation_cache_dir": None}
    return LLM("demo", max_model_len=256, max_num_queued_reqs=4, **config)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [
        "The sun",
        "A fox and a bear",
        "Once upon a time there was a cat",
        "Water",
        "One, two",
        "The moon is",
    ] * 3
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)  # more than rows and queue together
    assert [o.prompt for o in outputs] == prompts
    assert [o.outputs[0].text for o in outputs[:6]] == [o.outputs[0].text for o in outputs[6:12]]
    for output in outputs:
        assert output.finished
        assert output.outputs[0].finish_reason in ("stop", "length")
        text = llm.get_tokenizer().decode(output.outputs[0].token_ids)
        assert output.outputs[0].text == text or output.outputs[0].text.strip() == text.strip()


def test_one_prompt_or_token_ids_or_params_each(llm: LLM) -> None:
    (by_text,) = llm.generate("The sun is", GREEDY, use_tqdm=False)
    (by_ids,) = llm.generate(list(by_text.prompt_token_ids), GREEDY, use_tqdm=False)
    assert by_ids.prompt is None
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids
    short, long = llm.generate(["The sun", "The sun"], [SamplingParams(max_tokens=2), GREEDY], use_tqdm=False)
    assert len(short.outputs[0].token_ids) == 2 < len(long.outputs[0].token_ids)
    with pytest.raises(ParameterError, match="2 sampling_params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_chat_answers_and_several_chats_at_once(llm: LLM) -> None:
    hello = [{"role": "user", "content": "Hello!"}]
    france = [{"role": "user", "content": "What is the capital of France?"}]
    (one,) = llm.chat(hello, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    both = llm.chat([hello, france], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    assert one.outputs[0].text == both[0].outputs[0].text
    assert "Paris" in both[1].outputs[0].text
    assert both[1].outputs[0].finish_reason == "stop"


def test_stop_strings_logprobs_and_bad_words(llm: LLM) -> None:
    (free,) = llm.generate("The sun is", GREEDY, use_tqdm=False)
    word = free.outputs[0].text.split()[2]
    params = SamplingParams(temperature=0, max_tokens=24, stop=word, logprobs=2, prompt_logprobs=0)
    (cut,) = llm.generate("The sun is", params, use_tqdm=False)
    assert cut.outputs[0].text == free.outputs[0].text.split(word)[0]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", word)
    assert cut.outputs[0].logprobs is not None
    assert len(cut.outputs[0].logprobs) == len(cut.outputs[0].token_ids)
    assert cut.outputs[0].cumulative_logprob == sum(t.logprob for t in cut.outputs[0].logprobs)
    assert cut.prompt_logprobs is not None
    assert len(cut.prompt_logprobs) == len(cut.prompt_token_ids)
    (without,) = llm.generate(
        "The sun is", SamplingParams(temperature=0, max_tokens=24, bad_words=[word]), use_tqdm=False
    )
    assert word not in without.outputs[0].text.split()


def test_a_bad_request_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="256 tokens"):
        llm.generate(["fine", "x " * 400], GREEDY, use_tqdm=False)
    with pytest.raises(ParameterError, match="at least one token"):
        llm.generate([[]], GREEDY, use_tqdm=False)
    stats = llm._core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


def test_one_request_s_nan_costs_the_others_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["The sun", "A fox and a bear", "Water"]
    want = llm.generate(prompts, GREEDY, use_tqdm=False)
    fetch, steps = llm._core.runner.fetch, iter(range(10**6))

    def failing_once(running: Any) -> Any:
        answer = fetch(running)
        failed = answer.failed.copy()
        failed[1:2] = next(steps) == 3  # the second row of the fourth step
        return replace(answer, failed=failed)

    monkeypatch.setattr(llm._core.runner, "fetch", failing_once)
    got = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in got].count("error") == 1
    for a, b in zip(want, got, strict=True):
        if b.outputs[0].finish_reason == "error":
            assert a.outputs[0].token_ids[: len(b.outputs[0].token_ids)] == b.outputs[0].token_ids
        else:
            assert a.outputs == b.outputs


def test_the_bar_shows_speeds(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["The sun", "The moon"], GREEDY)
    shown = capfd.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "toks/s" in shown


def test_what_cannot_be_loaded_or_served_is_said() -> None:
    with pytest.raises(CheckpointError):
        LLM("no/such-model-anywhere")
    with pytest.raises(ConfigError, match=r"does not know one of \['max_seqs'\].*max_num_seqs"):
        LLM("demo", max_seqs=3)
