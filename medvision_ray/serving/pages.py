"""The pages that a browser gets: the static ones below `/`, and the API's documentation without a foreign resource."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_HERE = Path(__file__).parent
STATIC = _HERE / "static"
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
pages = APIRouter(include_in_schema=False)


class StaticPages(StaticFiles):
    """Files of `serving/static/`. Mounted at `/`, so a route that is there for another method must be told from none."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, 404, or 405."""
        others = [route for route in scope["app"].routes if not isinstance(route, Mount)]
        methods = [
            method
            for method in _METHODS
            if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in others)
        ]
        if methods:
            raise HTTPException(405, headers={"Allow": ", ".join(methods)})
        return await super().get_response(path, scope)


@pages.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """The OpenAPI document for people."""
    return HTMLResponse(_page(request.app))


def _page(app: Any) -> str:
    document = app.openapi()
    operations = [
        {"path": path, "method": method.upper(), **operation}
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    schemas = document["components"]["schemas"]
    facts = {"info": document["info"], "operations": operations, "schemas": schemas}
    return str(_template().render(facts, kind_of=_kind_of))


@lru_cache(maxsize=1)
def _template() -> Any:
    return Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True).get_template("docs.html.j2")


def _kind_of(schema: dict[str, Any]) -> str:
    """A schema in a few words: its type, and the range of a number."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "anyOf" in schema:
        return " or ".join(_kind_of(item) for item in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"“{value}”" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        size = f" of {schema['minItems']}" if schema.get("minItems") and "maxItems" in schema else ""
        return f"list{size}: {_kind_of(schema.get('items', {}))}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    kind = str(schema.get("type", "any"))
    if low is None and high is None:
        return kind
    return f"{kind}, {low if low is not None else '…'} to {high if high is not None else '…'}"
