"""Tokenizers for the text tests: two small ones made here, and the real ones of the data folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxserve.text.tokenizer import Tokenizer

DATA = Path(os.environ.get("JAXSERVE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
REAL = ("gpt2", "phi3-mini", "qwen2.5")
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun",
    "system user assistant tool im_start im_end end think thinking channel final analysis start message",
    "hello hello world worlds 123 1234 user: assistant: naïve café 世界 世界 🙂 you are a helpful assistant\n\n",
]
# Control tokens of the families that are served, and of the 17 templates in the data folder.
CONTROLS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "[INST]", "[/INST]")
_MARKUP = re.compile(r"<[^<>\s'\"{}]{1,40}>|\[/?[A-Z_]+\]")


def data_folder() -> Path:
    """The shared data, or a skip that says where it was looked for."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA} (set JAXSERVE_DATA)")
    return DATA


def save_byte_level(folder: Path, controls: tuple[str, ...]) -> Path:
    """A byte-level BPE with control tokens: every second one is not `special`, as Qwen's `<tool_call>`."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    specials = ["<s>", "</s>", *controls]
    backend.add_tokens(
        [AddedToken(token, special=i % 2 == 0, normalized=False) for i, token in enumerate(dict.fromkeys(specials))]
    )
    backend.add_tokens([AddedToken("    "), AddedToken("日本")])  # added, but text
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_sentencepiece_like(folder: Path) -> Path:
    """Llama 2's pipeline in small: `▁` for space, byte fallback, `<s>` in the model's own vocabulary."""
    letters = sorted({char for text in CORPUS for char in text if char.isascii() and char.isalnum()} | set("▁ï世|_:<>"))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "h"), ("l", "l"), ("he", "ll"), ("▁", "hell"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [left + right for left, right in merges]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in ("<unk>", "<s>", "</s>"):
        backend.add_special_tokens([AddedToken(token, normalized=False)])
    backend.add_special_tokens([AddedToken("<|user|>", normalized=False, rstrip=True)])
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, lstrip=True)])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(tmp_path_factory.mktemp("byte_level"), CONTROLS))


@pytest.fixture(scope="session")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece_like")))


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Tokenizer]:
    folder = data_folder() / "tokenizers"
    return {name: Tokenizer.from_folder(folder / name) for name in REAL}


@pytest.fixture(scope="session", params=("byte_level", "sentencepiece_like", *REAL))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each tokenizer in turn."""
    if request.param in REAL:
        return request.getfixturevalue("real_tokenizers")[request.param]
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backend]:
    """What `tokenizers` itself makes of the small tokenizers' files: an oracle for encoding and decoding."""
    byte_level = save_byte_level(tmp_path_factory.mktemp("byte_level_oracle"), CONTROLS)
    sentencepiece_like = save_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece_like_oracle"))
    return {
        "byte_level": Backend.from_file(str(byte_level / "tokenizer.json")),
        "sentencepiece_like": Backend.from_file(str(sentencepiece_like / "tokenizer.json")),
    }


@pytest.fixture(scope="session")
def template_sources() -> dict[str, str]:
    """The texts of the 17 real chat templates."""
    return {path.stem: path.read_text() for path in sorted((data_folder() / "chat_templates").glob("*.jinja"))}


@pytest.fixture(scope="session")
def every_control(template_sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer in which all markup of the 17 templates is a control token."""
    found = {spelling for source in template_sources.values() for spelling in _MARKUP.findall(source)}
    roles = {f"<|{role}|>" for role in ("system", "user", "assistant", "tool", "end")}
    controls = tuple(sorted({*found, *roles, *CONTROLS}))
    return Tokenizer.from_folder(save_byte_level(tmp_path_factory.mktemp("every_control"), controls))


@pytest.fixture(scope="session")
def data() -> Path:
    return data_folder()
