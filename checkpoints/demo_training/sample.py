"""Asks a finished demo model some questions and prints its greedy answers.

    python checkpoints/demo_training/sample.py DIR [question …]

Without questions it asks a fixed list. DIR is a Hugging Face folder such as checkpoints/jaxserve_checkpoints/demo/chat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from demo_training.export import read_params
from demo_training.generate import answer, greedy
from demo_training.model import CHAT, DRAFT

QUESTIONS = (
    "Hello!", "Who are you?", "What is a block table?", "Explain continuous batching to me.",
    "what is speculative decoding",
    "What is the capital of France?", "What is 7 + 5?", "Tell me a joke.", "Tell me a story about a fox.",
    "Write a poem about the moon.", "Name three fruits.", "Why is the sky blue?", "What is the opposite of hot?",
    "How do I make tea?", "Who was Napoleon?", "Spell the word tree.", "Repeat after me: the stars are far away",
    "How big are you?", "Which planet is the largest?", "Thanks, bye!",
)  # fmt: skip
BEGINNINGS = ("Once upon a time", "The capital of France is", "A paged KV cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", nargs="*")
    args = parser.parse_args()
    config = DRAFT if args.folder.name == "draft" else CHAT
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    params = read_params(args.folder, config)
    for question in args.questions or QUESTIONS:
        print(f"> {question}\n{answer(params, config, tokenizer, [{'role': 'user', 'content': question}])}\n")
    for beginning in () if args.questions else BEGINNINGS:
        made = greedy(params, tokenizer.encode(beginning).ids, config, 100, config.eos_token_ids)
        print(f"| {beginning}{tokenizer.decode(made)}\n")


if __name__ == "__main__":
    main()
