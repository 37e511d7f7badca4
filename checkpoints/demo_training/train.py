"""Trains the demo models on the CPU and writes them as Hugging Face folders.

    python checkpoints/demo_training/train.py --out DIR [--minutes 40]            the chat model
    python checkpoints/demo_training/train.py --out DIR --draft [--minutes 8]     the draft, with the chat's tokenizer

The learning rate and the row length follow the share of the time that has passed, so a busy machine trains
for fewer steps and still ends its schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from demo_training.corpus import documents
from demo_training.evaluate import mean_losses
from demo_training.export import write_folder
from demo_training.generate import answer
from demo_training.model import CHAT, DRAFT, VOCAB_SIZE, init_params, loss, num_parameters
from demo_training.optimizer import PLATEAU_END, make_optimizer, rate
from demo_training.packing import Batch, batches
from demo_training.snapshot import load_state, save_state
from demo_training.tokenizer import Renderer, plain_text, train_tokenizer
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params

TOKENS_PER_STEP = 2048
# (from this share of the time on, row length): most of the training on short rows, the end on the full context
STAGES = ((0.0, 256), (0.82, 512), (0.94, 1024))
REPORT_STEPS = 20
SNAPSHOT_S = 360
PROBES = (
    "Hello!",
    "What is a block table?",
    "What is the capital of France?",
    "What is 7 + 5?",
    "Tell me a story about a fox.",
)


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
    params = jax.tree.map(jnp.add, params, updates)
    return params, state, value


@dataclass
class Run:
    """A training in progress."""

    config: ModelConfig
    tokenizer: Tokenizer
    params: Params
    state: Any
    optimizer: optax.GradientTransformation
    step: int = 0
    tokens: int = 0

    @classmethod
    def start(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int) -> Run:
        optimizer = make_optimizer()
        params = init_params(config, seed)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 with Python ints and int32 counts
            return cls(config, tokenizer, params, jax.jit(optimizer.init)(params), optimizer)

    def resume(self, path: Path) -> None:
        (self.params, self.state), counts = load_state(path, (self.params, self.state))
        self.step, self.tokens = counts["step"], counts["tokens"]

    def save(self, path: Path) -> None:
        save_state(path, (self.params, self.state), {"step": self.step, "tokens": self.tokens})

    def update(self, batch: Batch, scale: float) -> float:
        """One step; returns its loss, so the caller's clock sees the whole step."""
        with jax.numpy_dtype_promotion("standard"):  # as in `start`
            self.params, self.state, value = train_step(
                self.params, self.state, batch, np.float32(scale), config=self.config, optimizer=self.optimizer
            )
        self.step += 1
        self.tokens += int(np.count_nonzero(batch.segments))
        return float(value)


def train(run: Run, seconds: float, seed: int, folder: Path) -> None:
    """Trains for `seconds`; writes a usable folder, and on the plateau a state to resume from, every few minutes."""
    renderer = Renderer(run.tokenizer)
    start = saved = time.monotonic()
    length, losses, first, seen = 0, [], run.step, run.tokens
    stream = batches(renderer, seed, "train", 1, 1)
    while (progress := (time.monotonic() - start) / seconds) < 1:
        wanted = [stage_length for begin, stage_length in STAGES if progress >= begin][-1]
        if wanted != length:
            length = wanted
            stream = batches(renderer, hash((seed, length, first)), "train", TOKENS_PER_STEP // length, length)
        losses.append(run.update(next(stream), rate(run.step, progress)))
        now = time.monotonic()
        if run.step % REPORT_STEPS == 0:
            speed = (run.tokens - seen) / (now - start)
            mean = np.mean(losses[-REPORT_STEPS:])
            print(f"step {run.step:5d}  {now - start:6.0f} s  {speed:6.0f} tokens/s  loss {mean:.4f}", flush=True)
        if now - saved > SNAPSHOT_S:
            saved = now
            write_folder(folder, run.params, run.config, run.tokenizer)
            if progress < PLATEAU_END:
                run.save(folder.with_suffix(".npz"))
            show_probes(run.params, run.config, run.tokenizer)


def show_probes(params: Params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    for probe in PROBES:
        print(
            f"  > {probe}\n    {answer(params, config, tokenizer, [{'role': 'user', 'content': probe}], 120)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="writes DIR/chat or DIR/draft")
    parser.add_argument(
        "--minutes", type=float, default=None, help="time to train, 40 for the chat model and 8 for the draft"
    )
    parser.add_argument("--draft", action="store_true", help="train the draft with the tokenizer in DIR/chat")
    parser.add_argument("--resume", action="store_true", help="go on from the plateau of an earlier run in DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.out / ("draft" if args.draft else "chat")
    known = args.out / "chat" / "tokenizer.json"
    if args.draft or args.resume:
        tokenizer = Tokenizer.from_file(str(known))
    else:
        texts = (plain_text(document) for document in islice(documents(args.seed, "train"), 20_000))
        tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    run = Run.start(DRAFT if args.draft else CHAT, tokenizer, args.seed)
    if args.resume:
        run.resume(folder.with_suffix(".npz"))
    minutes = args.minutes or (8 if args.draft else 40)
    print(f"{num_parameters(run.params):,} parameters, from step {run.step}, {minutes:.0f} minutes", flush=True)
    train(run, 60 * minutes, args.seed, folder)
    write_folder(folder, run.params, run.config, tokenizer)
    record = {"parameters": num_parameters(run.params), "steps": run.step, "tokens": run.tokens}
    record |= {"minutes": minutes, "cpu_minutes": time.process_time() / 60}
    record |= mean_losses(run.params, run.config, tokenizer, args.seed)
    print(json.dumps(record))
    folder.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show_probes(run.params, run.config, tokenizer)


if __name__ == "__main__":
    main()
