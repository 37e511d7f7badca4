"""Programs kept between starts: the same bits without a compilation, and never a wrong or broken one in silence."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine import compiled, executables, runner
from jaxserve.engine.compiled import compile_counter
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.executables import ExecutableStore, describe_tree, prune, rebuild_tree
from jaxserve.state import KVCache, StepOutput, init_decode_state
from jaxserve.types import Delta

LIMITS = EngineLimits(
    max_model_len=64,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_num_queued_reqs=8,
    num_blocks=9,
    max_blocks_per_row=16,
    kv_dtype="float32",
    token_buckets=(8,),
    q_tile=8,
    kv_tile=64,
)
ARGS = (jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32))


def add(kept: jax.Array, added: jax.Array) -> tuple[KVCache, jax.Array]:
    return KVCache(layers=(kept + added.astype(jnp.float32),), dtype="float32"), jnp.sum(added)


@pytest.fixture(scope="module")
def program() -> jax.stages.Compiled:
    return jax.jit(add, donate_argnums=(0,)).lower(*ARGS).compile()


@pytest.fixture
def store(tmp_path: Path, model: ModelConfig, program: jax.stages.Compiled) -> ExecutableStore:
    """A folder with one program, "add"."""
    made = ExecutableStore(tmp_path, model, LIMITS)
    made.save("add", ARGS, program)
    return made


def kept_file(folder: Path) -> Path:
    (path,) = (folder / "executables").iterdir()
    return path


def test_this_jax_is_supported() -> None:
    """If not, starts fall back to jax's own cache, which is slower: look at what changed in UnloadedMeshExecutable."""
    assert executables.is_supported()


def test_a_loaded_program_does_what_it_did(store: ExecutableStore, program: jax.stages.Compiled) -> None:
    before = compile_counter().count
    loaded = store.load("add", ARGS)
    assert loaded is not None
    assert compile_counter().count == before
    for added in (np.arange(3, dtype=np.int32), np.full(3, 7, np.int32)):  # the second call takes jax's fast path
        kept, expected = jnp.full(3, 0.1), program(jnp.full(3, 0.1), added)
        result = loaded(kept, added)
        assert kept.is_deleted(), "it is donated no more"
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
    with pytest.raises(TypeError, match="compiled"):
        loaded(jnp.ones(4), np.zeros(4, np.int32))


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "another processor": lambda patch: patch.setattr(executables, "processor", lambda: "x86_64\nflags: sse2"),
    "another version of the source": lambda patch: patch.setattr(executables, "source_digest", lambda: "0"),
    "another jax": lambda patch: patch.setattr(jax, "__version__", "0.0.1"),
    "other flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
    "other settings": lambda patch: jax.config.update("jax_default_matmul_precision", "bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_made_elsewhere_is_not_taken(
    change: str, store: ExecutableStore, tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ExecutableStore(tmp_path, model, LIMITS).load("add", ARGS) is not None
    try:
        CHANGES[change](monkeypatch)
        assert ExecutableStore(tmp_path, model, LIMITS).load("add", ARGS) is None
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def test_a_program_for_something_else_is_not_taken(
    store: ExecutableStore, tmp_path: Path, model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.load("sub", ARGS) is None
    assert store.load("add", (ARGS[0], jax.ShapeDtypeStruct((4,), jnp.int32))) is None
    assert store.load("add", (ARGS[0], jax.ShapeDtypeStruct((3,), jnp.uint32))) is None
    assert ExecutableStore(tmp_path, replace(model, rms_norm_eps=1e-5), LIMITS).load("add", ARGS) is None
    assert ExecutableStore(tmp_path, model, replace(LIMITS, kv_tile=32)).load("add", ARGS) is None
    assert not caplog.records, "that is no fault"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-20],
    "a flipped bit": lambda content: content[:-30] + bytes([content[-30] ^ 1]) + content[-29:],
    "another format": lambda content: content.replace(b"jaxserve executable 1", b"jaxserve executable 9"),
    "no code": lambda content: content[: content.index(b"\n", 30) + 1],
    "another result": lambda content: content.replace(b'"kind": "KVCache"', b'"kind": "KVCach_"'),
    "a result that is no state": lambda content: content.replace(b'"kind": "KVCache"', b'"kind": "struct"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_compiled_again_and_replaced(
    damage: str, store: ExecutableStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = kept_file(tmp_path)
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    assert path.read_bytes() != good
    assert store.load("add", ARGS) is None
    assert "compiling add instead" in caplog.text
    made = compiled._make_all({"add": partial(jax.jit(add).lower, *ARGS)}, store, True, None)["add"]
    assert not made.loaded
    assert compiled._make_all({"add": partial(jax.jit(add).lower, *ARGS)}, store, True, None)["add"].loaded


def test_what_cannot_be_kept_costs_a_line(tmp_path: Path, model: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    store = ExecutableStore(tmp_path, model, LIMITS)
    store.save("dict", ARGS, jax.jit(lambda a, b: {"first": a, "second": b}).lower(*ARGS).compile())
    assert "cannot keep the program dict" in caplog.text
    store._folder.rmdir()
    store.save("add", ARGS, jax.jit(add).lower(*ARGS).compile())
    assert "cannot keep the program add" in caplog.text


def test_a_program_out_of_jaxs_own_cache_is_not_kept(tmp_path: Path, model: ModelConfig) -> None:
    """XLA:CPU writes it without some of its functions, and it fails when it runs."""
    store = ExecutableStore(tmp_path, model, LIMITS)

    def lower(*args: Any) -> Any:
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        return SimpleNamespace(compile=jax.jit(add).lower(*args).compile)

    assert not compiled._make_all({"add": partial(lower, *ARGS)}, store, True, None)["add"].loaded
    assert not list((tmp_path / "executables").iterdir())


def test_trees_of_results_come_back() -> None:
    state = jax.eval_shape(lambda: init_decode_state(2, 4, 50))
    kv = KVCache(layers=(state.last_token,) * 3, dtype="bfloat16")
    output = StepOutput(*([state.last_token] * 4))
    tree = jax.tree.structure((kv, state, output))
    described = describe_tree(jax.tree.unflatten(tree, range(tree.num_leaves)))
    assert jax.tree.structure(rebuild_tree(described)) == tree
    with pytest.raises(TypeError, match="which is none of jaxserve"):
        describe_tree([1])


def test_old_programs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "executables").mkdir()
    entry = f"jit_step-{'0a' * 32}-cache"
    names = ["executables/new.executable", "executables/mid.executable", entry, "executables/old.executable"]
    foreign = ["thesis-final-cache", "executables/notes.txt", "old.executable"]
    for age, name in [*enumerate(names), *((900, name) for name in foreign)]:
        path = tmp_path / name
        path.write_bytes(b"x" * 100)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10 * age))
    assert prune(tmp_path, max_bytes=300, max_unused_s=3600.0) == 1
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*names[:3], *foreign}
    assert prune(tmp_path, max_bytes=300, max_unused_s=15.0) == 1
    assert not (tmp_path / entry).exists()


@pytest.fixture(scope="module")
def warm_folder(tmp_path_factory: pytest.TempPathFactory, make_core: Callable[..., EngineCore]) -> Path:
    """The cache that a first start has left."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    first = make_core(compilation_cache_dir=str(folder))
    assert first.runner.compiled.num_loaded == 0
    return folder


def joined(deltas: list[Delta]) -> tuple[Any, ...]:
    """Tokens and logprobs to the last bit, by continuation. How many come in one delta is a question of time: a loop of
    decode steps is as long as earlier ones were fast."""
    tokens: dict[int, list[int]] = defaultdict(list)
    logprobs: dict[int, list[Any]] = defaultdict(list)
    for delta in deltas:
        tokens[delta.index] += delta.token_ids
        logprobs[delta.index] += delta.logprobs or ()
    ends = [(d.index, d.finish_reason, d.stop_reason, d.cumulative_logprob, d.score) for d in deltas if d.finish_reason]
    return tokens, logprobs, sorted(ends), [d.prompt_logprobs for d in deltas if d.prompt_logprobs]


def test_a_second_start_compiles_nothing_and_answers_the_same_bits(
    warm_folder: Path,
    make_core: Callable[..., EngineCore],
    core: EngineCore,
    make_requests: Callable,
    run_all: Callable,
) -> None:
    before = compile_counter().count
    second = make_core(compilation_cache_dir=str(warm_folder))
    requests = make_requests(30, seed=8)
    answers = run_all(second, requests)
    assert compile_counter().count == before
    assert second.runner.compiled.num_loaded == len(second.runner.compiled.compile_s) > 10
    assert list(map(joined, answers)) == list(map(joined, run_all(core, requests)))


def test_a_kept_program_that_does_not_run_is_compiled(
    warm_folder: Path,
    make_core: Callable[..., EngineCore],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs: list[bool] = []
    warm_up, prepare = runner.Runner._warm_up, runner.compile_steps

    def fails_once(self: runner.Runner) -> Any:
        if len(runs) == 1:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function wrapped_iota not found")
        return warm_up(self)

    def spy(*args: Any, reuse: bool = True) -> Any:
        runs.append(reuse)
        return prepare(*args)  # compiling them again would take seconds

    monkeypatch.setattr(runner.Runner, "_warm_up", fails_once)
    monkeypatch.setattr(runner, "compile_steps", spy)
    make_core(compilation_cache_dir=str(warm_folder))
    assert runs == [True, False]
    assert "does not run" in caplog.text


def test_any_compilation_after_ready_is_counted(core: EngineCore) -> None:
    before = core.stats().num_compilations_after_ready
    jnp.zeros((3, 7, 11)) + 1  # an eager operation of a shape that nobody has used
    assert core.stats().num_compilations_after_ready > before
