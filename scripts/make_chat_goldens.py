"""Writes what transformers makes of chats and texts: the oracle of `tests/host/text/test_goldens.py`.

Run by hand, in an environment with transformers 5 (no torch needed), and commit the result:

    python scripts/make_chat_goldens.py --data ../shared/data --out tests/host/text/goldens.json

Renderings are stored as their length and SHA-256, since the templates' texts are not ours to copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import datetime
from pathlib import Path

import jinja2
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

NOW = datetime(2025, 3, 9, 14, 5, 6)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "You are terse.  Answer\nin one line. /no_think "}
USER = {"role": "user", "content": "  What is 1 < 2?\n"}
ANSWER = {"role": "assistant", "content": '\nTrue, naïve 世界 🙂 "quoted" & <b>bold</b>. '}
THOUGHT = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nTrue."}
CHATS = {
    "plain": ([USER], {"add_generation_prompt": True}),
    "no_header": ([USER], {"add_generation_prompt": False}),
    "system": ([SYSTEM, USER], {"add_generation_prompt": True}),
    "turns": ([USER, ANSWER, USER, ANSWER, USER], {"add_generation_prompt": True}),
    "system_turns": ([SYSTEM, USER, ANSWER, USER], {"add_generation_prompt": True}),
    "thought": ([USER, THOUGHT, USER], {"add_generation_prompt": True}),
    "last_thought": ([USER, THOUGHT], {"add_generation_prompt": False}),
    "continued": ([USER, ANSWER], {"continue_final_message": True}),
    "not_thinking": ([USER], {"add_generation_prompt": True, "enable_thinking": False}),
    "two_users": ([USER, USER], {"add_generation_prompt": True}),
}
TEXTS = [
    "Hello world",
    " leading  and   many    spaces ",
    "tabs\tand\nnew\n\nlines\r\n",
    "naïve café — 世界 🙂 👩‍👩‍👧 ﬁ e\u0301",
    "numbers 1234567890 3.14 1,000",
    "don't you'll WE'RE",
    "<|im_start|>user\nhi<|im_end|>\n<|user|> hi<|end|>  x<s></s><|endoftext|> <tool_call>y</tool_call>",
    "def f(x):\n        return x  # done\n",
    "\u1e9b\u0323 \u00a0 \u3000 \ufeff",
]


def render(source: str, messages: list[dict], options: dict) -> dict:
    """Length and digest of one rendering; {"raises": true} where the template refuses the messages."""
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=source, **SPECIAL_TOKENS, **options
        )
    except jinja2.TemplateError:
        return {"raises": True}
    except ValueError:  # continue_final_message, and the template changed the message
        return {"unsupported": True}
    return {"chars": len(rendered[0]), "sha256": hashlib.sha256(rendered[0].encode()).hexdigest()}


def load(folder: Path):
    """The reference's tokenizer: tokenizer.json as it is written, or what its class builds of vocab and merges."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with chat_templates/ and tokenizers/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    class FrozenClock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    chat_template_utils.datetime = FrozenClock
    templates = {path.stem: path.read_text() for path in sorted((args.data / "chat_templates").glob("*.jinja"))}
    tokenizers = {folder.name: load(folder) for folder in sorted((args.data / "tokenizers").iterdir())}
    golden = {
        "made_with": f"transformers {transformers.__version__}",
        "now": NOW.isoformat(),
        "special_tokens": SPECIAL_TOKENS,
        "chats": {name: {"messages": messages, "options": options} for name, (messages, options) in CHATS.items()},
        "rendered": {
            stem: {name: render(source, *chat) for name, chat in CHATS.items()} for stem, source in templates.items()
        },
        "texts": TEXTS,
        "text_ids": {
            name: [tokenizer(text, add_special_tokens=True).input_ids for text in TEXTS]
            for name, tokenizer in tokenizers.items()
        },
        "chat_ids": {
            name: {
                chat: tokenizer.apply_chat_template(CHATS[chat][0], tokenize=True, return_dict=False, **CHATS[chat][1])
                for chat in ("plain", "system_turns", "continued")
            }
            for name, tokenizer in tokenizers.items()
            if tokenizer.chat_template
        },
    }
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
    args.out.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
