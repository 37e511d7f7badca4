"""The API's routes: what the app mounts besides the operations' own."""

from __future__ import annotations

from starlette.routing import Route

from jaxserve_server.routes.answer import answering
from jaxserve_server.routes.cache import reset_prefix_cache
from jaxserve_server.routes.chat import chat_completions
from jaxserve_server.routes.completions import completions
from jaxserve_server.routes.models import list_models, retrieve_model
from jaxserve_server.routes.tokenize import detokenize, tokenize, tokenizer_info


def api_routes() -> list[Route]:
    """Every route that reads `app.state.serving`."""
    return [
        Route("/v1/completions", answering(completions), methods=["POST"]),
        Route("/v1/chat/completions", answering(chat_completions, what="messages"), methods=["POST"]),
        Route("/v1/models", answering(list_models), methods=["GET"]),
        Route("/v1/models/{model:path}", answering(retrieve_model), methods=["GET"]),
        Route("/tokenize", answering(tokenize), methods=["POST"]),
        Route("/detokenize", answering(detokenize), methods=["POST"]),
        Route("/reset_prefix_cache", answering(reset_prefix_cache), methods=["POST"]),
        Route("/tokenizer_info", answering(tokenizer_info), methods=["GET"]),
    ]
