"""The JSON interface: what a picture is answered with, and that its description is true."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import explainer
from explainer.data.run_length import decode_runs
from explainer.errors import ConfigError, NumericalError
from explainer.inference.eager import EagerRuntime
from explainer.inference.explaining import upsample
from explainer.look import interface
from explainer.look.application import map_facts, upload_facts
from explainer.look.interface import Options, explained, parse_options
from explainer.look.server import Server
from explainer.look.uploads import Uploads
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.look.conftest import direct, encoded, photograph, running
from tests.unit.look.test_serve import ask, small

__all__ = ["small"]


@pytest.fixture(scope="module")
def server(net: Explainer, classifier: Explanandum) -> Iterator[Server]:
    with running(direct(net, classifier)) as made:
        yield made


def form(content: bytes, field: str = "image", more: str = "") -> tuple[bytes, dict[str, str]]:
    """The body that ``curl -F image=@photo.png`` sends, and its headers."""
    head = f'--limit\r\nContent-Disposition: form-data; name="{field}"; filename="photo.png"\r\nContent-Type: image/png\r\n\r\n'
    return more.encode() + head.encode() + content + b"\r\n--limit--\r\n", {"Content-Type": "multipart/form-data; boundary=limit"}


def send(server: Server, query: str = "", content: bytes | None = None, path: str = "/api/explain") -> tuple[int, Any]:
    body, headers = form(encoded(photograph()) if content is None else content)
    return ask(server, path + query, body, {**headers, "X-Explainer": ""})[:2]


def pixels(mask: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"]))))


def conform(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str = "answer") -> None:
    """Check a value against the part of JSON Schema that the description uses."""
    if "$ref" in schema:
        return conform(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, where)
    if "anyOf" in schema:
        assert any(value is None if s.get("type") == "null" else isinstance(value, dict | list) for s in schema["anyOf"]), where
        return None if value is None else conform(value, schema["anyOf"][0], schemas, where)
    kinds = {"string": str, "number": int | float, "integer": int, "null": type(None), "object": dict, "array": list}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, kinds[t]) and not isinstance(value, bool) for t in types), (where, value)
    if isinstance(value, int | float):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), (where, value)
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), where
        for item in value:
            conform(item, schema["items"], schemas, where + "[]")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", False)
        assert set(schema.get("required", ())) <= set(value), (where, value.keys())
        for key, inner in value.items():
            assert key in known or rest, (where, key)
            conform(inner, known.get(key, rest), schemas, f"{where}.{key}")
    return None


def test_a_picture_is_answered_with_probabilities_areas_and_masks(
    server: Server, net: Explainer, classifier: Explanandum, small: torch.Tensor
) -> None:
    with torch.no_grad():
        masks, scores = net(small)[0], classifier(small).sigmoid()[0]
    status, found = send(server)
    names = ["red", "green", "a/b blue"]
    assert status == 200 and found["size"] == {"height": 40, "width": 48} and found["network_size"] == [32, 32]
    assert list(found["probabilities"].values()) == pytest.approx(scores.tolist(), abs=1e-5) and list(found["areas"]) == names
    assert list(found["areas"].values()) == pytest.approx(masks.mean(dim=(1, 2)).tolist(), abs=1e-5)
    predicted = [names[int(k)] for k in scores.argsort(descending=True) if scores[k] >= 0.5]
    assert found["predicted"] == [m["class"] for m in found["masks"]] == predicted and predicted
    assert found["versions"] == {"explainer": explainer.__version__, "interface": "1"} and found["model"]["name"] == "run"
    wanted = upsample(masks.numpy(), (40, 48))
    for mask in found["masks"]:
        k = names.index(mask["class"])
        assert np.abs(pixels(mask) - (wanted[k] * 255).round().numpy()).max() <= 1 and pixels(mask).shape == (40, 48)

    status, found = send(server, "?classes=red,a/b%20blue&masks=rle")
    assert status == 200 and [m["class"] for m in found["masks"]] == ["red", "a/b blue"]
    for mask in found["masks"]:
        runs = decode_runs(mask["rle"], 40, 48)
        assert (runs == (wanted[names.index(mask["class"])] >= 0.5).numpy()).mean() > 0.999
    binary = send(server, "?classes=red&cut=0.3")[1]["masks"][0]
    assert ((pixels(binary) == 255) == (wanted[0] >= 0.3).numpy()).mean() > 0.999 and set(np.unique(pixels(binary))) <= {0, 255}

    best = [names[int(k)] for k in scores.argsort(descending=True)]
    assert [m["class"] for m in send(server, "?top=2")[1]["masks"]] == best[:2]
    assert len(send(server, "?top=99")[1]["masks"]) == 3
    none = send(server, "?threshold=1&masks=none")[1]
    assert none["predicted"] == [] == none["masks"] and set(none["areas"]) == set(names)
    assert server.uploads._kept == {}, "pictures of programs are not kept"


def test_a_body_without_a_form_is_the_picture(server: Server) -> None:
    for kind in ("image/png", "application/x-www-form-urlencoded", ""):  # the second is what curl --data-binary says
        status, found, _ = ask(server, "/api/explain?masks=none", encoded(photograph()), {"Content-Type": kind, "X-Explainer": ""})
        assert status == 200 and found["areas"] == send(server, "?masks=none")[1]["areas"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?classes=purple", "unknown class 'purple'. This model has: red, green, a/b blue"),
        ("?top=0", "top must be a whole number of at least 1, received '0'"),
        ("?top=1&top=2", "given twice"),
        ("?top=1&classes=red", "one of both"),
        ("?masks=jpg", "masks must be one of png, rle, none, received 'jpg'"),
        ("?threshold=nan", "threshold must be a number in [0,1], received 'nan'"),
        ("?cut=1.5", "cut must be a number in [0,1]"),
        ("?class=red", "unknown option 'class'. Known: classes, top, masks, threshold, cut"),
    ],
)
def test_wrong_options_are_named(server: Server, query: str, words: str) -> None:
    status, answer = send(server, query)
    assert status == 400 == answer["status"] and words in answer["error"]


def test_wrong_bodies_are_named(server: Server) -> None:
    most = server.application.intake.max_bytes
    assert send(server, content=b"no picture")[0] == 422 and "not a readable image" in send(server, content=b"no picture")[1]["error"]
    assert send(server, content=encoded(np.zeros((101, 200, 3), np.uint8)))[0] == 422
    status, answer = send(server, content=b"x" * (most + 1))
    assert status == 413 and "more than the limit of 0.1 MB" in answer["error"]
    assert send(server, content=b"x" * (2 * most))[0] == 413
    for body, headers in (form(b"x", "photo"), form(b"x", more='--limit\r\nContent-Disposition: form-data; name="top"\r\n\r\n3\r\n')):
        status, answer, _ = ask(server, "/api/explain", body, headers)
        assert status == 400 and "curl -F image=@photo.jpg" in answer["error"] and "?top=3" in answer["error"]
    broken = ask(server, "/api/explain", b"--limit\r\nnonsense", form(b"")[1])
    assert broken[0] == 400 and broken[1]["status"] == 400
    assert ask(server, "/api/nothing")[1] == {"error": "There is no '/api/nothing' here.", "status": 404}


def test_the_description_is_true(server: Server) -> None:
    status, described, _ = ask(server, "/api/openapi.json")
    assert status == 200 and described["openapi"].startswith("3.1") and "0.1 MB and 0.02 million pixels" in described["info"]["description"]
    schemas, paths = described["components"]["schemas"], described["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            kind = operation["responses"]["200"]["content"]["application/json"]["schema"]
            for query in ("?masks=rle&top=2", "?masks=png&top=2", "?masks=none") if method == "post" else ("",):
                status, answer = send(server, query, path=path) if method == "post" else ask(server, path)[:2]
                assert status == 200
                conform(answer, kind, schemas)
    conform(send(server, "?top=0")[1], schemas["Error"], schemas)
    assert {p["name"] for p in paths["/api/explain"]["post"]["parameters"]} == set(Options.__dataclass_fields__)


def test_a_model_alone_is_answered_without_probabilities(net: Explainer) -> None:
    alone = Uploads(EagerRuntime(net))
    found = explained(alone, encoded(photograph()), Options(masks="none"))
    assert found["probabilities"] is None is found["predicted"] and found["masks"] == []
    largest = explained(alone, encoded(photograph()), Options(top=1))["masks"]
    assert [mask["class"] for mask in largest] == [max(found["areas"], key=lambda name: found["areas"][name])]


@pytest.mark.parametrize(("geometry", "seen"), [("letterbox", (slice(0, 40), slice(0, 48))), ("crop", (slice(0, 40), slice(4, 44)))])
def test_masks_and_areas_are_of_what_the_network_saw(net: Explainer, geometry: str, seen: tuple[slice, slice]) -> None:
    """48 x 40 pixels in a square of 32: letterbox shows them in the middle 27 rows, crop shows the middle 40 columns."""
    runtime = EagerRuntime(net)
    runtime.description["geometry"] = geometry
    uploads = Uploads(runtime)
    found = explained(uploads, encoded(photograph()), Options(classes=("red",)))
    upload = uploads.add(encoded(photograph()))
    rows = slice(2, 29) if geometry == "letterbox" else slice(0, 32)
    assert found["areas"]["red"] == pytest.approx(float(upload.masks[0, rows].mean()), abs=1e-6) == upload_facts(upload, 3)["areas"][0]
    outside = np.ones((40, 48), bool)
    outside[seen] = False
    mask = pixels(found["masks"][0])
    assert mask.shape == (40, 48) and not mask[outside].any() and mask[seen].max() > 200
    shown = map_facts(upload, uploads.map(upload, "explainer", 0))
    assert (shown["height"], shown["width"]) == (len(range(*rows.indices(32))), 32)
    assert shown["box"] == ([0, 0, 1, 1] if geometry == "letterbox" else pytest.approx([0, 4 / 48, 1, 40 / 48]))
    assert shown["area"] == found["areas"]["red"]


def test_options_of_an_address() -> None:
    assert parse_options([]) == Options()
    assert parse_options([("classes", '"a, b",c'), ("classes", "d")]).classes == ("a, b", "c", "d")
    assert parse_options([("top", "3"), ("masks", "rle"), ("cut", "0.25")]) == Options(top=3, masks="rle", cut=0.25)
    with pytest.raises(ConfigError, match="whole number"):
        parse_options([("top", "9" * 30)])


def test_one_answer_holds_so_many_pixels(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_MOST", 40 * 48 * 2)
    assert send(server, "?top=2")[0] == 200
    status, answer = send(server, "?top=3")
    assert status == 400 and "3 masks of 48 x 40 pixels" in answer["error"]
    assert send(server, "?top=3&masks=none")[0] == 200


def test_faults_of_the_server_are_answered_and_told_on_the_terminal(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.uploads, "explain", broken)
    assert send(server) == (500, {"error": "The server failed; its terminal shows why.", "status": 500})
    for _ in range(100):  # it is told after the answer
        if "ZeroDivisionError: secret" in caplog.text:
            break
        time.sleep(0.02)
    assert "ZeroDivisionError: secret" in caplog.text

    def damaged(*_: Any) -> Any:
        raise NumericalError("the model answers NaN")

    monkeypatch.setattr(server.uploads, "explain", damaged)
    assert send(server) == (500, {"error": "the model answers NaN", "status": 500})


def test_pages_of_other_sites_cannot_use_it(server: Server) -> None:
    body, headers = form(encoded(photograph()))
    for more in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": f"evil.example:{server.port}"}):
        assert ask(server, "/api/explain", body, {**headers, **more})[0] == 403
        assert ask(server, "/api/openapi.json", headers=more)[0] == 403


def test_a_connection_serves_several_requests(server: Server) -> None:
    body, headers = form(encoded(photograph()))
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    answers = []
    for _ in range(3):
        connection.request("POST", "/api/explain?masks=none", body, headers)
        answers.append(json.loads(connection.getresponse().read())["areas"])
    connection.close()
    assert answers[0] == answers[1] == answers[2]
