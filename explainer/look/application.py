"""The server's application: the page and what it asks for, and the JSON interface."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import explainer
from explainer.errors import CorruptSampleError, DatasetNotFoundError, ExplainerError, NumericalError
from explainer.look.guard import failure
from explainer.look.intake import Intake
from explainer.look.interface import VERSION, explained, model_facts, parse_options, share
from explainer.look.openapi import document
from explainer.look.uploads import ALL, OWN, Map, Upload, Uploads
from explainer.report.page import inline, rendered

HEADER = "X-Explainer"  # of the page's uploads; a page of another site may not set it
_STATUS: tuple[tuple[type[ExplainerError], HTTPStatus], ...] = (
    (DatasetNotFoundError, HTTPStatus.NOT_FOUND),
    (CorruptSampleError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (NumericalError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (ExplainerError, HTTPStatus.BAD_REQUEST),
)


class Application:
    """Answers of one model.

    Args:
        uploads: what is shown.
        max_bytes: largest size of an upload.
        title: title of the page.
        notice: shown on the page, or empty.

    Attributes:
        app: the ASGI application.
        intake: bodies and work under way.
    """

    def __init__(self, uploads: Uploads, max_bytes: int, title: str, notice: str) -> None:
        self.uploads, self.title, self.notice = uploads, title, notice
        self.intake = Intake(max_bytes)
        self.content, self.policy = _content(title, notice)
        self.app = self._starlette()

    def _starlette(self) -> Starlette:
        answers: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/": ("GET", self.page),
            "/model": ("GET", self.model),
            "/explain": ("POST", self.upload),
            "/picture": ("GET", self.picture),
            "/map": ("GET", self.map),
            "/judge": ("GET", self.judge),
            "/download": ("GET", self.download),
            "/api/explain": ("POST", self.explain),
            "/api/model": ("GET", self.facts),
            "/api/openapi.json": ("GET", self.openapi),
        }
        routes = [Route(path, answer, methods=[method]) for path, (method, answer) in answers.items()]
        handlers: dict[Any, Any] = {ExplainerError: _diagnosed, HTTPException: _refused, ClientDisconnect: _gone, Exception: _fault}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def page(self, request: Request) -> Response:
        """The page."""
        return Response(self.content, media_type="text/html", headers={"Content-Security-Policy": self.policy})

    async def model(self, request: Request) -> Response:
        """What the page must know of the model."""
        return JSONResponse({**self.uploads.describe(), "max_bytes": self.intake.max_bytes, "header": HEADER})

    async def upload(self, request: Request) -> Response:
        """A picture for the page, which is remembered."""
        if HEADER not in request.headers:
            raise HTTPException(HTTPStatus.FORBIDDEN, f"An upload of the page needs the header {HEADER}. Programs send to /api/explain.")
        async with self.intake.body(request) as body:
            return JSONResponse(upload_facts(await self.intake.compute(self.uploads.add, body), len(self.uploads.runtime.classes)))

    async def picture(self, request: Request) -> Response:
        """A remembered picture."""
        key = request.query_params.get("id", "")
        content, kind = await self.intake.compute(lambda: self.uploads.preview(self.uploads.find(key)))
        return Response(content, media_type=kind)

    async def map(self, request: Request) -> Response:
        """A map of a remembered picture."""

        def found() -> dict[str, Any]:
            upload, _, _, of_method = self._asked(request)
            return map_facts(upload, of_method)

        return JSONResponse(await self.intake.compute(found))

    async def judge(self, request: Request) -> Response:
        """What the classifier says to a map."""

        def judged() -> dict[str, float]:
            upload, _, chosen, found = self._asked(request)
            return self.uploads.judge(upload, found, chosen, _cut(request))

        return JSONResponse(await self.intake.compute(judged))

    async def download(self, request: Request) -> Response:
        """A map as a file at the picture's own size."""

        def file() -> tuple[str, bytes]:
            upload, method, chosen, found = self._asked(request)
            kind = request.query_params.get("kind", "overlay")
            return self.uploads.file_name(kind, method, chosen), self.uploads.png(upload, kind, found, _cut(request))

        name, content = await self.intake.compute(file)
        return Response(content, media_type="image/png", headers={"Content-Disposition": f'attachment; filename="{_ascii(name)}"'})

    def _asked(self, request: Request) -> tuple[Upload, str, int | str, Map]:
        query, u = request.query_params, self.uploads
        upload, method, chosen = u.find(query.get("id", "")), query.get("method", OWN), _class(query.get("class", ""))
        return upload, method, chosen, u.map(upload, method, chosen)

    async def explain(self, request: Request) -> Response:
        """The interface: a picture in; probabilities, areas and masks out."""
        options = parse_options(request.query_params.multi_items())
        async with self.intake.picture(request) as data:
            return await self.intake.compute(lambda: JSONResponse(explained(self.uploads, data, options, self.title)))

    async def facts(self, request: Request) -> Response:
        """The interface: which model answers, and its limits."""
        kept = {key: value for key, value in self.uploads.describe().items() if key in ("classes", "task", "threshold")}
        return JSONResponse(
            {
                **model_facts(self.uploads.runtime, self.title),
                **kept,
                "network_size": list(self.uploads.size),
                "limits": {"bytes": self.intake.max_bytes, "pixels": self.uploads.max_pixels},
                "versions": {"explainer": explainer.__version__, "interface": VERSION},
            }
        )

    async def openapi(self, request: Request) -> Response:
        """The interface's description."""
        return JSONResponse(document(self.title, self.intake.max_bytes, self.uploads.max_pixels))


async def _diagnosed(request: Request, error: Exception) -> Response:
    return failure(next(status for kind, status in _STATUS if isinstance(error, kind)), str(error))


async def _refused(request: Request, error: HTTPException) -> Response:
    words = {
        404: f"There is no {request.scope['path'][:100]!r} here.",
        405: f"{request.scope['path']} does not answer to {request.method}.",
    }
    return failure(error.status_code, words.get(error.status_code, error.detail), error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return failure(HTTPStatus.BAD_REQUEST, "The upload ended early.")


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours. The reason goes to the terminal, not to the client."""
    return failure(HTTPStatus.INTERNAL_SERVER_ERROR, "The server failed; its terminal shows why.")


def upload_facts(upload: Upload, num_classes: int) -> dict[str, Any]:
    """What the page is told about an upload; the masks follow one by one. A class without a mask has no area."""
    areas: list[float | None] = [None] * num_classes
    for k, area in zip(upload.classes, upload.areas, strict=True):
        areas[k] = round(float(area), 6)
    return {
        "id": upload.key,
        "height": upload.picture.size[0],
        "width": upload.picture.size[1],
        "scores": None if upload.scores is None else [round(float(s), 6) for s in upload.scores],
        "areas": areas,
        "chosen": upload.chosen,
    }


def map_facts(upload: Upload, found: Map) -> dict[str, Any]:
    """A map as bytes (0..255, row by row) in base64, the part of the picture that it lies on, and its numbers."""
    seen = found.values[*upload.picture.inside]
    values = (seen.clip(0, 1) * 255).round().astype(np.uint8)
    return {
        "height": values.shape[0],
        "width": values.shape[1],
        "data": base64.b64encode(values.tobytes()).decode(),
        "box": list(upload.box),
        "area": round(float(seen.mean()), 6),
        "seconds": round(found.seconds, 3),
        "note": found.note,
    }


def _class(text: str) -> int | str:
    return ALL if text == ALL else int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else text


def _cut(request: Request) -> float:
    return share("cut", request.query_params.get("cut", "0"))


def _content(title: str, notice: str) -> tuple[bytes, str]:
    """The page, and its policy: only this very style and script, nothing from elsewhere."""
    text = rendered("look/serve.html", title=title, notice=notice, images="'self' data:", connect="'self'")
    hashes = {tag: base64.b64encode(hashlib.sha256(inline(text, tag).encode()).digest()).decode() for tag in ("style", "script")}
    policy = (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _ascii(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
