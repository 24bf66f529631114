"""The JSON interface's description in the form of OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

import explainer
from explainer.look.intake import FIELD
from explainer.look.interface import MASKS, VERSION

_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_NUMBERS = {"type": "object", "additionalProperties": _SHARE}
_TEXT_OR_NONE = {"type": ["string", "null"]}
_SIZE = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2, "description": "height, width"}


def document(title: str, max_bytes: int, max_pixels: int) -> dict[str, Any]:
    """The description of one server.

    Args:
        title: name of the model.
        max_bytes: largest file.
        max_pixels: largest picture.
    """
    limits = f"At most {max_bytes / 2**20:.4g} MB and {max_pixels / 1e6:g} million pixels."
    return {
        "openapi": "3.1.0",
        "info": {"title": f"explainer: {title}", "version": VERSION, "summary": "Class masks of pictures", "description": limits},
        "servers": [{"url": "/"}],
        "paths": {
            "/api/explain": {"post": _explain(limits)},
            "/api/model": {
                "get": {
                    "operationId": "model",
                    "summary": "Which model answers, and its limits",
                    "responses": {"200": _answer("The model", "Facts"), "default": _answer("Refused", "Error")},
                }
            },
        },
        "components": {"schemas": _schemas()},
        "x-explainer-version": explainer.__version__,
    }


def _explain(limits: str) -> dict[str, Any]:
    file = {"type": "object", "properties": {FIELD: {"type": "string", "format": "binary"}}, "required": [FIELD]}
    failures = {
        "400": "An option or class that does not exist, or a form without a file",
        "403": "Another site, or another host name",
        "408": "The upload took too long",
        "411": "No Content-Length",
        "413": "The file is too large",
        "422": "Not a readable image, or too many pixels",
        "500": "A fault of the server or of the model",
        "503": "Busy; see Retry-After",
    }
    return {
        "operationId": "explain",
        "summary": "Probabilities, areas and masks of one picture",
        "description": f"The picture is not kept. {limits}",
        "parameters": _parameters(),
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": file},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": _answer("The explanation", "Explanation"),
            **{status: _answer(text, "Error") for status, text in failures.items()},
        },
    }


def _parameters() -> list[dict[str, Any]]:
    names = {"type": "array", "items": {"type": "string"}}
    shown: dict[str, tuple[dict[str, Any], str]] = {
        "classes": (
            names,
            "Names whose masks are wanted, separated by commas. Default: the predicted classes; without classifier, those "
            "with a mask that reaches 0.5, at most five. A name with a comma stands in double quotes.",
        ),
        "top": ({"type": "integer", "minimum": 1}, "Masks of the most probable classes, this many, instead of classes."),
        "masks": (
            {"type": "string", "enum": list(MASKS), "default": "png"},
            "png: 8-bit grey in base64, of the picture's size. rle: COCO's compressed run lengths.",
        ),
        "threshold": (_SHARE, "Probability from which a class counts as predicted (multi-label). Default: the server's."),
        "cut": (_SHARE, "Mask value from which a pixel belongs to the mask. Default: 0 (soft) for png, 0.5 for rle."),
    }
    made: list[dict[str, Any]] = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": text} for name, (schema, text) in shown.items()
    ]
    made[0] |= {"style": "form", "explode": False}
    return made


def _answer(text: str, schema: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _schemas() -> dict[str, Any]:
    runs = _object({"size": {**_SIZE}, "counts": {"type": "string"}})
    model = {
        "name": {"type": "string"},
        "weights": {**_TEXT_OR_NONE, "description": "fingerprint of the Explainer's weights"},
        "explained_classifier": {**_TEXT_OR_NONE, "description": "fingerprint of the classifier it explains"},
        "precision": _TEXT_OR_NONE,
        "geometry": {"type": "string", "description": "how a picture becomes the network's image: squash, letterbox or crop"},
    }
    versions = _object({"explainer": {"type": "string"}, "interface": {"type": "string"}})
    names = {"type": "array", "items": {"type": "string"}}
    return {
        "Explanation": _object(
            {
                "size": _object({"height": {"type": "integer", "minimum": 1}, "width": {"type": "integer", "minimum": 1}}),
                "probabilities": {"anyOf": [_NUMBERS, {"type": "null"}], "description": "of every class; null without classifier"},
                "predicted": {"anyOf": [names, {"type": "null"}], "description": "most probable first; null without classifier"},
                "areas": {**_NUMBERS, "description": "mean of every class's soft mask: the share of the picture that it keeps"},
                "masks": {"type": "array", "items": {"$ref": "#/components/schemas/Mask"}},
                "model": _object(model),
                "network_size": _SIZE,
                "seconds": {"type": "number", "minimum": 0},
                "versions": versions,
            }
        ),
        "Mask": _object(
            {
                "class": {"type": "string"},
                "png": {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"},
                "rle": {**runs, "description": "as pycocotools.mask.decode reads it"},
            },
            optional=("png", "rle"),
        ),
        "Facts": _object(
            {
                **model,
                "classes": names,
                "task": _TEXT_OR_NONE,
                "threshold": _SHARE,
                "network_size": _SIZE,
                "limits": _object({"bytes": {"type": "integer"}, "pixels": {"type": "integer"}}),
                "versions": versions,
            }
        ),
        "Error": _object({"error": {"type": "string"}, "status": {"type": "integer"}}),
    }
