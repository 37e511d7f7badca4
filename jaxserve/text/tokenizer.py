"""Text to token ids and back, exactly as the model's own tokenizer has it.

Owns the difference between text that may spell control tokens (a raw prompt) and text that must not
(what a client puts in a chat). Must not know chat templates' syntax, requests or the engine.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxserve.errors import ParameterError, UnsupportedModelError
from jaxserve.text.detokenizer import decode_tokens
from jaxserve.text.guard import Guard, is_guardable
from jaxserve.text.token_bytes import read_token_bytes
from jaxserve.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

# The backend is linear in the text, 0.6 µs a character at worst: this is about three seconds of one core.
MAX_TEXT_CHARS = 4 * 1024 * 1024
# Brackets and bars make a token markup, such as `<think>`. Without them it is text: Gemma's "\n\n", GPT-NeoX's
# runs of spaces, are added tokens that any text must be able to use.
_MARKUP = re.compile(r"[<>\[\]{}|｜]")


class Tokenizer:
    """One model's tokenizer. Immutable, and safe to use from several threads; encoding releases the GIL.

    A *control token* is an added token that is special, or spelled as markup (`<tool_call>`): it steers the
    model. Raw prompts (`encode`) may spell them, as in vLLM. Chats (`encode_rendered`) cannot.

    Attributes:
        special_tokens: named special tokens as text, e.g. {"bos_token": "<s>"}.
        control_tokens: spelling to id.
        special_ids: ids that `skip_special_tokens` hides.
        token_bytes_table: the bytes of every token, for detokenizers.
        guard: stand-ins for every character that a control token is spelled with.
        chat_template: what tokenizer_config.json holds: a template, several by name, or None.
        vocab_size: number of tokens, added ones included.
        max_token_id: the highest id of them; ids may have gaps.
    """

    def __init__(self, files: TokenizerFiles):
        self._backend = files.backend
        self.special_tokens = files.special_tokens
        self.chat_template = files.chat_template
        self.token_bytes_table = read_token_bytes(files.backend)
        self.special_ids = self.token_bytes_table.special_ids
        self.vocab_size = files.backend.get_vocab_size(with_added_tokens=True)
        self.max_token_id = len(self.token_bytes_table.pieces) - 1
        added = files.backend.get_added_tokens_decoder()
        self.control_tokens = {token.content: token_id for token_id, token in added.items() if _is_control(token)}
        self.guard = Guard("".join(self.control_tokens))
        self._sealed = _SealedBackend(files.backend, added)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a Hugging Face folder.

        Raises:
            CheckpointError: its files are missing, malformed or contradict each other.
            UnsupportedModelError: its decoder is of an unknown kind.
        """
        return cls(read_tokenizer_files(Path(folder)))

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named_id("unk_token")

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """The ids of one text; see `encode_batch`."""
        return self.encode_batch([text], add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True
    ) -> list[list[int]]:
        """The ids of several texts, encoded in parallel.

        Args:
            add_special_tokens: put the tokens around each text that the model expects (BOS, mostly).
            parse_special: a control token's spelling becomes that token. Users of `/v1/completions` build
                chats by hand this way. False: it is text like any other.

        Raises:
            ParameterError: a text is longer than `MAX_TEXT_CHARS` or is not valid Unicode.
        """
        texts = list(texts)
        for text in texts:
            _check_length(text)
        if not parse_special:
            return self._sealed.encode(texts, add_special_tokens)
        return _encode(self._backend, texts, add_special_tokens)

    def encode_rendered(self, rendered: str, guard: Guard, add_special_tokens: bool = False) -> list[int]:
        """The ids of a rendered chat: only spellings without any guarded character become control tokens.

        Where no client text spells one, the ids are those of the plain text, token borders included.
        """
        _check_length(rendered, "messages")
        text = guard.reveal(self._sealed.seal(rendered))
        return self._sealed.encode([text], add_special_tokens, param="messages")[0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, the same that a stream of them joins to. Unknown ids have no text."""
        return decode_tokens(self.token_bytes_table, token_ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling, e.g. `Ġthe`; None for an unknown id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id <= self.max_token_id else None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to a text; they may be a part of a character."""
        return self.token_bytes_table.piece(token_id)

    def token_text(self, token_id: int) -> str:
        """A token alone as text, special or not; U+FFFD where its bytes are no character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


class _SealedBackend:
    """The same model with control tokens spelled so that no text can spell them.

    Each control token is renamed to a random word of private-use characters (with the same flags, so that
    splitting, stripping and normalising around it stay the same), and renamed back in the ids.
    """

    def __init__(self, backend: Backend, added: Mapping[int, AddedToken]):
        nonce = "".join(chr(0xE000 + secrets.randbelow(0x1000)) for _ in range(12))  # 144 bits
        clone = Backend(backend.model)  # shares the vocabulary
        if backend.normalizer is not None:
            clone.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            clone.pre_tokenizer = backend.pre_tokenizer
        spelling_of: dict[int, str] = {}
        tokens: list[AddedToken] = []
        for number, (token_id, token) in enumerate(sorted(added.items())):
            spelling_of[token_id] = f"{nonce}{chr(0xF0000 + number)}" if _is_control(token) else token.content
            tokens.append(_renamed(token, spelling_of[token_id]))
        clone.add_tokens(tokens)
        self._backend = clone
        self._word_of = {token.content: spelling_of[i] for i, token in added.items() if _is_control(token)}
        longest_first = sorted(self._word_of, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._true_ids = self._find_true_ids(backend, added, spelling_of)
        self._prefix, self._suffix = _special_affixes(backend)

    def seal(self, text: str) -> str:
        """Renames the control tokens that `text` spells."""
        return self._spelled.sub(lambda match: self._word_of[match[0]], text) if self._spelled else text

    def encode(self, texts: list[str], add_special_tokens: bool, param: str = "prompt") -> list[list[int]]:
        rows, true_ids = _encode(self._backend, texts, False, param), self._true_ids
        rows = [row if true_ids.keys().isdisjoint(row) else _replace_ids(row, true_ids) for row in rows]
        return [[*self._prefix, *row, *self._suffix] for row in rows] if add_special_tokens else rows

    def _find_true_ids(
        self, backend: Backend, added: Mapping[int, AddedToken], spelling_of: Mapping[int, str]
    ) -> dict[int, list[int]]:
        """What to write for an id of the clone, where that is not the id itself."""
        true_ids: dict[int, list[int]] = {}
        unknown = getattr(backend.model, "unk_token", None)
        for token_id, token in added.items():
            # A model may have the token in its own vocabulary and find it in plain text: that is undone,
            # except for <unk>, which stands for characters that the vocabulary lacks.
            if _is_control(token) and token.content != unknown and backend.model.token_to_id(token.content) is not None:
                true_ids[token_id] = [part.id for char in token.content for part in backend.model.tokenize(char)]
        for token_id, spelling in spelling_of.items():
            clone_id = self._backend.token_to_id(spelling)
            assert clone_id is not None, "it was added above"
            if spelling != added[token_id].content and backend.model.id_to_token(clone_id) is not None:
                raise UnsupportedModelError(
                    f"The tokenizer's vocabulary has gaps: id {clone_id} lies past its {backend.get_vocab_size(False)} "
                    "entries, and yet it is one of them. Number its ids without gaps."
                )
            if clone_id != token_id:
                true_ids[clone_id] = [token_id]
        return true_ids


def _encode(backend: Backend, texts: list[str], add_special_tokens: bool, param: str = "prompt") -> list[list[int]]:
    try:
        # `encode` holds the GIL for its whole time, the batch calls do not; `fast` leaves out offsets.
        return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    except TypeError as exc:
        raise ParameterError("The text is not valid Unicode: it holds a lone surrogate.", param=param) from exc


def _special_affixes(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after any text."""
    for probe in ("a", "0", " ", "<"):  # the first that the vocabulary has
        text = backend.encode(probe, add_special_tokens=False).ids
        whole = backend.encode(probe, add_special_tokens=True).ids
        for start in range(len(whole) - len(text) + 1):
            if text and whole[start : start + len(text)] == text:
                return whole[:start], whole[start + len(text) :]
    return [], []


def _replace_ids(row: list[int], true_ids: Mapping[int, list[int]]) -> list[int]:
    replaced: list[int] = []
    for token_id in row:
        replaced.extend(true_ids.get(token_id, (token_id,)))
    return replaced


def _renamed(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _is_control(token: AddedToken) -> bool:
    steers = token.special or _MARKUP.search(token.content) is not None
    return steers and any(is_guardable(char) for char in token.content)


def _check_length(text: str, param: str = "prompt") -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise ParameterError(
            f"The text must have at most {MAX_TEXT_CHARS} characters, got {len(text)}. Send a shorter one.",
            param=param,
            code="string_above_max_length",
        )
