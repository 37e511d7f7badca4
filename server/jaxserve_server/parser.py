"""The flags' names, values, defaults and help texts, as an argparse parser.

Says what can be written; `flags.py` decides what it means together. Stdlib only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from jaxserve import __version__
from jaxserve.config import EngineConfig
from jaxserve_server.flag_hints import NO_EFFECT, ONLY

PROG = "python -m jaxserve.serve"
ABOUT = "Serve a model over the OpenAI API. Flags have vLLM's names where the meaning is the same."
DTYPE_NAMES = {
    **{"auto": "auto", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"},
    **{"float": "float32", "half": "float16"},
}
KV_DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "pallas", "xla")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")

DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(EngineConfig)},
    "model": "demo",
    "host": "127.0.0.1",
    "port": 8000,
    "api_key": [],
    "allow_unauthenticated": False,
    "allowed_hosts": [],
    "root_path": "",
    "served_model_name": [],
    "dtype": "auto",
    "tokenizer": None,
    "revision": None,
    "chat_template": None,
    "generation_config": "auto",
    "shutdown_timeout": 30.0,
    "uvicorn_log_level": "info",
    "disable_log_requests": False,
    "disable_log_stats": False,
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "enable_ssl_refresh": False,
    "disable_frontend_multiprocessing": False,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors go to stderr with exit code 2 and name the way out."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")


def make_parser(prog: str = PROG, about: str = ABOUT) -> Parser:
    """The parser. What it returns holds only what was set: defaults are added later, below the config file."""
    parser = Parser(
        prog=prog,
        description=about,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of 'flag: value' pairs; flags go before it")
    add_model_flags(parser)
    add_server_flags(parser)
    add_engine_flags(parser)
    for option, allowed in ONLY.items():
        parser.add_argument(*option, dest="no_effect", type=only(allowed), help=argparse.SUPPRESS)
    for flag in NO_EFFECT:
        parser.add_argument(flag, dest="no_effect", action="store_true", help=argparse.SUPPRESS)
    return parser


def add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("model", nargs="?", metavar="MODEL", help="'demo' (default), a Hugging Face or converted folder, or org/name")
    add("--model", dest="model_flag", help=argparse.SUPPRESS)
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use; the first is answered")
    add("--dtype", type=dtype, help="of the weights: auto (default), float32, bfloat16, float16")
    add("--tokenizer", metavar="NAME", help="folder or org/name of another tokenizer")
    add("--revision", help="branch, tag or commit of org/name")
    add("--chat-template", metavar="FILE", help="a Jinja file, or the template itself")
    add("--generation-config", metavar="SOURCE", help="sampling defaults: auto (the model's), vllm (none) or a folder")
    add("--max-model-len", type=model_len, metavar="N", help="longest prompt and output, tokens; e.g. 4k")


def add_server_flags(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", help="address to listen on (127.0.0.1); others need a key")
    add("--port", type=port_number, help="port to listen on (8000); 0 takes a free one")
    add("--api-key", action="append", metavar="KEY", help="repeatable; better: JAXSERVE_API_KEY in the environment")
    add("--allow-unauthenticated", action="store_true", help="listen on a non-loopback host without a key")
    add("--allowed-hosts", nargs="+", metavar="NAME", help="Host headers to answer, *.name for all below; '*' for any")
    add("--root-path", metavar="PREFIX", help="path prefix of a proxy in front")
    add("--ssl-keyfile", metavar="FILE", help="PEM key")
    add("--ssl-certfile", metavar="FILE", help="PEM certificate chain")
    add("--enable-ssl-refresh", action="store_true", help="take new certificates when the files change")
    add("--shutdown-timeout", type=seconds, metavar="S", help="seconds for open requests after SIGTERM (30); 0: none")
    add("--uvicorn-log-level", choices=LOG_LEVELS, help="of the HTTP server (info)")
    add("--disable-log-requests", "--disable-uvicorn-access-log", action="store_true", help="no line a request")
    add("--disable-log-stats", action="store_true", help="no throughput line every 10 s")
    add("--disable-frontend-multiprocessing", action="store_true", help="the engine in the HTTP server's process")


def add_engine_flags(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add("--tensor-parallel-size", "-tp", type=positive, metavar="N", help="devices that the model is cut over (1)")
    add("--max-num-seqs", type=positive, metavar="N", help="sequences a step")
    add("--max-num-batched-tokens", type=positive, metavar="N", help="tokens a step; longer prompts are chunked")
    add("--max-num-queued-reqs", type=positive, metavar="N", help="waiting requests; more get 503 (1024)")
    add(
        "--queue-timeout",
        type=seconds,
        metavar="S",
        help="seconds to wait for a first step, then 503 (30); 0: for ever",
    )
    add("--batching-window-ms", type=milliseconds, metavar="MS", help="wait so long for others to start with (0)")
    add("--block-size", type=positive, metavar="N", help="tokens a KV block (16)")
    add("--kv-cache-memory-bytes", type=positive, metavar="BYTES", help="KV pool, e.g. 2GiB; goes before the share")
    add(
        *("--gpu-memory-utilization", "--device-memory-utilization"),
        type=share,
        metavar="SHARE",
        help="share of the device's memory for weights, activations and KV (0.9)",
    )
    add("--num-gpu-blocks-override", type=positive, metavar="N", help="number of KV blocks, whatever the memory")
    add("--kv-cache-dtype", choices=KV_DTYPES, help="of the KV cache (auto: the model's)")
    kernels = "auto (kernels where they are right), pallas (those or none), xla (on a CPU for products, too)"
    add("--attention-backend", choices=ATTENTION, help=kernels)
    add(
        "--stacked-layers",
        action=argparse.BooleanOptionalAction,
        help="one loop runs all layers: deep models compile fast (off)",
    )
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="keep the KV of past requests (on)")
    add("--swap-space", type=gibibytes, metavar="GIB", help="host memory for preempted KV (4); 0: compute it again")
    add("--seed", type=whole_number, metavar="N", help="draws the seeds of requests that bring none (0)")
    add("--exact", action=argparse.BooleanOptionalAction, help="the same bits whatever else runs (on where it is free)")
    add("--async-scheduling", action=argparse.BooleanOptionalAction, help="plan a step while another runs (on)")
    add(
        "--max-decode-steps",
        type=positive,
        metavar="N",
        help="tokens a row that one device call decodes (16); 1: no loop",
    )
    add("--stream-interval-ms", type=milliseconds, metavar="MS", help="how long such a call may take (20)")
    add("--compilation-cache-dir", type=optional_folder, metavar="DIR", help="compiled programs; 'none' keeps none")


def whole_number(text: str) -> int:
    """An integer, or one with a unit: 16k is 16,000, 16K and 16KiB are 16,384, 2GB is 2*10^9."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])b?|([KMGT])(B|iB)?)", text.strip())
    if match is None:
        if re.fullmatch(r"-?[0-9]+", text.strip()):
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number such as 4096, 4k or 2GiB, got {text!r}")
    number, decimal, binary, suffix = match.groups()
    power = "kmgt".index((decimal or binary).lower()) + 1
    is_decimal = decimal is not None or suffix == "B"
    value = float(number) * (1000 if is_decimal else 1024) ** power
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}, which is {value:g}")
    return int(value)


def positive(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return value


def model_len(text: str) -> int | None:
    return None if text.strip().lower() in ("auto", "-1") else positive(text)


def dtype(text: str) -> str:
    if text not in DTYPE_NAMES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPE_NAMES)}, got {text!r}")
    return DTYPE_NAMES[text]


def optional_folder(text: str) -> str | None:
    return None if text == "none" else text


def port_number(text: str) -> int:
    value = whole_number(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text!r}")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


def number(text: str, high: float) -> float:
    """A number from 0 to `high`; -1 for what is none or lies beyond."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if 0.0 <= value <= high else -1.0


def gibibytes(text: str) -> float:
    value = number(text, 2**20)
    if not 0.0 <= value < 2**20:
        raise argparse.ArgumentTypeError(f"expected a number of GiB from 0 to 1048576, such as 4 or 0.5, got {text!r}")
    return value


def seconds(text: str) -> float:
    value = number(text, 86_400.0)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 to 86400 seconds, got {text!r}")
    return value


def milliseconds(text: str) -> float:
    value = number(text, 10_000.0)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 to 10000 milliseconds, got {text!r}")
    return value


def only(allowed: tuple[str, ...]) -> Callable[[str], str]:
    """A type that takes these values alone."""

    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"not supported: {text!r}; only {' or '.join(allowed)} is served")
        return text

    return check
