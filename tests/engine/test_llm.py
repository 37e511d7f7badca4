"""`LLM` on the demo model: what a user of the library meets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve import LLM, BeamSearchParams, SamplingParams
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
        failed[-1:, 1:2] = next(steps) == 2  # the second row, in the last step of the third answer
        return replace(answer, failed=failed)

    monkeypatch.setattr(llm._core.runner, "fetch", failing_once)
    got = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in got].count("error") == 1
    for a, b in zip(want, got, strict=True):
        if b.outputs[0].finish_reason == "error":
            assert a.outputs[0].token_ids[: len(b.outputs[0].token_ids)] == b.outputs[0].token_ids
        else:
            assert a.outputs == b.outputs


def test_n_continuations_are_those_of_their_own_seeds(llm: LLM) -> None:
    """Of more prompts and continuations than rows and queue hold together."""
    prompts = ["The sun", "A fox and a bear", "Once upon a time there was a cat"] * 2
    params = SamplingParams(n=3, temperature=2.0, seed=11, max_tokens=12, logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    for output, again in zip(outputs[:3], outputs[3:], strict=True):
        assert [c.index for c in output.outputs] == [0, 1, 2]
        assert len({c.token_ids for c in output.outputs}) == 3
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in again.outputs]
        (alone,) = llm.generate(output.prompt or "", replace(params, n=1), use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids  # the first has the request's own seed
    stats = llm._core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


def test_best_of_returns_the_likeliest_of_those_that_n_would(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=2.0, seed=5, max_tokens=8, logprobs=1)
    (all_four,) = llm.generate("The moon", params, use_tqdm=False)
    assert len({c.token_ids for c in all_four.outputs}) == 4
    (best,) = llm.generate("The moon", replace(params, n=2, best_of=4, logprobs=None), use_tqdm=False)

    def mean(tokens: Any) -> float:
        return sum(t.logprob for t in tokens.logprobs) / len(tokens.token_ids)

    ranked = sorted(all_four.outputs, key=mean, reverse=True)[:2]
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in ranked]
    assert [c.index for c in best.outputs] == [0, 1]
    assert all(c.logprobs is None and c.cumulative_logprob is not None for c in best.outputs)


def test_a_stop_string_ends_one_continuation_and_leaves_the_others(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=16)
    (free,) = llm.generate("The sun is", params, use_tqdm=False)
    words = [set(c.text.split()) for c in free.outputs]
    word = sorted(words[0] - words[1] - words[2], key=len)[-1]
    (cut,) = llm.generate("The sun is", replace(params, stop=word), use_tqdm=False)
    assert cut.outputs[0].text == free.outputs[0].text.split(word)[0]
    assert cut.outputs[0].stop_reason == word
    for a, b in zip(cut.outputs[1:], free.outputs[1:], strict=True):
        if word not in b.text:
            assert a == b


def test_a_prompt_seen_before_is_not_computed_again(llm: LLM) -> None:
    prompt = "Once upon a time there was a fox who lived beside a river and had a friend, a bear who liked honey."
    llm.reset_prefix_cache()
    (first,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (second,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (other,) = llm.generate(prompt, GREEDY, use_tqdm=False, cache_salt="tenant")
    (again,) = llm.generate({"prompt": prompt, "cache_salt": "tenant"}, GREEDY, use_tqdm=False)
    num_prompt, block = len(first.prompt_token_ids), llm._core.limits.block_size
    assert num_prompt > block
    assert [o.num_cached_tokens for o in (first, other)] == [0, 0]
    for hit in (second, again):
        assert (num_prompt - 1) // block * block <= hit.num_cached_tokens < num_prompt
        assert hit.outputs == first.outputs
    assert llm.reset_prefix_cache() > 0
    (after,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert after.num_cached_tokens == 0
    (scored,) = llm.generate(prompt, replace(GREEDY, prompt_logprobs=1), use_tqdm=False)
    assert scored.prompt_logprobs is not None
    assert None not in scored.prompt_logprobs[1:]


def test_vllms_forms_of_a_prompt(llm: LLM) -> None:
    (plain,) = llm.generate("The sun is", GREEDY, use_tqdm=False)
    ids = list(plain.prompt_token_ids)
    forms: list[Any] = [{"prompt": "The sun is"}, {"prompt_token_ids": ids}, {"prompt": "x", "prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["The sun is", None, "x"]
    assert all(o.outputs == plain.outputs for o in outputs)
    for wrong in ({}, {"prompt": 5}, {"prompt": "x", "multi_modal_data": {}}, {"cache_salt": "s"}):
        with pytest.raises(ParameterError, match="A prompt's dict"):
            llm.generate(wrong, GREEDY, use_tqdm=False)
    for salt in ("", "x" * 257, 5):
        with pytest.raises(ParameterError, match="cache_salt"):
            llm.generate({"prompt": "x", "cache_salt": salt}, GREEDY, use_tqdm=False)
    with pytest.raises(ParameterError, match="2 cache salts for 1 prompts"):
        llm.generate("x", GREEDY, use_tqdm=False, cache_salt=["a", "b"])


def test_beam_search_returns_hypotheses_best_first(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.5)
    outputs = llm.beam_search(["The sun is", {"prompt": "A fox and"}] * 2, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["The sun is", "A fox and"] * 2
    for output, again in zip(outputs[:2], outputs[2:], strict=True):
        assert [s.token_ids for s in output.sequences] == [s.token_ids for s in again.sequences]
        scores = [s.score for s in output.sequences]
        assert len(set(output.sequences)) == 3
        assert scores == sorted(scores, reverse=True)
        for sequence in output.sequences:
            assert sequence.score == pytest.approx(sequence.cum_logprob / len(sequence.token_ids) ** 0.5, rel=1e-5)
            # the sum, from the logprobs of the same tokens as a prompt
            ids = [*output.prompt_token_ids, *sequence.token_ids]
            scorer = SamplingParams(max_tokens=1, prompt_logprobs=0)
            (scored,) = llm.generate(ids, scorer, use_tqdm=False)
            assert scored.prompt_logprobs is not None
            own = [t.logprob for t in scored.prompt_logprobs[len(output.prompt_token_ids) :] if t is not None]
            assert sequence.cum_logprob == pytest.approx(sum(own), abs=1e-3)  # eight float32 logprobs, 1e-4 each
    (greedy,) = llm.beam_search("The sun is", BeamSearchParams(beam_width=1, max_tokens=8), use_tqdm=False)
    (sampled,) = llm.generate("The sun is", replace(GREEDY, max_tokens=8), use_tqdm=False)
    assert greedy.sequences[0].token_ids == sampled.outputs[0].token_ids


def test_a_search_wider_than_the_batch_is_refused(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="4"):
        llm.beam_search("x", BeamSearchParams(beam_width=5), use_tqdm=False)


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
