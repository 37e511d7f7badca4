"""Does company change what a request gets? Greedy answers in a crowd, by eights and alone, compared.

    python -m benchmarks.agreement [--model demo] [--dtype auto] [--quick] [--json FILE]

Counts requests whose tokens differ from the crowd's, and, where tokens agree, logprobs that differ in any bit.
"""

from __future__ import annotations

import argparse

from benchmarks.report import Report
from jaxserve import LLM, SamplingParams
from jaxserve.types import CompletionOutput

QUESTIONS = (
    *("Hello!", "Who are you?", "What is the capital of France?", "Tell me a story about a fox."),
    *("What is a block table?", "Tell me a joke.", "Name three fruits.", "Explain paged attention."),
    *("Tell me a story about a king.", "What is rain?"),
)


def ask(llm: LLM, count: int, together: int) -> list[CompletionOutput]:
    """The answers to `count` questions, `together` of them in the engine at a time."""
    params = SamplingParams(temperature=0, max_tokens=96, logprobs=0)
    asked = [f"{QUESTIONS[i % len(QUESTIONS)]} {'please ' * (i % 7)}".strip() for i in range(count)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    groups = [chats[i : i + together] for i in range(0, count, together)]
    return [output.outputs[0] for group in groups for output in llm.chat(group, params, use_tqdm=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Does company change what a request gets?")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name; needs a chat template")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="16 requests instead of 64")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    llm, count = LLM(args.model, dtype=args.dtype), 16 if args.quick else 64
    crowd = ask(llm, count, count)
    report = Report("agreement")
    report.add("tokens in the crowd", sum(len(c.token_ids) for c in crowd), "tok", None)
    for together in (8, 1):
        pairs = list(zip(crowd, ask(llm, count, together), strict=True))
        equal = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
        gaps = [
            abs(x.logprob - y.logprob)
            for a, b in equal
            for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True)
        ]
        report.add(f"{together} at a time: requests with other tokens", len(pairs) - len(equal), "", "<= 0")
        report.add(
            f"{together} at a time: logprobs with other bits", 100 * sum(g > 0 for g in gaps) / len(gaps), "%", None
        )
        report.add(f"{together} at a time: largest difference of logprobs", max(gaps), "nat", None)
    report.finish(args.json)


if __name__ == "__main__":
    main()
