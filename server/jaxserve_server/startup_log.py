"""The lines that operators look for, in vLLM's wording where they search for it.

Plain text to stderr. Holds neither prompts nor keys: the flags are logged without `--api-key`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from jaxserve import __version__
from jaxserve.metrics import EngineMetrics
from jaxserve.types import EngineStats
from jaxserve_server.flags import Options

if TYPE_CHECKING:
    from starlette.routing import Route  # the engine's process logs, too, and serves no routes

GIB = 2**30
SLOW_PROGRAM_S = 2.0
MAX_VALUE_CHARS = 200  # --chat-template may hold a whole template
logger = logging.getLogger("jaxserve.server")


def configure_logging(uvicorn_level: str) -> None:
    """Sends jaxserve's and uvicorn's lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
    for name, level in (("jaxserve", "INFO"), ("uvicorn", uvicorn_level.upper())):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.setLevel(level)
        target.propagate = False


def log_banner(options: Options) -> None:
    logger.info("jaxserve version %s, model %s", __version__, options.model)
    shown = {name: value if len(str(value)) <= MAX_VALUE_CHARS else "..." for name, value in options.given.items()}
    logger.info("non-default args: %s", dict(sorted(shown.items())))


def log_weights(num_bytes: int, seconds: float, num_devices: int) -> None:
    """Says what the weights take on each device."""
    on_each = "" if num_devices == 1 else f" on each of {num_devices} devices"
    logger.info("Model loading took %.4f GiB memory%s and %.2f seconds", num_bytes / GIB, on_each, seconds)


def log_vocabularies(num_tokenizer_ids: int, num_model_ids: int) -> None:
    """Warns of token ids that the model does not have: the engine refuses prompts with them."""
    if num_tokenizer_ids > num_model_ids:
        logger.warning(
            "The tokenizer has %d token ids and the model %d: do they belong together?",
            *(num_tokenizer_ids, num_model_ids),
        )


def log_kv_cache(*, device: str, num_bytes: int, num_tokens: int, max_model_len: int, concurrency: float) -> None:
    """Says how much context the server holds. `device` is "CPU", "GPU" or "TPU"."""
    logger.info("Available KV cache memory: %.2f GiB", num_bytes / GIB)
    logger.info(
        "%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
        *(device, f"{num_tokens:,}", f"{max_model_len:,}", concurrency),
    )


def log_reuse(*, prefix_caching: bool, num_swap_blocks: int, num_swap_bytes: int) -> None:
    """Says what becomes of the KV of requests that have ended or gave way."""
    logger.info("Prefix caching: %s", "on" if prefix_caching else "off")
    if num_swap_blocks:
        logger.info("Swap space: %.2f GiB of host memory, %s blocks", num_swap_bytes / GIB, f"{num_swap_blocks:,}")
    else:
        logger.info("Swap space: off, preempted requests are computed again")


def log_compiled(num_done: int, num_all: int, name: str, seconds: float) -> None:
    """A line for each program that took long, and one at the end: a warm start is one line."""
    if seconds >= SLOW_PROGRAM_S or num_done == num_all:
        logger.info("Compiling step programs: %d/%d, %s took %.2f s", num_done, num_all, name, seconds)


def log_engine_ready(seconds: float) -> None:
    logger.info("init engine (create kv cache, compile, warmup model) took %.2f seconds", seconds)


def log_ready(routes: Iterable[Route], url: str, model: str, *, with_key: bool) -> None:
    """Lists the routes, and gives a command to try."""
    logger.info("Available routes are:")
    for route in routes:
        logger.info("Route: %s, Methods: %s", route.path, ", ".join(sorted(route.methods or ())))
    logger.info("ready: %s", url)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if with_key else ""
    logger.info(
        "try: curl %s/v1/chat/completions -H 'Content-Type: application/json'%s -d "
        '\'{"model": "%s", "messages": [{"role": "user", "content": "Hello!"}]}\'',
        *(url, key, model),
    )


class ThroughputLog:
    """One line for each interval in which the engine did something."""

    def __init__(self, metrics: EngineMetrics, stats: Callable[[], EngineStats], now: float) -> None:
        self._metrics = metrics
        self._stats = stats
        self._then = now
        self._prompt = metrics.prompt_tokens
        self._generation = metrics.generation_tokens
        self._was_busy = False

    def line(self, now: float) -> str | None:
        """The line for the time since the last call; None when it and the one before were idle.

        Args:
            now: seconds on the clock of `__init__`.
        """
        elapsed = max(now - self._then, 1e-9)
        prompt = self._metrics.prompt_tokens - self._prompt
        generation = self._metrics.generation_tokens - self._generation
        self._then, self._prompt, self._generation = now, self._prompt + prompt, self._generation + generation
        stats = self._stats()
        is_busy = bool(prompt or generation or stats.num_running or stats.num_waiting)
        is_wanted, self._was_busy = is_busy or self._was_busy, is_busy
        if not is_wanted:
            return None
        used = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        hit_rate = self._metrics.prefix_hits / max(self._metrics.prefix_queries, 1)
        return (
            f"Engine 000: Avg prompt throughput: {prompt / elapsed:.1f} tokens/s, "
            f"Avg generation throughput: {generation / elapsed:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {used:.1%}, Prefix cache hit rate: {hit_rate:.1%}"
        )
