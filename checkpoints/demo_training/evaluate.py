"""What the model card reports: losses on both splits, and how often the draft agrees with the chat model.

python checkpoints/demo_training/evaluate.py checkpoints/jaxserve_checkpoints/demo
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from demo_training.corpus import Split
from demo_training.export import read_params
from demo_training.model import CHAT, DRAFT, predictions, token_losses
from demo_training.packing import Batch, batches
from demo_training.tokenizer import Renderer
from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Params

NUM_BATCHES, ROWS, LENGTH = 8, 16, 256
UNSEEN_SEED = 1_000_003  # training uses small seeds, so these documents are freshly drawn

losses = partial(jax.jit, static_argnames="config")(token_losses)


def _batches(tokenizer: Tokenizer, split: Split, seed: int, number: int) -> list[Batch]:
    return list(islice(batches(Renderer(tokenizer), seed, split, ROWS, LENGTH), number))


def mean_losses(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, seed: int, num_batches: int = NUM_BATCHES
) -> dict[str, float]:
    """Cross-entropy in nats per token of answers and plain text, on fresh documents of both splits."""
    found = {}
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        total = count = 0.0
        for batch in _batches(tokenizer, split, seed + UNSEEN_SEED, num_batches):
            answers = batch.weights.reshape(-1) == 1.0
            total += float(np.sum(np.asarray(losses(params, batch, config))[answers]))
            count += float(np.sum(answers))
        found[f"{split}_loss"] = total / count
    return found


@partial(jax.jit, static_argnames="config")
def _choices(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    return jnp.argmax(predictions(params, batch, config), axis=-1)


def agreement(
    chat: tuple[Params, ModelConfig],
    draft: tuple[Params, ModelConfig],
    tokenizer: Tokenizer,
    seed: int = 0,
    num_batches: int = NUM_BATCHES,
) -> float:
    """Share of the answers' positions in validation where both models would choose the same token."""
    same = count = 0
    for batch in _batches(tokenizer, "validation", seed + UNSEEN_SEED, num_batches):
        answers = batch.weights.reshape(-1) == 1.0
        equal = np.asarray(_choices(*_with(chat, batch))) == np.asarray(_choices(*_with(draft, batch)))
        same, count = same + int(np.sum(equal[answers])), count + int(np.sum(answers))
    return same / count


def _with(model: tuple[Params, ModelConfig], batch: Batch) -> tuple[Params, Batch, ModelConfig]:
    return model[0], batch, model[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds chat/ and draft/")
    folder = parser.parse_args().folder
    tokenizer = Tokenizer.from_file(str(folder / "chat" / "tokenizer.json"))
    chat, draft = ((read_params(folder / c, m), m) for c, m in (("chat", CHAT), ("draft", DRAFT)))
    for name, model in (("chat", chat), ("draft", draft)):
        found = mean_losses(*model, tokenizer, seed=0)
        print(f"{name:5s}  train {found['train_loss']:.3f}  validation {found['validation_loss']:.3f} nats per token")
    print(f"agreement {agreement(chat, draft, tokenizer):.1%}")


if __name__ == "__main__":
    main()
