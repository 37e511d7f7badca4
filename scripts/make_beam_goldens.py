"""Writes `tests/engine/goldens/beams.json`: what Hugging Face's `generate` answers to beam searches.

    python scripts/make_beam_goldens.py [--out FILE]

Run it with an interpreter that has torch and transformers 5; nothing that is installed or tested by default has them.
The model is FAMILY of `scripts/make_tiny_models.py` in float32, with eager attention. Each case: the prompt, the
search's parameters, the stop ids (the model's first, then more, so that beams do stop), the sequences and their scores.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
FAMILY = "llama31"
WIDTHS = (2, 4, 8)
LENGTH_PENALTIES = (0.6, 1.0, 1.5)
EARLY_STOPPING = (False, True, "never")
MAX_TOKENS = 20
NUM_MORE_STOPS = (0, 10, 30)


def load_tiny_models() -> Any:
    """The script beside this one, as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_models", ROOT / "scripts" / "make_tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def search(model: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's sequences, the best first: output tokens and score."""
    prompt = torch.tensor([case["prompt"]])
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=case["beam_width"],
        num_return_sequences=case["beam_width"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        max_new_tokens=case["max_tokens"],
        eos_token_id=case["stop_ids"],
        pad_token_id=model.config.vocab_size - 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # beam_indices is -1 past a sequence's end; the tokens there are padding.
    lengths = (answer.beam_indices >= 0).sum(dim=1).tolist()
    outputs = answer.sequences[:, len(case["prompt"]) :].tolist()
    scores = answer.sequences_scores.tolist()
    return [
        {"tokens": tokens[:length], "score": round(score, 6)}
        for tokens, length, score in zip(outputs, lengths, scores, strict=True)
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Write the beam goldens.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "engine" / "goldens" / "beams.json")
    options = parser.parse_args()
    draws = np.random.default_rng(5)
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = load_tiny_models().make(FAMILY, Path(scratch) / FAMILY)
        weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
        digest = hashlib.sha256(weights).hexdigest()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model = loaded.eval()
        eos, vocab_size = list(model.config.eos_token_id), model.config.vocab_size
        for number, (width, penalty, early) in enumerate(product(WIDTHS, LENGTH_PENALTIES, EARLY_STOPPING)):
            more = draws.choice(
                np.arange(10, vocab_size - 1), NUM_MORE_STOPS[(number + number // 3) % 3], replace=False
            )
            case = {
                "prompt": draws.integers(5, vocab_size, int(draws.integers(1, 24))).tolist(),
                "beam_width": width,
                "length_penalty": penalty,
                "early_stopping": early,
                "max_tokens": MAX_TOKENS,
                "stop_ids": eos + more.tolist(),
            }
            cases.append(case | {"sequences": search(model, case)})
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(case) for case in cases)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        f'{{"made_by": "{made_by}", "family": "{FAMILY}", "weights_sha256": "{digest}", "cases": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
