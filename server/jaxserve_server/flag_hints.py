"""What to say to a flag that jaxserve does not take: why not, or which one was meant.

Owns the list of vLLM's flags that are known and not served, so that a command line written for vLLM fails
with a reason instead of being half obeyed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

ONE_DEVICE = "jaxserve runs one replica on the devices of one machine; see --tensor-parallel-size"
NO_LORA = "LoRA adapters are not implemented"
NO_TOOLS = "tool calls and reasoning parsers are not implemented"
NO_GRAMMAR = "structured output is not implemented"
NO_MEDIA = "jaxserve serves text only"
NO_SPEC = "speculative decoding is not implemented"
NO_HASH = "the prefix cache compares tokens, not hashes"
NO_OFFLOAD = "the weights and the cached KV stay on the device; see --swap-space for preempted requests"
NO_MODE = "whether a preempted request is swapped or computed again is chosen by measured cost; see --swap-space"
NO_QUANT = "quantised weights and caches are not implemented; see --dtype"
NO_CODE = "code from a checkpoint or a command line is never run"
NO_CUDA = "there are no CUDA graphs; step programs are compiled by XLA before the server is ready"
NO_PROMPT_LOGS = "prompts and outputs are never logged"
NO_TRACES = "traces are not exported; see /metrics"
NO_CORS = "cross-origin requests are not allowed; put a proxy in front"

# Flag names (without the dashes) by the reason why they are not served.
_REASONS: dict[str, tuple[str, ...]] = {
    ONE_DEVICE: (
        *("data-parallel-size-local", "data-parallel-rank", "data-parallel-start-rank", "data-parallel-address"),
        *("data-parallel-rpc-port", "data-parallel-backend", "data-parallel-hybrid-lb", "enable-expert-parallel"),
        *("decode-context-parallel-size", "prefill-context-parallel-size", "all2all-backend", "enable-dbo"),
        *("enable-eplb", "eplb-config", "expert-placement-strategy", "distributed-executor-backend", "nnodes"),
        *("node-rank", "master-addr", "master-port", "headless", "api-server-count", "disable-custom-all-reduce"),
        *("max-parallel-loading-workers", "ray-workers-use-nsight", "worker-cls", "worker-extension-cls"),
    ),
    NO_LORA: (
        *("enable-lora", "lora-modules", "max-loras", "max-lora-rank", "lora-dtype", "max-cpu-loras"),
        *("fully-sharded-loras", "lora-extra-vocab-size", "default-mm-loras"),
    ),
    NO_TOOLS: (
        *("enable-auto-tool-choice", "tool-call-parser", "tool-parser-plugin", "tool-server"),
        *("exclude-tools-when-tool-choice-none", "reasoning-parser", "enable-reasoning", "reasoning-config"),
    ),
    NO_GRAMMAR: (
        *("structured-outputs-config", "guided-decoding-backend", "guided-decoding-disable-fallback"),
        *("guided-decoding-disable-any-whitespace", "guided-decoding-disable-additional-properties"),
    ),
    NO_MEDIA: (
        *("limit-mm-per-prompt", "mm-processor-kwargs", "mm-processor-cache-gb", "mm-processor-cache-type"),
        *("mm-encoder-tp-mode", "enable-mm-embeds", "media-io-kwargs", "interleave-mm-strings"),
        *("skip-mm-profiling", "allowed-local-media-path", "allowed-media-domains", "disable-chunked-mm-input"),
        *("enable-prompt-embeds", "pooler-config", "override-pooler-config", "convert"),
        *("io-processor-plugin", "video-pruning-rate"),
    ),
    NO_SPEC: ("speculative-config", "speculative-model", "num-speculative-tokens", "num-lookahead-slots"),
    NO_HASH: ("prefix-caching-hash-algo",),
    NO_OFFLOAD: (
        *("cpu-offload-gb", "kv-offloading-size", "kv-offloading-backend", "kv-transfer-config"),
        *("kv-events-config", "kv-sharing-fast-prefill", "enable-sleep-mode"),
    ),
    NO_MODE: ("preemption-mode",),
    NO_QUANT: ("quantization", "q", "calculate-kv-scales", "quantization-param-path"),
    NO_CODE: (
        *("trust-remote-code", "code-revision", "logits-processors", "logits-processor-pattern", "middleware"),
        *("scheduler-cls", "hf-overrides", "additional-config", "trust-request-chat-template"),
    ),
    NO_CUDA: (
        *("enforce-eager", "compilation-config", "optimization-level", "cudagraph-capture-sizes"),
        *("cuda-graph-sizes", "max-cudagraph-capture-size", "max-seq-len-to-capture"),
        *("attention-config", "kernel-config", "disable-cascade-attn", "disable-hybrid-kv-cache-manager"),
    ),
    NO_PROMPT_LOGS: ("enable-log-requests", "enable-log-outputs", "enable-log-deltas", "max-log-len"),
    NO_TRACES: ("otlp-traces-endpoint", "collect-detailed-traces", "profiler-config"),
    NO_CORS: ("allow-credentials", "allowed-origins", "allowed-methods", "allowed-headers"),
    "chunked prefill is always on": (
        *("no-enable-chunked-prefill", "max-num-partial-prefills", "max-long-partial-prefills"),
        "long-prefill-token-threshold",
    ),
    "set the rope scaling in the model's config.json": ("rope-scaling", "rope-theta"),
    "only safetensors and converted checkpoints are read": (
        *("config-format", "model-loader-extra-config", "ignore-patterns", "pt-load-map-location", "model-impl"),
        *("hf-config-path", "safetensors-load-strategy", "use-tqdm-on-load"),
    ),
    "set HF_HOME in the environment": ("download-dir",),
    "set HF_TOKEN in the environment": ("hf-token",),
    "the tokenizer comes with the model's revision; see --tokenizer": ("tokenizer-revision", "skip-tokenizer-init"),
    "send the parameters with each request": ("override-generation-config",),
    "logprobs are of the raw logits, at most 20": ("max-logprobs", "logprobs-mode"),
    "jaxserve listens on one TCP port": ("uds", "data-parallel-supervisor-port"),
    "client certificates are not checked; put a proxy in front": ("ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers"),
    "the assistant's role is fixed": ("response-role",),
    "message contents are strings or lists of text parts": ("chat-template-content-format",),
    "send chat_template_kwargs with each request": ("default-chat-template-kwargs",),
}

# Flags (with their short names) of which only the value that changes nothing is taken.
ONLY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--pipeline-parallel-size", "-pp"): ("1",),
    ("--data-parallel-size", "-dp"): ("1",),
    ("--load-format",): ("auto", "safetensors"),
    ("--scheduling-policy",): ("fcfs",),
    ("--tokenizer-mode",): ("auto", "hf"),
    ("--task",): ("auto", "generate"),
    ("--runner",): ("auto", "generate"),
}

# Flags that ask for what jaxserve does anyway.
NO_EFFECT = (
    "--enable-chunked-prefill",
    "--enable-request-id-headers",
    "--enable-prompt-tokens-details",
    "--enable-tokenizer-info-endpoint",
    "--disable-fastapi-docs",
    "--no-enable-log-requests",
)


def reason_of(flag: str) -> str | None:
    """Why vLLM's `flag` is not served; None if vLLM has no such flag."""
    name = flag.lstrip("-")
    for reason, names in _REASONS.items():
        if name in names or name.removeprefix("no-") in names:
            return reason
    return None


def refusal(unknown: Sequence[str], known: Iterable[str]) -> str:
    """The error about the first argument of `unknown` that is a flag, or about the arguments as they are."""
    flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        return f"unexpected arguments: {' '.join(unknown)}. One MODEL is served at a time"
    reason = reason_of(flag)
    if reason is not None:
        return f"not supported: {flag}: {reason}"
    close = difflib.get_close_matches(flag, list(known), n=1)
    return f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "")
