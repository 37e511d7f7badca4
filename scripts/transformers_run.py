"""Sets of requests run through transformers, in a Python that has it and torch. Imports nothing of jaxserve.

    PYTHON -P scripts/transformers_run.py --mode M --model FOLDER --dtype D --requests FILE --json FILE [--device cuda]

Takes and writes the files of `benchmarks.offline_run`. Greedy, to a fixed length whatever the tokens are, on every
core or on a GPU. `static` sorts the requests by length and answers them in padded batches with `generate`; `continuous`
hands them all to `generate_batch`. On a CPU its page, step and pool are set to what the requests need, because the
defaults are a GPU's. On a GPU they are the defaults, and the manager stays from a rehearsal of the whole set, each
prompt backwards, so that CUDA graphs are captured before time counts and no prompt is in its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAD = 1
Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts and output tokens -> output token ids


def static(model: Any, batch_size: int) -> Generate:
    """Padded batches of requests of similar length."""

    def run(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        outputs: list[list[int]] = [[] for _ in prompts]
        for at in range(0, len(order), batch_size):
            members = order[at : at + batch_size]
            width = max(len(prompts[index]) for index in members)
            padded = [[PAD] * (width - len(prompts[index])) + prompts[index] for index in members]
            mask = [[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in members]
            made = model.generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=greedy(output_tokens),
            )
            for index, row in zip(members, made[:, width:].tolist(), strict=True):
                outputs[index] = row
        return outputs

    return run


def continuous(model: Any, num_batched_tokens: int) -> Generate:
    """All at once through the scheduler of transformers, with its prefix cache.

    On a CPU each call makes its pool: 0.5 s. On a GPU the first one's stays.
    """
    stays = model.device.type != "cpu"

    def run(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        page = 32
        pages = sum(-(-(len(prompt) + output_tokens) // page) + 1 for prompt in prompts)
        config = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=num_batched_tokens)
        if stays:
            config = ContinuousBatchingConfig()
        answers = model.generate_batch(
            inputs=prompts,
            generation_config=greedy(output_tokens),
            continuous_batching_config=config,
            max_new_tokens=output_tokens,
            persistent_manager=stays,
        )
        failed = next((answer.error for answer in answers.values() if answer.error), None)
        if failed or len(answers) != len(prompts):
            raise RuntimeError(f"generate_batch answered {len(answers)} of {len(prompts)} requests: {failed}")
        return [list(answer.generated_tokens) for answer in answers.values()]

    return run


def greedy(output_tokens: int) -> GenerationConfig:
    """Exactly so many tokens, the likeliest ones."""
    return GenerationConfig(
        max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=PAD, use_cache=True
    )


@torch.inference_mode()
def smallest_gaps(model: Any, prompts: list[list[int]], outputs: list[list[int]]) -> list[float]:
    """Of each request, how close the two likeliest tokens of a step ever were, in logits."""
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([prompt + output], device=model.device)
        logits = model(tokens, logits_to_keep=len(output) + 1).logits[0, :-1]
        likeliest = logits.float().topk(2, dim=-1).values
        gaps.append(float((likeliest[:, 0] - likeliest[:, 1]).min()))
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs sets of requests through transformers.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mode", choices=("static", "continuous"), required=True)
    parser.add_argument("--batch-size", type=int, default=16, help="of static batches")
    parser.add_argument("--num-batched-tokens", type=int, default=512, help="of a step of continuous batching")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gaps", action="store_true", help="afterwards, how close the two likeliest tokens were")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    sets = json.loads(args.requests.read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    load_s = time.perf_counter() - start
    run = static(model, args.batch_size) if args.mode == "static" else continuous(model, args.num_batched_tokens)
    if args.device == "cpu":
        run(sets[0]["prompts"][:4], 2)  # the allocator and the kernels' caches get to know the work
    else:
        run([prompt[::-1] for prompt in sets[0]["prompts"]], sets[0]["output_tokens"])
    runs: dict[str, Any] = {}
    for each in sets:
        start = time.perf_counter()
        token_ids = run(each["prompts"], each["output_tokens"])
        seconds = time.perf_counter() - start
        lengths = {len(ids) for ids in token_ids}
        assert lengths == {each["output_tokens"]}, f"{each['name']}: outputs of {sorted(lengths)} tokens"
        runs[each["name"]] = {"seconds": seconds, "token_ids": token_ids}
        if args.gaps and each["name"] == "batch":
            runs["batch"]["gaps"] = smallest_gaps(model, each["prompts"], token_ids)
    args.json.write_text(json.dumps({"load_s": load_s, "runs": runs}))


if __name__ == "__main__":
    main()
