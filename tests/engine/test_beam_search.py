"""Beam search in the engine: Hugging Face's sequences and scores, and a plain reference's on the demo model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.models.decoder import forward, logits
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import BeamSearchParams, Delta, SamplingParams
from jaxserve_checkpoints.load import load_model

AnyParams = SamplingParams | BeamSearchParams
Run = Callable[..., list[list[Delta]]]
# What must decide a search for it to be comparable: two programs' float32 logits differ by less than 1e-6 and their
# sums of a dozen logprobs by less than this.
MIN_MARGIN = 3e-5
TOLERANCE = 1e-4  # of a sum of logprobs


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(repo: Path) -> ModuleType:
    return load(repo / "tests" / "engine" / "beam_reference.py")


@pytest.fixture(scope="module")
def goldens(repo: Path) -> dict[str, Any]:
    return json.loads((repo / "tests" / "engine" / "goldens" / "beams.json").read_text())


@pytest.fixture(scope="module")
def golden_model(repo: Path, goldens: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    tiny = load(repo / "scripts" / "make_tiny_models.py")
    folder = tiny.make(goldens["family"], tmp_path_factory.mktemp("tiny") / goldens["family"])
    weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    assert hashlib.sha256(weights).hexdigest() == goldens["weights_sha256"]
    return load_model(folder, dtype="float32")


class Dense:
    """Full recomputation of every sequence, without cache or paging; what was asked once is remembered.

    Args:
        pad_to: lengths are padded to a multiple of it, and the number of sequences to a power of two.
    """

    def __init__(self, model: ModelConfig, params: Any, pad_to: int):
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._pad_to = pad_to

        @jax.jit
        def run(tokens: jax.Array, last: jax.Array) -> jax.Array:
            num, length = tokens.shape

            def attend(window: int | None, kv: None, q: Any, k: Any, v: Any) -> tuple[jax.Array, None]:
                q, k, v = (x.reshape(num, length, *x.shape[1:]) for x in (q, k, v))
                scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
                scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
                out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
                return out.reshape(-1, *out.shape[2:]), kv

            positions = jnp.tile(jnp.arange(length), num)
            hidden, _ = forward(params, (None,) * model.num_layers, tokens.reshape(-1), positions, attend, model)
            return logits(params, hidden.reshape(num, length, -1)[:, last])

        self._run = run

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        missing = [tokens for tokens in sequences if tokens not in self._known]
        if missing:
            length = len(missing[0])
            shape = max(2, 1 << (len(missing) - 1).bit_length()), -(-length // self._pad_to) * self._pad_to
            padded = np.zeros(shape, np.int32)
            padded[: len(missing), :length] = missing
            found = np.asarray(self._run(padded, np.int32(length - 1)))
            self._known.update(zip(missing, found, strict=False))
        return np.stack([self._known[tokens] for tokens in sequences])

    def forget(self) -> None:
        self._known.clear()


def search(reference: ModuleType, dense: Dense, prompt: list[int], params: BeamSearchParams, eos: Sequence[int]) -> Any:
    """What the reference finds."""
    return reference.beam_search(
        dense,
        prompt,
        width=params.beam_width,
        max_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_ids={*params.stop_token_ids, *(() if params.ignore_eos else eos)},
    )


def check_deltas(deltas: list[Delta], searched: Any, params: BeamSearchParams, eos: Sequence[int]) -> None:
    """A search's deltas are one a hypothesis, the best first, and those of the reference."""
    assert [delta.index for delta in deltas] == list(range(params.beam_width))
    assert [delta.token_ids for delta in deltas] == [one.tokens for one in searched.found]
    for delta, one in zip(deltas, searched.found, strict=True):
        assert delta.cumulative_logprob is not None
        assert delta.score is not None
        assert abs(delta.cumulative_logprob - one.logprob) < TOLERANCE
        assert abs(delta.score - one.score) < TOLERANCE * max(1, len(one.tokens) ** -params.length_penalty)
        assert delta.finish_reason == ("stop" if one.stopped else "length")
        stopped_by = one.tokens[-1] if one.stopped else None
        assert delta.stop_reason == (None if stopped_by in eos else stopped_by)


def golden_params(case: dict[str, Any], eos: Sequence[int]) -> BeamSearchParams:
    more = [token for token in case["stop_ids"] if token not in eos]
    assert len(more) == len(case["stop_ids"]) - len(eos)
    names = ("beam_width", "max_tokens", "length_penalty", "early_stopping")
    return BeamSearchParams(stop_token_ids=more, **{name: case[name] for name in names})


def make_engine(model: ModelConfig, params: Any, **config: Any) -> EngineCore:
    """An engine with one bucket, so that who shares a step changes no bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
        return EngineCore(model, params, EngineConfig(compilation_cache_dir=None, **config))


@pytest.fixture(scope="module")
def tiny(golden_model: Any) -> ModelConfig:
    return golden_model.config


@pytest.fixture(scope="module")
def tiny_dense(golden_model: Any) -> Dense:
    return Dense(golden_model.config, golden_model.params, 48)


@pytest.fixture(scope="module")
def shared_core(golden_model: Any) -> EngineCore:
    """The goldens' model on twenty rows, with blocks of 4 tokens and steps of 24."""
    sizes = {"max_num_seqs": 20, "max_num_batched_tokens": 24, "block_size": 4, "num_gpu_blocks_override": 161}
    return make_engine(golden_model.config, golden_model.params, max_model_len=64, **sizes)


def test_reference_and_engine_find_what_hugging_face_finds(
    reference: ModuleType, goldens: dict[str, Any], tiny: ModelConfig, tiny_dense: Dense, core: EngineCore, run_all: Run
) -> None:
    eos = tiny.eos_token_ids
    cases = goldens["cases"]
    params = [golden_params(case, eos) for case in cases]
    all_deltas = run_all(core, [(case["prompt"], p) for case, p in zip(cases, params, strict=True)])
    for case, deltas, p in zip(cases, all_deltas, params, strict=True):
        searched = search(reference, tiny_dense, case["prompt"], p, eos)
        assert searched.margin > 1e-5
        assert [list(one.tokens) for one in searched.found] == [s["tokens"] for s in case["sequences"]]
        expected = [s["score"] for s in case["sequences"]]
        assert np.allclose([one.score for one in searched.found], expected, rtol=0, atol=2e-5)
        check_deltas(deltas, searched, p, eos)


SUBJECTS = ("The sun", "A fox", "The old king", "My sister", "Water", "In the town a bear")
PREDICATES = (" is", " went to the", " said that", " and the moon", ", who had", ". Then", " wants to eat")
PREDICATES += ("'s house was", " saw a big")


def test_fifty_prompts_beside_sampled_requests(reference: ModuleType, run_all: Run) -> None:
    loaded = load_model("demo", dtype="float32")
    model, tokenizer = loaded.config, Tokenizer.from_folder(loaded.folder)
    period = tokenizer.encode(".", add_special_tokens=False)
    searches: list[tuple[list[int], BeamSearchParams]] = []
    for i, (subject, predicate) in enumerate(product(SUBJECTS, PREDICATES)):
        for width in (2, 4, 8):
            params = BeamSearchParams(
                beam_width=width,
                max_tokens=10,
                length_penalty=(0.6, 1.0, 1.5)[i % 3],
                early_stopping=(False, True, "never")[i // 3 % 3],
                stop_token_ids=period if i % 2 else (),
            )
            searches.append((tokenizer.encode(subject + predicate), params))
    kinds: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 1.0}, {"top_k": 20, "logprobs": 1})
    sampled = [
        (prompt, SamplingParams(max_tokens=12, seed=i, **kinds[i % 3])) for i, (prompt, _) in enumerate(searches)
    ]
    mixed: list[tuple[list[int], AnyParams]] = [r for pair in zip(searches, sampled, strict=True) for r in pair]
    core = make_engine(model, loaded.params, max_num_seqs=48, max_num_batched_tokens=64, block_size=8, max_model_len=32)
    deltas = run_all(core, mixed)
    core.scheduler.check_integrity()
    assert tokens_of(deltas[1::2]) == tokens_of(run_all(core, sampled))
    dense = Dense(model, loaded.params, 24)
    num_compared = dict.fromkeys((2, 4, 8), 0)
    for (prompt, params), found in zip(searches, deltas[::2], strict=True):
        if params.beam_width == 2:
            dense.forget()
        searched = search(reference, dense, prompt, params, model.eos_token_ids)
        if searched.margin > MIN_MARGIN:
            check_deltas(found, searched, params, model.eos_token_ids)
            num_compared[params.beam_width] += 1
    assert min(num_compared.values()) >= 50, num_compared


def tokens_of(deltas: list[list[Delta]]) -> list[list[int]]:
    return [[token for delta in ones for token in delta.token_ids] for ones in deltas]


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 23, 24, 25])  # around blocks and around chunks
def test_prompts_that_end_anywhere_in_a_block(
    num_prompt: int,
    tiny: ModelConfig,
    core: EngineCore,
    tiny_dense: Dense,
    reference: ModuleType,
    run_all: Run,
) -> None:
    prompt = np.random.default_rng(100 + num_prompt).integers(4, tiny.vocab_size, num_prompt).tolist()
    requests = [(prompt, BeamSearchParams(beam_width=width, max_tokens=11)) for width in (1, 2, 3, 5, 16)]
    for (_, params), deltas in zip(requests, run_all(core, requests), strict=True):
        searched = search(reference, tiny_dense, prompt, params, tiny.eos_token_ids)
        assert searched.margin > MIN_MARGIN, "choose another seed"
        check_deltas(deltas, searched, params, tiny.eos_token_ids)
    core.scheduler.check_integrity()
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1


def test_a_whole_prompt_in_the_cache_begins_the_same_search(tiny: ModelConfig, core: EngineCore, run_all: Run) -> None:
    prompt = np.random.default_rng(70).integers(4, tiny.vocab_size, 16).tolist()
    params = BeamSearchParams(beam_width=4, max_tokens=9)
    core.reset_prefix_cache()
    (first,), (second,) = run_all(core, [(prompt, params)]), run_all(core, [(prompt, params)])
    assert [delta.token_ids for delta in first] == [delta.token_ids for delta in second]
    assert [delta.score for delta in first] == pytest.approx([delta.score for delta in second], abs=1e-5)
    assert (first[0].num_cached_tokens, second[0].num_cached_tokens) == (0, 15)


def test_a_prompt_that_enters_the_cache_by_another_as_the_search_begins(
    tiny: ModelConfig, core: EngineCore, run_all: Run
) -> None:
    """The first beam's row took the cache's block in place of its own, while the device gave its own to the others."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(4, tiny.vocab_size, 8).tolist()
    continued = prompt, SamplingParams(temperature=0, max_tokens=13, ignore_eos=True)
    (output,) = tokens_of(run_all(core, [continued]))
    searched = [*prompt, *output[:12]], BeamSearchParams(beam_width=4, max_tokens=14, ignore_eos=True)
    (expected,) = run_all(core, [searched])
    pool = core.scheduler.memory.pool
    for delay in range(11, 16):  # around the step in which the output enters the cache
        core.reset_prefix_cache()
        held, _ = pool.allocate(100)  # so that a block that is given up is soon somebody's
        core.add("first", core.check(*continued), "first")
        found = []
        for step in range(40):
            if step == delay:
                core.add("search", core.check(*searched), "search")
            elif step > delay:  # others take whatever block is free
                for other in rng.integers(4, tiny.vocab_size, (2, 11)).tolist():
                    check = core.check(other, SamplingParams(max_tokens=2, seed=0))
                    core.add(f"{other}", check, "other")
            found += [delta.token_ids for owner, delta in core.step() if owner == "search"]
        while core.has_work:
            core.step()
        pool.free(held)
        core.scheduler.check_integrity()
        assert found == [delta.token_ids for delta in expected], delay


def test_an_abort_in_mid_search_frees_everything(tiny: ModelConfig, core: EngineCore) -> None:
    prompt = np.random.default_rng(71).integers(4, tiny.vocab_size, 9).tolist()
    for num_steps in range(6):
        core.add("r", core.check(prompt, BeamSearchParams(beam_width=4, max_tokens=20)), 0)
        for _ in range(num_steps):
            assert core.step() == []
        assert core.abort("r") == 0
        while core.has_work:
            assert core.step() == []
        core.scheduler.check_integrity()
        assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1


def test_a_failed_step_begins_the_search_anew(tiny: ModelConfig, core: EngineCore, run_all: Run) -> None:
    prompt = np.random.default_rng(72).integers(4, tiny.vocab_size, 10).tolist()
    request = (prompt, BeamSearchParams(beam_width=4, max_tokens=12))
    (expected,) = run_all(core, [request])
    steps_left = iter(range(7))
    dispatch = core.runner.run

    def fail_once(*args: Any) -> Any:
        if next(steps_left, None) == 5:
            raise RuntimeError("the device fell over")
        return dispatch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.runner, "run", fail_once)
        (found,) = run_all(core, [request])
    assert [delta.token_ids for delta in found] == [delta.token_ids for delta in expected]


def test_logits_that_are_not_finite_end_only_their_search(golden_model: Any, core: EngineCore, run_all: Run) -> None:
    params = golden_model.params
    rng = np.random.default_rng(74)
    prompt = rng.integers(4, 140, 9).tolist()
    search_params = BeamSearchParams(beam_width=4, max_tokens=8)
    (expected,) = run_all(core, [(prompt, search_params)])
    with pytest.MonkeyPatch.context() as patch:
        poisoned = params | {"embed": params["embed"].at[149].set(jnp.nan)}
        patch.setattr(core.runner, "_params", poisoned)
        bad, found = run_all(core, [([*prompt, 149], search_params), (prompt, search_params)])
    assert [(delta.finish_reason, delta.error is None) for delta in bad] == [("error", False)]
    assert [delta.token_ids for delta in found] == [delta.token_ids for delta in expected]
    core.scheduler.check_integrity()
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1
