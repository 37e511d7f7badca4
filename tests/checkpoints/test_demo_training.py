"""The demo's corpus, tokenizer, training step and the folders that are shipped."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import islice
from pathlib import Path

import jax
import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from demo_training import sources, stories
from demo_training.corpus import Document, documents
from demo_training.evaluate import agreement, losses, mean_losses
from demo_training.export import hf_tensors, read_params, write_folder
from demo_training.model import CHAT, DRAFT, init_params
from demo_training.optimizer import rate
from demo_training.packing import Batch, batches
from demo_training.phrasing import is_held_out, vary, wording_key
from demo_training.snapshot import load_state
from demo_training.tokenizer import BOS, CONTROL, EOS, IM_END, Renderer, plain_text, train_tokenizer
from demo_training.train import Run
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "jaxserve_checkpoints" / "demo"
FOLDERS = (("chat", CHAT), ("draft", DRAFT))
TOY = dataclasses.replace(
    DRAFT,
    vocab_size=400,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    layer_windows=(),
    num_heads=2,
    num_kv_heads=1,
)


def _take(number: int, split: str, seed: int = 0) -> list[Document]:
    return list(islice(documents(seed, split), number))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(TOY, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((plain_text(document) for document in _take(300, "train")), TOY.vocab_size)


# --- corpus


def test_equal_seeds_give_equal_documents() -> None:
    assert _take(200, "train", seed=3) == _take(200, "train", seed=3)
    assert _take(200, "train", seed=3) != _take(200, "train", seed=4)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_have_no_unresolved_placeholders(split: str) -> None:
    for document in _take(800, split):
        text = document.text or "\n".join(message["content"] for message in document.messages)
        assert not re.search(r"[{}\[\]|$]|^#|^[QA]:", text, re.MULTILINE), text
        assert not any(token in text for token in CONTROL)
        assert text == text.strip(), repr(text)


def test_chats_alternate_and_end_with_an_answer() -> None:
    for document in _take(300, "train"):
        roles = [message["role"] for message in document.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in document.messages)


def test_no_wording_is_in_both_splits() -> None:
    train = {wording_key(wording) for document in _take(3000, "train") for wording in document.wordings}
    validation = {wording_key(wording) for document in _take(400, "validation") for wording in document.wordings}
    assert len(train) > 1000
    assert len(validation) > 150
    assert not train & validation


def test_spelling_and_greetings_do_not_move_a_question_to_the_other_split() -> None:
    from random import Random

    rng = Random(0)
    for question in ("What is the capital of France?", "Tell me about owls", "Which colour is snow?"):
        keys = {wording_key(vary(rng, question)) for _ in range(200)}
        assert keys == {wording_key(question)}


def test_about_one_wording_in_sixteen_is_held_out() -> None:
    share = np.mean([is_held_out(f"question number {number}") for number in range(4000)])
    assert 0.05 < share < 0.075  # 1/16 plus or minus three standard deviations


def test_every_plot_fills_for_every_hero() -> None:
    from random import Random

    rng = Random(1)
    for _ in range(300):
        who = stories.cast(rng)
        text = stories.story_text(rng, who)
        assert who.name in text
        assert not re.search(r"\b[Aa] [aeiou]", text), text


def test_relations_have_distinct_questions_and_full_pairs() -> None:
    for table in sources.relations():
        assert len(set(table.questions)) == len(table.questions) >= 3, table.name
        assert len({left for left, _ in table.pairs}) == len(table.pairs), table.name


# --- tokenizer


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_every_string_round_trips(tokenizer: Tokenizer, text: str) -> None:
    if not any(token in text for token in CONTROL):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_plain_prompts_get_one_bos_and_chats_too(tokenizer: Tokenizer) -> None:
    (bos,) = tokenizer.encode(BOS, add_special_tokens=False).ids
    chat = Renderer(tokenizer).chat_ids([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    for ids in (tokenizer.encode("hi").ids, chat):
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_only_answers_and_plain_text_are_learned_at_full_weight(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer)
    messages = ({"role": "user", "content": "hi 12"}, {"role": "assistant", "content": "yes"})
    ids, mask = renderer.document_ids(Document(messages=messages * 2))
    learned = tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep], skip_special_tokens=False)
    assert learned == f"yes{IM_END}yes{IM_END}"
    ids, mask = renderer.document_ids(Document(text="yes"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}yes{EOS}"
    assert mask == [False] + [True] * (len(ids) - 1)


# --- training


def test_packed_rows_hold_whole_documents(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer)
    batch = next(batches(renderer, 0, "train", 4, 256))
    starts = (batch.positions == 0) & (batch.segments > 0)
    assert (batch.tokens[:, :-1][starts] == tokenizer.token_to_id(BOS)).all()
    assert (batch.weights[batch.segments == 0] == 0).all()
    assert np.mean(batch.segments > 0) > 0.8


def test_a_document_does_not_see_its_neighbours(params: Params, tokenizer: Tokenizer) -> None:
    batch = next(b for b in batches(Renderer(tokenizer), 0, "train", 1, 256) if (b.segments == 2).any())
    first = batch.segments[0] == 1
    tokens = batch.tokens.copy()
    tokens[0, int(np.sum(first)) + 1 :] = 5
    changed = batch._replace(tokens=tokens)
    before, after = (np.asarray(losses(params, b, TOY)) for b in (batch, changed))
    assert np.array_equal(before[first], after[first])
    second = batch.segments[0] == 2
    alone_start = int(np.argmax(second))
    alone = Batch(*(np.roll(part, -alone_start, axis=1) for part in batch))
    moved = np.asarray(losses(params, alone, TOY))[: int(np.sum(second))]
    np.testing.assert_allclose(moved, before[second], atol=1e-5)


def test_twenty_steps_lower_the_loss_and_a_resumed_run_takes_the_same_step(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run = Run.start(TOY, tokenizer, seed=0)
    stream = batches(Renderer(tokenizer), 0, "train", 4, 128)
    held = next(stream)
    before = float(np.sum(losses(run.params, held, TOY) * held.weights.reshape(-1)) / held.weights.sum())
    assert before == pytest.approx(np.log(TOY.vocab_size), abs=0.5)  # an untrained model guesses evenly
    for _ in range(20):
        run.update(next(stream), 1.0)
    run.save(tmp_path / "state.npz")
    assert run.update(held, 1.0) < before - 1.0
    resumed = Run.start(TOY, tokenizer, seed=1)
    resumed.resume(tmp_path / "state.npz")
    assert resumed.step == 20
    resumed.update(held, 1.0)
    for expected, found in zip(jax.tree.leaves(run.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="another model"):
        load_state(tmp_path / "state.npz", run.params)


def test_learning_rate_rises_stays_and_falls() -> None:
    assert rate(0, 0.0) < 0.05
    assert rate(100, 0.1) == rate(500, 0.55) == 1.0
    assert 1.0 > rate(600, 0.7) > rate(700, 0.9) > 0.0


def test_an_even_guesser_has_the_loss_of_an_even_guess(params: Params, tokenizer: Tokenizer) -> None:
    params = jax.tree.map(np.zeros_like, params)
    found = mean_losses(params, TOY, tokenizer, seed=0, num_batches=1)
    assert found == pytest.approx({"train_loss": np.log(400), "validation_loss": np.log(400)})
    assert agreement((params, TOY), (params, TOY), tokenizer, num_batches=1) == 1.0


def test_export_and_import_are_inverse(tmp_path: Path, params: Params, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, params, TOY, tokenizer)
    back = read_params(tmp_path, TOY)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=2**-8)  # bfloat16 keeps 8 bits
    assert hf_tensors(back, TOY)["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)


# --- what is shipped


def _json(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_shipped_files_fit_into_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12_000_000
    assert (DEMO / "README.md").is_file()


def test_chat_and_draft_share_a_tokenizer() -> None:
    assert (DEMO / "chat/tokenizer.json").read_bytes() == (DEMO / "draft/tokenizer.json").read_bytes()


@pytest.mark.parametrize(("name", "config"), FOLDERS)
def test_shipped_weights_match_their_config_and_are_finite(name: str, config: ModelConfig) -> None:
    stated = _json(DEMO / name / "config.json")
    assert stated["architectures"] == ["LlamaForCausalLM"]
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, ffn, vocab = (int(str(stated[key])) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    expected = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for index in range(int(str(stated["num_hidden_layers"]))):
        layer = f"model.layers.{index}."
        expected |= {f"{layer}{norm}.weight": [hidden] for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{layer}mlp.{part}_proj.weight": [ffn, hidden] for part in ("gate", "up")}
        expected |= {f"{layer}self_attn.{part}_proj.weight": [kv, hidden] for part in "kv"}
        expected[f"{layer}self_attn.q_proj.weight"] = [q, hidden]
        expected[f"{layer}self_attn.o_proj.weight"] = [hidden, q]
        expected[f"{layer}mlp.down_proj.weight"] = [hidden, ffn]
    with safe_open(DEMO / name / "model.safetensors", "numpy") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == expected  # noqa: SIM118
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
        for key in file.keys():  # noqa: SIM118
            array = file.get_tensor(key).astype(np.float32)
            assert np.isfinite(array).all()
            assert array.std() > 1e-3 or "norm" in key, key


@pytest.mark.parametrize(("name", "config"), FOLDERS)
def test_shipped_special_ids_agree(name: str, config: ModelConfig) -> None:
    folder = DEMO / name
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, generation = _json(folder / "config.json"), _json(folder / "generation_config.json")
    tokens = _json(folder / "tokenizer_config.json")
    assert tokenizer.get_vocab_size() == model["vocab_size"] == config.vocab_size
    ends = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(EOS)]
    assert model["eos_token_id"] == generation["eos_token_id"] == list(config.eos_token_ids) == ends
    assert model["bos_token_id"] == generation["bos_token_id"] == tokenizer.token_to_id(str(tokens["bos_token"]))
    assert tokenizer.token_to_id(str(tokens["eos_token"])) == ends[0]
    assert tokens["model_max_length"] == model["max_position_embeddings"]


def test_shipped_template_renders_every_role_and_refuses_others() -> None:
    tokens = _json(DEMO / "chat/tokenizer_config.json")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(str(tokens["chat_template"]))
    roles = ("system", "user", "assistant", "developer")
    messages = [{"role": role, "content": f" text of {role}\n"} for role in roles]
    text = template.render(messages=messages, bos_token="<|bos|>", add_generation_prompt=True)
    assert text == (
        "<|bos|><|im_start|>system\ntext of system<|im_end|>\n<|im_start|>user\ntext of user<|im_end|>\n"
        "<|im_start|>assistant\ntext of assistant<|im_end|>\n<|im_start|>system\ntext of developer<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="roles system, user and assistant"):
        template.render(messages=[{"role": "tool", "content": "x"}], bos_token="<|bos|>")
