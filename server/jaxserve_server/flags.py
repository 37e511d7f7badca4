"""The command line: flags, the configuration file, and the environment, read here and nowhere else.

Names and meanings are vLLM's where there is such a flag. Imports nothing heavy: `--help` must answer in
0.3 s, so neither jax nor an HTTP library may be reached from here.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve_server.flag_hints import refusal
from jaxserve_server.parser import ABOUT, DEFAULTS, PROG, Parser, make_parser

API_KEY_VARIABLE = "JAXSERVE_API_KEY"
ENGINE_FLAGS = tuple(f.name for f in fields(EngineConfig))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the operator asked for, checked as far as it can be without the model.

    Attributes:
        served_model_name: names that requests may use; empty: the model's own.
        api_key: never printed or logged; empty: no key is asked for.
        allowed_hosts: names in the Host header; empty: any address and localhost on a loopback host,
            anything elsewhere.
        shutdown_timeout: seconds that open requests are given after SIGTERM.
        given: the flags that were set, as they may be logged.
    """

    model: str
    host: str
    port: int
    api_key: tuple[str, ...] = field(repr=False)
    allow_unauthenticated: bool
    allowed_hosts: tuple[str, ...]
    root_path: str
    served_model_name: tuple[str, ...]
    dtype: str
    tokenizer: str | None
    revision: str | None
    chat_template: str | None
    generation_config: str
    shutdown_timeout: float
    uvicorn_log_level: str
    disable_log_requests: bool
    disable_log_stats: bool
    ssl_keyfile: str | None
    ssl_certfile: str | None
    enable_ssl_refresh: bool
    disable_frontend_multiprocessing: bool
    engine: EngineConfig
    given: Mapping[str, Any]


def parse_options(
    argv: Sequence[str], environment: Mapping[str, str] = os.environ, *, prog: str = PROG, about: str = ABOUT
) -> Options:
    """The options of `argv`, over those of its `--config` file, over the defaults.

    Args:
        prog, about: the command's name and what it does. Only the one that serves needs a key to listen for others.

    Exits with code 2 upon a usage error, and 0 after `--help` or `--version`.
    """
    parser = make_parser(prog, about)
    given = parse_given(parser, argv)
    config_file = given.pop("config", None)
    if config_file is not None:
        given = parse_given(parser, config_arguments(parser, config_file)) | given
    check_model_position(parser, given)
    values = DEFAULTS | given
    if not values["api_key"] and environment.get(API_KEY_VARIABLE):
        values["api_key"] = [environment[API_KEY_VARIABLE]]
    if prog == PROG:
        check(parser, values)
    engine = EngineConfig(**{name: values.pop(name) for name in ENGINE_FLAGS})
    for name in ("api_key", "allowed_hosts", "served_model_name"):
        values[name] = tuple(values[name])
    loggable = {name: value for name, value in given.items() if name != "api_key"}
    return Options(**values, engine=engine, given=loggable)


def parse_given(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Only what `argv` sets; an unknown flag ends the program with a hint."""
    found, unknown = parser.parse_known_args([dashed(argument) for argument in argv])
    values = vars(found)
    values.pop("no_effect", None)
    named = values.pop("model_flag", None)
    if named is not None:
        values.setdefault("model", named)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(refusal(unknown, known))
    return values


def dashed(argument: str) -> str:
    """vLLM takes underscores for dashes in the names of flags; so do we."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def config_arguments(parser: Parser, path: str) -> list[str]:
    """The flags in a YAML file of `name: value` pairs, as arguments. A list gives a flag several values."""
    import yaml  # 15 ms that only this flag needs

    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as exc:
        parser.error(f"argument --config: cannot read {path!r}: {getattr(exc, 'strerror', None) or 'not UTF-8 text'}")
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        parser.error(f"argument --config: {path!r} is not YAML{f', line {mark.line + 1}' if mark else ''}")
    if not isinstance(document, dict):
        parser.error(f"argument --config: {path!r} must hold 'flag: value' pairs, such as 'port: 8001'")
    switches = {option for action in parser._actions if action.nargs == 0 for option in action.option_strings}
    arguments: list[str] = []
    for name, value in document.items():
        flag = "--" + str(name).replace("_", "-")
        if value is False:
            negative = "--no-" + flag.removeprefix("--")
            arguments += [negative] if negative in switches else []
        elif value is True:
            arguments.append(flag)
        elif flag == "--api-key" and isinstance(value, list):
            arguments += [f"{flag}={item}" for item in value]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(parser: Parser, values: Mapping[str, Any]) -> None:
    """Ends the program if the values contradict each other."""
    if any(not key.strip() for key in values["api_key"]):
        parser.error(f"argument --api-key: a key must not be empty (nor {API_KEY_VARIABLE})")
    if not is_loopback(values["host"]) and not values["api_key"] and not values["allow_unauthenticated"]:
        parser.error(
            f"argument --host: {values['host']!r} can be reached from other machines and no API key is set. "
            f"Set --api-key or {API_KEY_VARIABLE}, or insist with --allow-unauthenticated"
        )
    if bool(values["ssl_keyfile"]) != bool(values["ssl_certfile"]):
        parser.error("arguments --ssl-keyfile and --ssl-certfile: give both or neither")
    for flag in ("ssl_keyfile", "ssl_certfile"):
        if values[flag] and not os.access(values[flag], os.R_OK):
            parser.error(f"argument --{flag.replace('_', '-')}: cannot read {values[flag]!r}")
    if values["enable_ssl_refresh"] and not values["ssl_certfile"]:
        parser.error("argument --enable-ssl-refresh: needs --ssl-certfile and --ssl-keyfile")


def check_model_position(parser: Parser, given: Mapping[str, Any]) -> None:
    """`--served-model-name name DIR` takes the folder for a second name: refused, or `demo` would be served."""
    names = given.get("served_model_name", ())
    if "model" not in given and names and Path(names[-1]).is_dir():
        parser.error(f"argument --served-model-name: {names[-1]!r} is a folder. Put the MODEL before this flag")
