"""`GET /v1/models` and `GET /v1/models/{id}`: the names that are served."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxserve_server.responses import ModelCard, ModelList, ModelPermission
from jaxserve_server.routes.answer import json_response
from jaxserve_server.sampling import check_model
from jaxserve_server.serving import Serving


async def list_models(request: Request, serving: Serving) -> Response:
    return json_response(ModelList(data=[model_card(name, serving) for name in serving.model_names]))


async def retrieve_model(request: Request, serving: Serving) -> Response:
    """One model's card. A name may hold slashes, and is looked up as it is, never as a path."""
    name = request.path_params["model"]
    check_model(name, serving, required=True)
    return json_response(model_card(name, serving))


def model_card(name: str, serving: Serving) -> ModelCard:
    """vLLM's card; its fields are the same at every call, so that clients can compare them."""
    return ModelCard(
        id=name,
        created=serving.created,
        root=serving.model_name,
        max_model_len=serving.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{serving.system_fingerprint}", created=serving.created)],
    )
