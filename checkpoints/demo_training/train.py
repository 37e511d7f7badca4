"""Trains the demo models on the CPU and writes them as Hugging Face folders.

    python checkpoints/demo_training/train.py --out DIR [--minutes 40]            the chat model
    python checkpoints/demo_training/train.py --out DIR --draft [--minutes 8]     the draft, with the chat's tokenizer

The learning rate and the row length follow the share of the time that has passed, so a busy machine trains
for fewer steps and still ends its schedule.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax
from tokenizers import Tokenizer

from demo_training.corpus import documents
from demo_training.evaluate import mean_losses
from demo_training.export import write_folder
from demo_training.generate import answer
from demo_training.model import CHAT, DRAFT, VOCAB_SIZE, init_params, loss, num_parameters
from demo_training.optimizer import make_optimizer, rate
from demo_training.packing import Batch, batches
from demo_training.tokenizer import Renderer, plain_text, train_tokenizer
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params

TOKENS_PER_STEP = 3072
# (from this share of the time on, row length): most of the training on short rows, the end on the full context
STAGES = ((0.0, 256), (0.80, 512), (0.93, 1024))
REPORT_STEPS = 20
SNAPSHOT_S = 240
PROBES = (
    "Hello!", "What is a block table?", "What is the capital of France?", "tell me a joke", "What is 7 + 5?",
    "Tell me a story about a fox.", "Who wrote Faust?", "why is the sky blue",
)  # fmt: skip


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("params", "state"))
def train_step(
    params: Params,
    state: Any,
    batch: Batch,
    scale: jax.Array,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, Any, jax.Array]:
    """One update, scaled by `scale`.

    Donates: params, state.
    """
    value, gradients = jax.value_and_grad(loss)(params, batch, config)
    updates, state = optimizer.update(gradients, state, params)
    updates = jax.tree.map(lambda update: update * scale, updates)
    return optax.apply_updates(params, updates), state, value


def train(
    config: ModelConfig, tokenizer: Tokenizer, seconds: float, seed: int, snapshot: Path | None = None
) -> tuple[Params, dict[str, Any]]:
    """Trains for `seconds`; returns the parameters and a record of the run."""
    renderer, optimizer = Renderer(tokenizer), make_optimizer()
    params = init_params(config, seed)
    state = optimizer.init(params)
    print(f"{num_parameters(params):,} parameters, {seconds / 60:.0f} minutes", flush=True)
    start, step, tokens, length, recent = time.monotonic(), 0, 0, 0, []
    saved = start
    stream = batches(renderer, seed, "train", 1, 1)
    while (progress := (time.monotonic() - start) / seconds) < 1:
        wanted = [stage_length for begin, stage_length in STAGES if progress >= begin][-1]
        if wanted != length:
            length = wanted
            stream = batches(renderer, seed + length, "train", TOKENS_PER_STEP // length, length)
        batch = next(stream)
        scale = np.float32(rate(progress))
        params, state, value = train_step(params, state, batch, scale, config=config, optimizer=optimizer)
        step, tokens = step + 1, tokens + int(np.count_nonzero(batch.segments))
        recent.append(float(value))  # waits for the step, so that the clock is honest
        if step % REPORT_STEPS == 0:
            now = time.monotonic() - start
            print(f"step {step:5d}  {now:6.0f} s  {tokens / now:6.0f} tokens/s  loss {np.mean(recent):.4f}", flush=True)
            recent = []
        if snapshot and time.monotonic() - saved > SNAPSHOT_S:
            saved = time.monotonic()
            write_folder(snapshot, params, config, tokenizer)
            show_probes(params, config, tokenizer)
    record = {"parameters": num_parameters(params), "steps": step, "tokens": tokens, "minutes": seconds / 60}
    return params, record


def show_probes(params: Params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    for probe in PROBES:
        print(f"  > {probe}\n    {answer(params, config, tokenizer, [{'role': 'user', 'content': probe}], 120)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="writes DIR/chat or DIR/draft")
    parser.add_argument("--minutes", type=float, default=None, help="time to train, 40 for the chat model and 8 for the draft")
    parser.add_argument("--draft", action="store_true", help="train the draft with the tokenizer in DIR/chat")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.out / ("draft" if args.draft else "chat")
    config = DRAFT if args.draft else CHAT
    if args.draft:
        tokenizer = Tokenizer.from_file(str(args.out / "chat" / "tokenizer.json"))
    else:
        texts = (plain_text(document) for document in islice(documents(args.seed, "train"), 20_000))
        tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    minutes = args.minutes or (8 if args.draft else 40)
    params, record = train(config, tokenizer, 60 * minutes, args.seed, folder)
    write_folder(folder, params, config, tokenizer)
    record |= mean_losses(params, config, tokenizer, args.seed)
    print(json.dumps(record))
    (args.out / f"{folder.name}_record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show_probes(params, config, tokenizer)


if __name__ == "__main__":
    main()
