"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the model's tokenizer, as clients need it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxserve_server.body import read_request
from jaxserve_server.errors import ApiError, ErrorKind
from jaxserve_server.prompts import chat_prompt, checked_ids, off_loop
from jaxserve_server.responses import Detokenized, Tokenized
from jaxserve_server.routes.answer import json_response
from jaxserve_server.sampling import check_model
from jaxserve_server.schemas import DetokenizeRequest, TokenizeRequest
from jaxserve_server.serving import Serving
from jaxserve_server.token_text import token_text


async def tokenize(request: Request, serving: Serving) -> Response:
    """Token ids of a prompt or of a conversation, as the generation endpoints would use them."""
    body = await read_request(request, TokenizeRequest, max_depth=serving.limits.max_json_depth)
    check_model(body.model, serving, required=False)
    if body.prompt is not None and body.messages is not None:
        raise ApiError(ErrorKind.INVALID_COMBINATION, "messages", reason="Give 'prompt' or 'messages', not both.")
    ids = (
        list((await chat_prompt(body, serving)).token_ids) if body.messages is not None else await _plain(body, serving)
    )
    strings = [token_text(serving.tokenizer, token_id) for token_id in ids] if body.return_token_strs else None
    return json_response(Tokenized(len(ids), serving.max_model_len, ids, strings))


async def _plain(body: TokenizeRequest, serving: Serving) -> list[int]:
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort"):
        if getattr(body, name) is not None:
            raise ApiError(ErrorKind.NEEDS_ANOTHER, name, condition="'messages' are given")
    text = body.prompt
    if text is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "prompt")
    special = body.add_special_tokens is not False
    return await off_loop(len(text), serving, lambda: serving.tokenizer.encode(text, add_special_tokens=special))


async def detokenize(request: Request, serving: Serving) -> Response:
    """The text of token ids, special tokens included."""
    body = await read_request(request, DetokenizeRequest, max_depth=serving.limits.max_json_depth)
    check_model(body.model, serving, required=False)
    if body.tokens is None:
        raise ApiError(ErrorKind.MISSING_PARAMETER, "tokens")
    ids = checked_ids(body.tokens, serving.model_config.vocab_size, "tokens") if body.tokens else ()
    text = await off_loop(len(ids), serving, lambda: serving.tokenizer.decode(ids, skip_special_tokens=False))
    return json_response(Detokenized(text))


async def tokenizer_info(request: Request, serving: Serving) -> Response:
    """What tokenizer_config.json tells a client: its special tokens, its size and its chat template."""
    tokenizer = serving.tokenizer
    named = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            **named,
            **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in named},
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": serving.max_model_len,
            "chat_template": None if serving.chat_template is None else serving.chat_template.source,
        }
    )
