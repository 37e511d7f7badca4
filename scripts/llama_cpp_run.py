"""Sets of requests run through llama.cpp, in a Python that has its bindings. Imports nothing of jaxserve.

    PYTHON -P scripts/llama_cpp_run.py --model FOLDER --dtype D --requests FILE --json FILE

Takes and writes the files of `benchmarks.offline_run`. Wants llama-cpp-python, gguf, safetensors and torch (for
bfloat16 weights). Greedy, to a fixed length whatever the tokens are, on every core. The folder is written as GGUF
first, its matrices in the given type; families with the Llama layout alone, without biases or scaled rope.

The requests run as a batching server runs them: each step decodes every running sequence and fills up with the
prompts that wait, up to `--num-batched-tokens`. Of cache layouts, cache types (float16) and attention kernels the
defaults are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors import safe_open

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KINDS = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}


def write_gguf(folder: Path, dtype: str, path: Path) -> dict[str, Any]:
    """The folder's weights and shape, without its tokenizer; returns its config."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("rope_scaling"):
        raise SystemExit(f"{folder}: llama_cpp_run writes plain Llama models only, not {config['model_type']!r}.")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in list(tensors.keys()):
                stem = name.removesuffix(".weight")
                array = tensors.get_tensor(name)
                if stem.endswith(("q_proj", "k_proj")):
                    array = _interleaved(array, heads if stem.endswith("q_proj") else kv_heads)
                parts = stem.split(".", 3)
                mine = f"blk.{parts[2]}.{_NAMES[parts[3]]}" if stem.startswith("model.layers.") else _NAMES[stem]
                # Norms stay float32, as llama.cpp's own converter has it.
                _add(writer, f"{mine}.weight", array, "float32" if array.ndim == 1 else dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


def _interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head in the order in which GGUF's Llama rotates them: pairs side by side, not halves apart."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, array: torch.Tensor, dtype: str) -> None:
    if dtype == "bfloat16":
        bits = array.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, bits, raw_dtype=_KINDS[dtype])
    else:
        writer.add_tensor(name, array.to(torch.float32).numpy())


class Engine:
    """One model and one context of llama.cpp, fed as a batching server feeds it."""

    def __init__(self, path: Path, num_vocab: int, num_batched_tokens: int, prompts: list[list[int]], outputs: int):
        threads = len(os.sched_getaffinity(0))
        longest = max(map(len, prompts)) + outputs
        self._num_vocab, self._num_batched_tokens = num_vocab, num_batched_tokens
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = len(prompts)
        params.n_ctx = len(prompts) * (longest + -longest % 256)
        params.n_batch = params.n_ubatch = num_batched_tokens
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} tokens.")
        self._batch = llama_cpp.llama_batch_init(num_batched_tokens, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def run(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        """Greedy outputs of each prompt, exactly so long."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = deque((seq, token, at) for seq, prompt in enumerate(prompts) for at, token in enumerate(prompt))
        running: list[int] = []
        while waiting or running:
            fed = [(seq, outputs[seq][-1], len(prompts[seq]) + len(outputs[seq]) - 1, True) for seq in running]
            while waiting and len(fed) < self._num_batched_tokens:
                seq, token, at = waiting.popleft()
                fed.append((seq, token, at, at == len(prompts[seq]) - 1))
            self._decode(fed)
            for place, (seq, _, _, wanted) in enumerate(fed):
                if wanted:
                    logits = llama_cpp.llama_get_logits_ith(self._context, place)
                    outputs[seq].append(int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax()))
            running = [seq for seq, made in enumerate(outputs) if 0 < len(made) < output_tokens]
        return outputs

    def _decode(self, fed: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(fed)
        for place, (seq, token, position, wanted) in enumerate(fed):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = seq
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status} for {len(fed)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs sets of requests through llama.cpp.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(_KINDS), default="float32")
    parser.add_argument("--num-batched-tokens", type=int, default=512, help="of a step")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    sets = json.loads(args.requests.read_text())
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.gguf"
        config = write_gguf(args.model, args.dtype, path)
        load_s = 0.0
        for each in sets:
            prompts, output_tokens = each["prompts"], each["output_tokens"]
            start = time.perf_counter()
            engine = Engine(path, config["vocab_size"], args.num_batched_tokens, prompts, output_tokens)
            engine.run(prompts[:4], 2)  # pages of weights and of the cache are mapped
            load_s += time.perf_counter() - start
            start = time.perf_counter()
            token_ids = engine.run(prompts, output_tokens)
            runs[each["name"]] = {"seconds": time.perf_counter() - start, "token_ids": token_ids}
            engine.close()
    args.json.write_text(json.dumps({"load_s": load_s, "runs": runs}))


if __name__ == "__main__":
    main()
