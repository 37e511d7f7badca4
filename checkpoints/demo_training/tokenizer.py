"""The demo's tokenizer: byte-level BPE, its control tokens and its chat template.

Every UTF-8 string round-trips, because all 256 bytes are in the vocabulary. The template begins with the
beginning-of-text token itself, so its output is encoded without added tokens; plain prompts get that token
from the tokenizer's post-processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import jinja2.sandbox
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo_training.corpus import Document

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
CONTROL = (BOS, EOS, IM_START, IM_END)  # ids 0 to 3
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant.') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` entries: control tokens, the 256 bytes, then learned pairs.

    Digits stay single, so that a number of any length is read digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def plain_text(document: Document) -> str:
    """What the tokenizer is trained on: contents and role names without control tokens."""
    return document.text or "\n".join(f"{message['role']}\n{message['content']}" for message in document.messages)


class Renderer:
    """Documents as token ids, through the very template that is shipped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
        self._answer_start = tokenizer.encode(f"{IM_START}assistant\n", add_special_tokens=False).ids
        self._im_end, eos = (tokenizer.encode(end, add_special_tokens=False).ids[0] for end in (IM_END, EOS))
        self.eos_ids = (self._im_end, eos)

    def chat_ids(self, messages: Iterable[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        text = self._template.render(
            messages=list(messages), bos_token=BOS, add_generation_prompt=add_generation_prompt
        )
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def document_ids(self, document: Document) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether the model is asked to write it (answers and plain text)."""
        if document.text:
            ids = [*self._tokenizer.encode(document.text).ids, self.eos_ids[1]]
            return ids, [index > 0 for index in range(len(ids))]
        ids = self.chat_ids(document.messages)
        return ids, self._answer_mask(ids)

    def _answer_mask(self, ids: list[int]) -> list[bool]:
        """True from each answer's first token to its end token."""
        mask, start, inside = [False] * len(ids), self._answer_start, False
        for index, token in enumerate(ids):
            mask[index] = inside
            if inside and token == self._im_end:
                inside = False
            elif not inside and ids[max(0, index + 1 - len(start)) : index + 1] == start:
                inside = True
        return mask


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as Hugging Face readers expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in CONTROL}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": IM_END,
        "pad_token": EOS,
        "additional_special_tokens": [IM_START],
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
