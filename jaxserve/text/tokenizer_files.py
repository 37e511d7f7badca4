"""A model folder's tokenizer files, read into one `tokenizers` backend.

Owns the file formats. Must not know how text is encoded with the result. Follows what transformers does
with the same files, so that the ids are the ones that the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from jaxserve.errors import CheckpointError

# Source: transformers, models/qwen2/tokenization_qwen2.py.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: complete: added tokens, special flags and post-processor as the folder wants them.
        special_tokens: named special tokens, e.g. "bos_token" to "<s>", as chat templates get them.
        chat_template: the text in tokenizer_config.json; by name where it holds several.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    chat_template: str | Mapping[str, str] | None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, and the two configs beside them.

    Raises:
        CheckpointError: files are missing, malformed, or contradict each other.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    named = _named_tokens(config, read_json_object(folder / "special_tokens_map.json"))
    backend = _read_backend(folder, config)
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, config.get("added_tokens_decoder") or {})
    listed = [_content(token) for key in _LISTED for token in config.get(key) or ()]
    _mark_special(backend, [*named.values(), *listed])
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = named.get("bos_token") if config.get("add_bos_token") else None
        eos = named.get("eos_token") if config.get("add_eos_token") else None
        _set_post_processor(backend, bos, eos)
    return TokenizerFiles(backend, named, _template(config.get("chat_template")))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _read_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            return Backend.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            return _byte_level_bpe(BPE.from_file(str(vocab), str(merges)), str(config.get("tokenizer_class", "")))
    except CheckpointError:
        raise
    except Exception as exc:  # the backend raises plain Exception for any malformed file
        raise CheckpointError(f"The tokenizer files in {folder} cannot be read: {exc}") from exc
    raise CheckpointError(f"{folder} has no tokenizer: put tokenizer.json there, or vocab.json and merges.txt.")


def _byte_level_bpe(model: BPE, tokenizer_class: str) -> Backend:
    """The pipeline that vocab.json and merges.txt leave unsaid."""
    backend = Backend(model)
    backend.decoder = decoders.ByteLevel()
    match tokenizer_class.removesuffix("Fast"):
        case "Qwen2Tokenizer":
            backend.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False)
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        case "GPT2Tokenizer":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        case other:
            raise CheckpointError(
                f"vocab.json and merges.txt do not say how text is split, and tokenizer_class {other!r} is not "
                "known. Known are Qwen2Tokenizer and GPT2Tokenizer; for others, add a tokenizer.json."
            )
    return backend


def _add_tokens(backend: Backend, entries: Mapping[str, Any]) -> None:
    """Adds what the config lists and the backend lacks, in the order of ids, and checks the ids."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    try:
        tokens = {int(token_id): _added_token(entry) for token_id, entry in entries.items()}
    except (TypeError, ValueError, KeyError) as exc:
        raise CheckpointError(f"tokenizer_config.json has a malformed added_tokens_decoder: {exc!r}") from exc
    backend.add_tokens([token for _, token in sorted(tokens.items()) if repr(token) not in known])
    for token_id, token in tokens.items():
        if (actual := backend.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"tokenizer_config.json gives the added token {token.content!r} the id {token_id}, but the "
                f"vocabulary gives it {actual}."
            )


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry})


def _mark_special(backend: Backend, contents: list[str]) -> None:
    """Makes named tokens special. One that the vocabulary lacks stays text: the model has no row for it."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    marked = []
    for content in dict.fromkeys(contents):
        known = added.get(content)
        if (known is not None and known.special) or backend.token_to_id(content) is None:
            continue
        flags = {flag: getattr(known, flag) for flag in _FLAGS} if known else {"normalized": False}
        marked.append(AddedToken(content, **(flags | {"special": True})))
    backend.add_special_tokens(marked)


def _set_post_processor(backend: Backend, bos: str | None, eos: str | None) -> None:
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    for token, token_id in ids.items():
        if token_id is None:
            raise CheckpointError(f"tokenizer_config.json wants {token!r} added to texts: it is not in the vocabulary.")
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=list(ids.items()),
    )


def _named_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; the first config that has a name wins."""
    named: dict[str, str] = {}
    for config in configs:
        for name in _NAMED:
            if config.get(name) is not None:
                named.setdefault(name, _content(config[name]))
    return named


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"A special token must be a non-empty string, or an object with one; got {token!r}.")
    return content


def _template(value: Any) -> str | Mapping[str, str] | None:
    if isinstance(value, list):  # [{"name": "default", "template": "..."}, ...]
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in value}
        except (TypeError, KeyError) as exc:
            raise CheckpointError(f"tokenizer_config.json has a malformed list of chat templates: {exc!r}") from exc
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError(f"tokenizer_config.json has a chat_template of type {type(value).__name__}: expected text.")
