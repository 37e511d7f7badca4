"""Configuration: frozen, validated, resolved once. Nothing writes back into these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
AttentionBackend = Literal["xla", "tpu", "gpu", "cpu", "reference"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding and how it is stretched past the trained context.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (position / factor), "dynamic" (NTK-aware), "llama3" or "yarn".
        factor: the stretch.
        original_max_position: the trained context, for dynamic, llama3 and yarn.
        low_freq_factor, high_freq_factor: llama3's band edges.
        beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: yarn's
            (arXiv:2309.00071 §3.2-3.4), with transformers' meanings.

    "dynamic" depends on the sequence's length in the reference implementation; as every serving engine
    does, the table for `max_model_len` is used for all positions, so that cached keys stay valid.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. A model family is a set of these values, not code.

    Attributes:
        layer_windows: one entry a layer: how many tokens, itself included, a query may look back over;
            None for all.
        qk_norm: RMSNorm over head_dim on queries and keys before rope (Qwen3).
        tied_embeddings: the head is the embedding's transpose; there is no `lm_head` tensor.
        eos_token_ids: every id that ends a sequence (config and generation_config together).
        dtype: of the weights as served.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    rope: RopeConfig = RopeConfig()
    layer_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} must be a multiple of num_key_value_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rope rotates pairs.")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(f"layer_windows has {len(self.layer_windows)} entries for {self.num_layers} layers.")

    @property
    def num_groups(self) -> int:
        """Query heads a kv head."""
        return self.num_heads // self.num_kv_heads

    def num_kv_heads_over(self, num_devices: int) -> int:
        """KV heads that so many devices hold together: where there are more devices, each holds a copy of one."""
        return max(self.num_kv_heads, num_devices)

    def kv_bytes_per_token(self, kv_dtype: DType, num_devices: int = 1) -> int:
        """On each of so many devices."""
        num_kv = self.num_kv_heads_over(num_devices) // num_devices
        return 2 * self.num_layers * num_kv * self.head_dim * DTYPE_BYTES[kv_dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is given besides the model. Flag names are vLLM's; None means: decide from the
    model and the device, once, in `resolve_engine_config`.

    Attributes:
        max_model_len: longest prompt + output, tokens.
        block_size: tokens a KV block.
        max_num_seqs: rows of the running batch.
        max_num_batched_tokens: tokens a step, decode and prefill together; longer prompts are chunked. By default
            2,048; on a CPU 256 for a server and 1,024 for `LLM`.
        tensor_parallel_size: devices that the model is cut over. The parameters must lie on a mesh of so many
            (`load_model(mesh=make_mesh(n))`). Bytes of memory are those of each device.
        max_num_queued_reqs: bound of the waiting queue; past it requests are refused with 503.
        queue_timeout: seconds; a request that waits longer for its first step is refused with 503; 0 lets
            it wait for ever. Of `AsyncEngine` only: an offline run has nobody to answer in time.
        batching_window_ms: a request that comes while rows are free waits so long for others to start with; what
            runs is not held up. At most 10,000. Of `AsyncEngine` only: an offline run has all requests at once.
        kv_cache_memory_bytes: KV pool size; goes before gpu_memory_utilization.
        gpu_memory_utilization: share of the device's memory for weights, activations and KV.
        num_gpu_blocks_override: number of KV blocks, whatever the memory.
        kv_cache_dtype: "auto" is the model's dtype.
        attention_backend: "pallas" are the kernels of `pallas_kernels`, on a CPU its C++ ones; "xla" is plain XLA, on a
            CPU for products as well. "auto" takes kernels where there are some for the device and the model and their
            answers are right there (`engine.attention`).
        stacked_layers: the layers' parameters lie stacked and one loop runs them: a program of 80 layers is as large,
            and compiles as fast, as one of a layer. The parameters must lie so (`load_model(stacked_layers=...)`).
            None: as `models.params.choose_layers` has it.
        enable_prefix_caching: keep the KV of past prompts and outputs for requests that begin with them.
        swap_space: GiB of host memory for the KV of preempted sequences; 0 computes them again instead.
        verify_swaps: checksum every block on its way to host memory and back. For tests: about 1 GB/s.
        seed: draws the seeds of requests that bring none.
        exact: a request's tokens and logprobs have the same bits whatever else runs, however its prompt is cut, and
            whatever was cached or swapped: only step programs whose bits agree at start are used. None: on where
            that costs nothing, which is with 16-bit weights on a CPU (docs/exactness.md).
        async_scheduling: plan step n+1 while step n runs. Off: digest each step before the next.
        max_decode_steps: tokens a row that one call of the device may decode while nothing waits; at most block_size
            count. 1 turns the loop off.
        stream_interval_ms: how long such a call may take by what earlier ones took: a newcomer waits for the one that
            runs, and tokens reach their readers when it ends. An offline run has no such bound.
        compilation_cache_dir: where compiled programs are kept between starts; None keeps none. It must
            belong to this user with mode 0700: what lies there is executed.
    """

    max_model_len: int | None = None
    block_size: int = 16
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    max_num_queued_reqs: int = 1024
    queue_timeout: float = 30.0
    batching_window_ms: float = 0.0
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention_backend: Literal["auto", "xla", "pallas"] = "auto"
    stacked_layers: bool | None = None
    enable_prefix_caching: bool = True
    swap_space: float = 4.0
    verify_swaps: bool = False
    seed: int = 0
    exact: bool | None = None
    async_scheduling: bool = True
    max_decode_steps: int = 16
    stream_interval_ms: float = 20.0
    compilation_cache_dir: str | None = "~/.cache/jaxserve/xla"

    def __post_init__(self) -> None:
        for name in (
            *("max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs"),
            *("max_decode_steps", "tensor_parallel_size"),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}. Try 16.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}.")
        if not self.queue_timeout >= 0:
            raise ConfigError(f"queue_timeout must be at least 0 seconds, got {self.queue_timeout}.")
        if not self.stream_interval_ms >= 0:
            raise ConfigError(f"stream_interval_ms must be at least 0, got {self.stream_interval_ms}.")
        if not 0 <= self.batching_window_ms <= 10_000:
            raise ConfigError(
                f"batching_window_ms must be from 0 to 10000 milliseconds, got {self.batching_window_ms}. Try 20."
            )
        if not 0 <= self.swap_space < float("inf"):
            raise ConfigError(f"swap_space must be a number of GiB of at least 0, got {self.swap_space}.")
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            raise ConfigError(
                f"num_gpu_blocks_override must be at least 2 (one block is the null block), "
                f"got {self.num_gpu_blocks_override}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """An `EngineConfig` resolved against a model and a device: every number decided.

    Attributes:
        num_blocks: blocks of the KV pool, the null block included.
        max_blocks_per_row: entries of a block table.
        token_buckets: the token counts that steps are compiled for, ascending.
        q_tile, kv_tile: tokens a tile in XLA attention.
        num_swap_blocks: blocks that host memory holds for preempted sequences.
        swap_buckets: the block counts that copies to and from host memory are compiled for, ascending.
        max_decode_steps: decode steps that one call of the device can run.
        exact: only buckets whose bits agree are used.
        attention: "xla", or whose kernels compute it.
        panels: weights lie as the CPU's kernels read them, which then compute all products.
        skips_padding: what a step costs is the tokens and samples that it is fed, however many its program takes.
        tensor_parallel_size: devices that parameters and cache are cut over.
        stacked_layers: parameters and cache hold all layers in one array each, and a loop runs them.
    """

    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int
    num_blocks: int
    max_blocks_per_row: int
    kv_dtype: DType
    token_buckets: tuple[int, ...]
    q_tile: int
    kv_tile: int
    num_swap_blocks: int = 0
    swap_buckets: tuple[int, ...] = ()
    max_decode_steps: int = 1
    exact: bool = False
    attention: AttentionBackend = "xla"
    panels: bool = False
    skips_padding: bool = False
    tensor_parallel_size: int = 1
    stacked_layers: bool = False

    @property
    def decode_bucket(self) -> int:
        """The smallest of `token_buckets` that holds a token of each row."""
        return min(size for size in self.token_buckets if size >= self.max_num_seqs)

    @property
    def num_kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    @property
    def max_concurrency(self) -> float:
        """How many requests of max_model_len the pool holds at once."""
        blocks = -(-self.max_model_len // self.block_size)
        return (self.num_blocks - 1) / blocks
