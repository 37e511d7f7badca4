"""Chat templates: messages to the prompt that the model was trained on.

Owns rendering, its bounds, and what of a request may reach a template. Must not know HTTP or the engine.

Templates come from the operator, with the model; a request never brings one. They run in the caller's
thread. A template's time cannot be bounded there, so it is tried out once when it is loaded, under a time
limit; its output is bounded at every request, and so are messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes

from jaxserve.checks import check_length
from jaxserve.errors import ConfigError, ParameterError
from jaxserve.text.guard import Guard
from jaxserve.text.messages import FIELD_NAMES, normalize_messages
from jaxserve.text.template_environment import RaisedByTemplateError, make_environment
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_files import read_json_object

MAX_RENDERED_CHARS = 4 * 1024 * 1024
MAX_TEMPLATE_CHARS = 1024 * 1024
MAX_KWARGS = 16
MAX_KWARG_CHARS = 1024
TRIAL_LIMIT_S = 5.0
# What the server itself gives to a template, or takes from the request elsewhere.
RESERVED = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
        *("padding", "truncation", "max_length", "additional_special_tokens"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner"),
        *("loop", "self", "caller", "varargs", "kwargs"),
    )
)
_REFUSED = "The messages could not be rendered with this model's chat template: it does not accept them as they are."

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How one chat is rendered.

    Attributes:
        add_generation_prompt: end with the header of the assistant's turn.
        continue_final_message: end with the last message's own text, to go on with it; no header then.
        tools: JSON schemas of functions, for templates that know them.
        template_kwargs: `chat_template_kwargs`: scalars for the template's own variables.

    Raises:
        ParameterError: a keyword that is reserved, or not a scalar, or too long; or too many.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Scalar | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_length("chat_template_kwargs", self.template_kwargs, MAX_KWARGS)
        for name, value in self.template_kwargs.items():
            if name in RESERVED or not name.isidentifier() or name.startswith("_"):
                raise _bad_kwarg(name, "is not for a request to set.")
            if value is not None and not isinstance(value, str | int | float | bool):
                raise _bad_kwarg(name, f"must be a string, number or boolean, got {type(value).__name__}.")
            if isinstance(value, str) and len(value) > MAX_KWARG_CHARS:
                raise _bad_kwarg(name, f"must have at most {MAX_KWARG_CHARS} characters, got {len(value)}.")


class ChatTemplate:
    """One compiled template. Immutable, and safe to use from several threads.

    Args:
        source: jinja text.
        special_tokens: named special tokens, variables of the template.
        now: the clock that a template may ask.

    Attributes:
        source: as given.
        variables: names that `chat_template_kwargs` may set: those that the template reads.

    Raises:
        ConfigError: the template does not compile, or cannot render one short message in time.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
    ):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ConfigError(f"A chat template must have at most {MAX_TEMPLATE_CHARS} characters, got {len(source)}.")
        environment = make_environment(now)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateSyntaxError as exc:
            raise ConfigError(f"The chat template does not compile: line {exc.lineno}: {exc.message}") from exc
        except (RecursionError, ValueError, OverflowError) as exc:
            raise ConfigError(f"The chat template does not compile: {exc}") from exc
        self.source = source
        self.variables = _free_variables(tree) - RESERVED
        self._special_tokens = dict(special_tokens)
        self._try_out()

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> str:
        """The prompt as text, the same that transformers renders.

        Raises:
            ParameterError: the template refuses the messages (code `invalid_prompt`), the prompt gets too
                long, or an option is not one of this template's.
        """
        rendered, guard = self.render_guarded(Guard(""), messages, options)
        return guard.reveal(rendered)

    def render_guarded(
        self, guard: Guard, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> tuple[str, Guard]:
        """As `render`, but with stand-ins for the clients' text; and the guard that reveals it.

        Args:
            guard: preferred; another is made where a text holds one of its stand-ins.
        """
        options = options or ChatOptions()
        self._check_kwargs(options.template_kwargs)
        messages = self._known_roles(normalize_messages(messages))
        inputs = {"messages": messages, "tools": options.tools, **options.template_kwargs}
        guard = guard.clear_of([self.source, *_strings(inputs)])
        variables: dict[str, Any] = {
            **self._special_tokens,
            **{name: guard.protect(value, FIELD_NAMES) for name, value in inputs.items()},
            "documents": None,
            "add_generation_prompt": options.add_generation_prompt and not options.continue_final_message,
        }
        for message, guarded in zip(messages, variables["messages"], strict=True):
            guarded["role"] = message["role"]  # one of ours: templates build control tokens from it
        if options.continue_final_message:
            last = variables["messages"][-1]
            last["content"] = last.get("content", guard.protect("")) + f"{guard.mark} "
        rendered = self._run(variables)
        return (_cut_at_mark(rendered, guard.mark) if options.continue_final_message else rendered), guard

    def _run(self, variables: Mapping[str, Any]) -> str:
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise _refused(f"The messages make a prompt of more than {MAX_RENDERED_CHARS} characters.")
        except ParameterError:
            raise
        except Exception as exc:  # whatever a template's code can raise; its text is not for clients
            raise _refused(_REFUSED) from exc
        return "".join(pieces)

    def _check_kwargs(self, kwargs: Mapping[str, Scalar | None]) -> None:
        for name in kwargs:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise _bad_kwarg(name, f"is not a variable of this model's chat template. It has: {known}.")

    def _known_roles(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A template that never heard of developers would drop what they say: to it they are the system."""
        if "developer" in self.source:
            return messages
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]

    def _try_out(self) -> None:
        """Renders one message in a thread of its own, which is given up after `TRIAL_LIMIT_S`."""
        failures: list[BaseException] = []

        def trial() -> None:
            try:
                self.render([{"role": "user", "content": "Hello"}])
            except Exception as exc:
                failures.append(exc.__cause__ or exc)

        thread = threading.Thread(target=trial, name="chat-template-trial", daemon=True)
        thread.start()
        thread.join(TRIAL_LIMIT_S)
        if thread.is_alive():
            raise ConfigError(f"The chat template did not render one short message within {TRIAL_LIMIT_S:g} s.")
        if failures and not isinstance(failures[0], RaisedByTemplateError):
            raise ConfigError(f"The chat template cannot render one short message: {failures[0]}")


def load_chat_template(folder: str | Path, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate | None:
    """The model's chat template, or None if it has none (`/v1/completions` needs none).

    Looks at `override` (a file, or jinja text itself), `chat_template.jinja`, `chat_template.json` and
    `tokenizer_config.json`, in this order.

    Raises:
        ConfigError: the template, or `override`, cannot be used.
    """
    source = _read_override(override) if override is not None else _read_template(Path(folder), tokenizer)
    return None if source is None else ChatTemplate(source, tokenizer.special_tokens)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    messages: Sequence[Mapping[str, Any]],
    options: ChatOptions | None = None,
    *,
    add_special_tokens: bool = False,
) -> list[int]:
    """The prompt's ids. No text of a client becomes a control token; the template's own text does.

    The ids of messages that spell no control token are those of the rendered text.

    Args:
        add_special_tokens: also put BOS (or what else the tokenizer adds) around it; templates mostly
            write it themselves.

    Raises:
        ParameterError: see `ChatTemplate.render`; or the model has no template.
    """
    if template is None:
        raise ParameterError(
            "This model has no chat template. Use /v1/completions, or start the server with --chat-template FILE.",
            param="messages",
            code="unsupported_value",
        )
    rendered, guard = template.render_guarded(tokenizer.guard, messages, options)
    return tokenizer.encode_rendered(rendered, guard, add_special_tokens)


def _read_override(override: str) -> str:
    path = Path(override)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        if "{" not in override:
            raise ConfigError(f"--chat-template {override!r} cannot be read: {exc}") from exc
    if "{" in override:
        return override
    raise ConfigError(f"--chat-template {override!r} is neither a file nor a template: nothing in it is a jinja tag.")


def _read_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = read_json_object(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    if value is None or isinstance(value, str):
        return value
    if "default" not in value:
        raise ConfigError(f"The model has several chat templates and none is 'default': {', '.join(sorted(value))}.")
    return value["default"]


def _free_variables(tree: nodes.Template) -> frozenset[str]:
    """What a template reads from outside: not its own names, unless it asks whether they are defined."""
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        check.node.name
        for check in tree.find_all((nodes.Test, nodes.Filter))
        if check.name in ("defined", "undefined", "default", "d") and isinstance(check.node, nodes.Name)
    }
    return frozenset(meta.find_undeclared_variables(tree) - (own - asked))


def _cut_at_mark(rendered: str, mark: str) -> str:
    """What stands before the mark; a template that trimmed the message trims its end here too."""
    before, found, after = str.rpartition(rendered, mark)
    if not found:
        raise _refused("continue_final_message: this model's chat template leaves the last message's text out.")
    return before if after.startswith(" ") else before.rstrip()


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _refused(message: str) -> ParameterError:
    return ParameterError(message, param="messages", code="invalid_prompt")


def _bad_kwarg(name: str, reason: str) -> ParameterError:
    shown = name[:64]
    return ParameterError(f"Invalid 'chat_template_kwargs': '{shown}' {reason}", param=f"chat_template_kwargs.{shown}")
