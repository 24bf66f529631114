"""``explainer serve`` over HTTP: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from explainer import baselines
from explainer.cli import main
from explainer.commands.parsing import command_parser
from explainer.commands.serve import COMMAND, make_server
from explainer.errors import CheckpointError, ConfigError, FingerprintMismatchError
from explainer.export.safetensors import save_pretrained
from explainer.figures import overlay
from explainer.inference.classifier import open_classifier
from explainer.inference.explaining import upsample
from explainer.inference.pictures import load_picture
from explainer.inference.refinement import quality, refine
from explainer.look import guard, intake
from explainer.look import uploads as uploads_module
from explainer.look.application import HEADER
from explainer.look.server import Server
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.look.conftest import encoded, photograph

Answer = tuple[int, Any, Message]


def ask(server: Server, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None) -> Answer:
    """(status, parsed or raw content, headers); a body is uploaded as the page does it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sent = {**({HEADER: "1"} if body is not None else {}), **(headers or {})}
    connection.request(method or ("GET" if body is None else "POST"), path, body, {k: v for k, v in sent.items() if v})
    answer = connection.getresponse()
    content: Any = answer.read()
    connection.close()
    if answer.headers.get_content_type() == "application/json" and content:
        content = json.loads(content)
    return answer.status, content, answer.headers


@pytest.fixture
def uploaded(server: Server) -> dict[str, Any]:
    status, facts, _ = ask(server, "/explain", encoded(photograph()))
    assert status == 200
    return facts


@pytest.fixture
def small(tmp_path: Path) -> torch.Tensor:
    """The photograph as the network sees it, ``[1,3,32,32]``."""
    (tmp_path / "photo.png").write_bytes(encoded(photograph()))
    return torch.from_numpy(load_picture("photo", tmp_path / "photo.png", (32, 32)).small)[None]


def test_an_upload_is_explained_by_the_network_and_the_classifier(
    server: Server, uploaded: dict[str, Any], net: Explainer, classifier: Explanandum, small: torch.Tensor
) -> None:
    with torch.no_grad():
        masks, scores = net(small)[0], classifier(small).sigmoid()[0]
    assert (uploaded["height"], uploaded["width"]) == (40, 48)
    assert uploaded["scores"] == pytest.approx(scores.tolist(), abs=1e-5)
    assert uploaded["areas"] == pytest.approx(masks.mean(dim=(1, 2)).tolist(), abs=1e-5)
    assert uploaded["chosen"] == [int(k) for k in scores.argsort(descending=True) if scores[k] >= 0.5]
    status, found, _ = ask(server, f"/map?id={uploaded['id']}&method=explainer&class=0")
    values = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(found["height"], found["width"])
    assert status == 200 and np.abs(values / 255 - masks[0].numpy()).max() <= 0.5 / 255 + 1e-6
    assert values.max() > 200, "the red rectangle has a mask"
    merged = ask(server, f"/map?id={uploaded['id']}&method=explainer&class=all")[1]
    values = np.frombuffer(base64.b64decode(merged["data"]), np.uint8).reshape(32, 32) / 255
    wanted = masks[uploaded["chosen"]].amax(dim=0).numpy() if uploaded["chosen"] else np.zeros((32, 32))
    assert np.abs(values - wanted).max() <= 0.5 / 255 + 1e-6


def test_other_methods_are_computed_once_and_judged(
    server: Server, uploaded: dict[str, Any], net: Explainer, classifier: Explanandum, small: torch.Tensor
) -> None:
    described = ask(server, "/model")[1]
    assert [m["label"] for m in described["methods"]] == ["Grad-CAM", "SRD", "Refined mask"] and described["judged"] is True
    assert described["classes"] == ["red", "green", "a/b blue"] and described["max_bytes"] == int(0.1 * 2**20)
    for method in ("grad_cam", "srd", "refined"):
        path = f"?id={uploaded['id']}&method={method}&class=1"
        status, found, _ = ask(server, "/map" + path)
        values = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(32, 32) / 255
        if method == "refined":
            wanted = refine(net, classifier, small, 1, iterations=24).masks[0]
        else:
            wanted = baselines.build(method, classifier)(small, 1)[0].clamp(min=0)
            wanted = wanted / wanted.max().clamp(min=1e-30)
            assert "divided by its maximum" in found["note"]
        assert status == 200 and np.abs(values - wanted.numpy()).max() <= 0.5 / 255 + 1e-5
        assert ask(server, "/map" + path)[1]["seconds"] == found["seconds"], "computed again"
        for cut in (0, 0.25):
            mask = torch.from_numpy(values if cut == 0 else (values >= cut).astype(float)).float()
            expected = quality(classifier, small, mask[None], torch.tensor([1]))
            judged = ask(server, f"/judge{path}&cut={cut}")[1]
            assert judged == pytest.approx({"kept": float(expected.kept), "left": float(expected.left)}, abs=5e-3)


@pytest.mark.parametrize(("chosen", "name", "cut"), [(2, "a_b_blue", 0.0), (0, "red", 0.0), (0, "red", 0.2), (0, "red", 0.8)])
def test_downloads_have_the_pictures_own_size(
    server: Server, uploaded: dict[str, Any], net: Explainer, small: torch.Tensor, chosen: int, name: str, cut: float
) -> None:
    with torch.no_grad():
        mask = upsample(net(small)[0, chosen : chosen + 1].numpy(), (40, 48))[0]
    mask = (mask >= cut).float() if cut else mask
    for kind in ("mask", "overlay"):
        status, content, headers = ask(server, f"/download?id={uploaded['id']}&kind={kind}&class={chosen}&cut={cut}")
        assert status == 200 and headers["Content-Disposition"] == f'attachment; filename="{kind}_{name}_explainer.png"'
        with Image.open(io.BytesIO(content)) as picture:
            array = np.asarray(picture)
        image = torch.from_numpy(photograph()).permute(2, 0, 1).float() / 255
        wanted = (mask * 255).round().numpy() if kind == "mask" else overlay(image, mask)
        assert array.shape == wanted.shape and np.abs(array.astype(int) - wanted.astype(int)).max() <= 1
    status, content, headers = ask(server, f"/picture?id={uploaded['id']}")
    assert headers["Content-Type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), photograph())


def test_what_is_no_picture_is_answered_in_words(server: Server) -> None:
    def refused(content: bytes) -> str:
        status, answer, _ = ask(server, "/explain", content)
        assert status == 422 and "/" not in answer["error"].replace("image/", "") and "upload:" not in answer["error"], answer
        return answer["error"]

    assert "not a readable image" in refused(b"%PDF-1.7 no image")
    assert "not a readable image" in refused(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    assert "empty" in refused(b"")
    assert "damaged or truncated" in refused(encoded(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))[:4000])
    assert "200 x 101 pixels" in refused(encoded(np.zeros((101, 200, 3), np.uint8)))
    assert ask(server, "/explain", encoded(np.zeros((100, 200, 3), np.uint8)))[0] == 200, "exactly the limit"


def test_a_file_that_is_too_large_is_refused_before_it_is_decoded(server: Server) -> None:
    status, answer, headers = ask(server, "/explain", b"x" * (server.application.intake.max_bytes + 1))
    assert status == 413 and "0.1 MB" in answer["error"] and headers["Connection"] == "close"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{HEADER}: 1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        assert b" 411 " in raw.recv(4096).splitlines()[0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:PORT"}, 200),
        ({"Host": "[::1]:PORT"}, 200),
        ({"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "evil.example:PORT"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "192.168.1.2:PORT"}, 403),
        ({"Host": "a:b:c"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({HEADER: ""}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(server: Server, headers: dict[str, str], status: int) -> None:
    sent = {k: v.replace("PORT", str(server.port)) for k, v in headers.items()}
    assert ask(server, "/explain", encoded(photograph()), sent)[0] == status
    if HEADER not in headers:
        assert ask(server, "/model", headers=sent)[0] == status


def test_a_link_from_elsewhere_may_open_the_page_alone(server: Server) -> None:
    assert ask(server, "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert ask(server, "/", headers={"Sec-Fetch-Site": "cross-site", "Host": "evil.example"})[0] == 403


def test_wrong_requests_are_answered_in_words(server: Server, uploaded: dict[str, Any]) -> None:
    key = uploaded["id"]
    for path, status, words in (
        ("/map?id=x&class=0", 404, "Upload it again"),
        (f"/map?id={key}&class=3", 400, "0..2"),
        (f"/map?id={key}&class=-1", 400, "0..2"),
        (f"/map?id={key}", 400, "0..2"),
        (f"/map?id={key}&class=0&method=rise", 400, "grad_cam"),
        (f"/map?id={key}&class=all&method=srd", 400, "one class"),
        (f"/judge?id={key}&class=all", 400, "one class"),
        (f"/download?id={key}&class=0&cut=nan", 400, "cut"),
        (f"/download?id={key}&class=0&kind=exe", 400, "mask or overlay"),
        ("/etc/passwd", 404, "no '/etc/passwd'"),
    ):
        answer = ask(server, path)
        assert answer[0] == status and words in answer[1]["error"], (path, answer)
    assert ask(server, "/elsewhere", b"x")[0] == 404
    assert ask(server, "/", method="PUT")[0] == 405 == ask(server, "/api/explain")[0]
    assert ask(server, "/", method="HEAD")[1] == b""


def test_only_the_last_uploads_are_kept(server: Server, uploaded: dict[str, Any]) -> None:
    for _ in range(7):
        ask(server, "/explain", encoded(photograph()))
    assert ask(server, f"/map?id={uploaded['id']}&class=0")[0] == 200
    for _ in range(8):
        ask(server, "/explain", encoded(photograph()))
    assert ask(server, f"/map?id={uploaded['id']}&class=0")[0] == 404


def test_large_uploads_push_older_ones_out(server: Server, uploaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_KEPT_BYTES", server.uploads.find(uploaded["id"]).size * 5 // 2)
    keys = [uploaded["id"], *(ask(server, "/explain", encoded(photograph()))[1]["id"] for _ in range(2))]
    assert [ask(server, f"/map?id={key}&class=0")[0] for key in keys] == [404, 200, 200]
    monkeypatch.setattr(uploads_module, "_KEPT_BYTES", 0)
    key = ask(server, "/explain", encoded(photograph()))[1]["id"]
    assert ask(server, f"/map?id={key}&class=0")[0] == 200, "the newest is always kept"


def test_nonsense_on_the_wire_stops_nothing(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    lines = [random.bytes(300), b"\r\n\r\n", b"GET", b"GET / HTTP/9.9\r\n\r\n", b"POST /explain HTTP/1.1\r\n\r\n"]
    lines += [
        f"POST /explain HTTP/1.1\r\n{host}{HEADER}: 1\r\nContent-Length: {n}\r\n\r\nabc".encode() for n in ("-1", "x", "9" * 5000, "7")
    ]
    lines += [f"GET /map?{'id=%00&' * 900}class={'9' * 400} HTTP/1.1\r\n{host}\r\n".encode()]
    for line in lines:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(line)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
    assert ask(server, "/explain", encoded(photograph()))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(checkpoint: Path) -> None:
    program = "import sys; from explainer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r"open http://127\.0\.0\.1:(\d+)/", process.stdout.readline()).group(1))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/api/model")
            assert json.loads(connection.getresponse().read())["name"] == "run"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


def test_the_page_is_self_contained_and_its_policy_allows_nothing_else(server: Server) -> None:
    _, content, headers = ask(server, "/")
    text = content.decode()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//|@import|url\(", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL).group(1)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
    assert (
        headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    )


def test_many_at_once_get_their_own_answers(server: Server) -> None:
    pictures = [encoded(photograph(seed=s)) for s in range(6)]
    alone = [ask(server, "/explain", p)[1]["areas"] for p in pictures]
    together: dict[int, Any] = {}

    def send(i: int) -> None:
        together[i] = ask(server, "/explain", pictures[i])[1]["areas"]

    threads = [threading.Thread(target=send, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together[i] for i in range(6)] == alone


@pytest.fixture
def occupied(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The computing thread works until the event is set, and as many requests as may wait do so."""
    gate, began = threading.Event(), threading.Event()

    def preview(upload: Any) -> tuple[bytes, str]:
        began.set()
        assert gate.wait(30)
        return b"picture", "image/png"

    monkeypatch.setattr(intake, "_WAITING", 3)
    monkeypatch.setattr(server.uploads, "find", lambda key: key)
    monkeypatch.setattr(server.uploads, "preview", preview)
    threads = [threading.Thread(target=ask, args=(server, "/picture?id=x")) for _ in range(3)]
    for t in threads:
        t.start()
    assert began.wait(10)
    for _ in range(1000):
        if server.application.intake.waiting == 3:
            break
        time.sleep(0.01)
    yield gate
    gate.set()
    for t in threads:
        t.join()


def test_too_many_at_once_are_told_to_wait(server: Server, occupied: threading.Event) -> None:
    status, answer, headers = ask(server, "/map?id=x")
    assert status == 503 and "busy" in answer["error"] and headers["Retry-After"] == "1"
    assert ask(server, "/")[0] == 200 == ask(server, "/model")[0], "what needs no network is answered"
    occupied.set()


def started(arguments: list[str]) -> Server:
    return make_server(command_parser(COMMAND, "explainer serve").parse_args([*arguments, "--port", "0"]))


def test_it_serves_each_kind_of_model(net: Explainer, onnx_fused: Any, tmp_path: Path) -> None:
    folder = save_pretrained(net, tmp_path / "folder")
    areas = []
    for path in (folder, folder / "model.safetensors", onnx_fused[0]):
        made = started([str(path)])
        try:
            upload = made.uploads.add(encoded(photograph()))
            areas.append(upload.masks.mean(axis=(1, 2)))
            assert (upload.scores is None) == (path != onnx_fused[0]) and made.uploads.describe()["methods"] == []
        finally:
            made.close()
    assert np.ptp(np.stack(areas), axis=0).max() < 1e-4


def test_an_onnx_classifier_gives_scores_and_methods_without_gradients(
    checkpoint: Path, classifier: Explanandum, tmp_path: Path, small: torch.Tensor
) -> None:
    file = tmp_path / "classifier.onnx"
    torch.onnx.export(
        torch.nn.Sequential(classifier.classifier).eval(),
        (torch.zeros(2, 3, 32, 32),),
        file,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    options = "{options: {normalize: true}, input_size: 32}"
    made = started([str(checkpoint), "--classifier", str(file), "--classifier_options", options])
    try:
        upload = made.uploads.add(encoded(photograph()))
        with torch.no_grad():
            assert upload.scores == pytest.approx(classifier(small).sigmoid()[0].numpy(), abs=1e-4)
        assert list(made.uploads.methods) == ["occlusion"] and "cannot be checked" in made.application.notice
        with pytest.raises(ConfigError, match="gradients"):
            started([str(checkpoint), "--classifier", str(file), "--classifier_options", options, "--compare", "refined"])
    finally:
        made.close()


def test_wrong_starts_end_in_words(checkpoint: Path, classifier_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="--classifier"):
        started([str(checkpoint), "--compare", "srd"])
    with pytest.raises(ConfigError, match=r"gradcam.*Did you mean 'grad_cam'"):
        started([str(checkpoint), "--classifier", str(classifier_checkpoint), "--compare", "gradcam"])
    with pytest.raises(ConfigError, match="ground truth"):
        started([str(checkpoint), "--classifier", str(classifier_checkpoint), "--compare", "ground_truth"])
    content = torch.load(classifier_checkpoint, weights_only=True)
    first = next(iter(content["state_dict"]))
    content["state_dict"][first] = content["state_dict"][first] + 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(FingerprintMismatchError):
        started([str(checkpoint), "--classifier", str(tmp_path / "other.ckpt")])
    with pytest.raises(CheckpointError, match="does not exist"):
        started([str(tmp_path / "absent.ckpt")])
    for options, words in (("[1]", "mapping"), ("{archh: x}", "'archh'"), ("{", "YAML")):
        with pytest.raises(ConfigError, match=words):
            open_classifier("x.ckpt", options)
    with pytest.raises(ConfigError, match="name its file"):
        open_classifier(None, "{arch: x}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(checkpoint), "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another --port" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "--port", "99999"]) == 2 and main(["serve", str(checkpoint), "--max_megabytes", "-1"]) == 2


def test_on_other_addresses_any_numeric_name_is_known(checkpoint: Path) -> None:
    made = make_server(
        command_parser(COMMAND, "explainer serve").parse_args(
            [str(checkpoint), "--host", "0.0.0.0", "--port", "0", "--allow_host", "Lab-PC"]
        )
    )
    try:
        assert not made.loopback and made.url == f"http://127.0.0.1:{made.port}/"
        for name, known in (("192.168.1.2", True), ("localhost", True), ("lab-pc", True), ("evil.example", False)):
            assert made.knows(f"{name}:{made.port}") is known
    finally:
        made.close()


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("uvicorn", "starlette", "python_multipart"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            assert main(["serve", "any.ckpt"]) == 2
        assert "pip install 'explainer-net[serve]'" in (said := capsys.readouterr().err) and module in said


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from explainer.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False") and "--max_megabytes" in done.stdout


def test_masks_are_judged_with_the_fill_of_the_training(
    checkpoint: Path, classifier_checkpoint: Path, classifier: Explanandum, small: torch.Tensor
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["fill"] = "white"
    torch.save(content, checkpoint)
    made = started([str(checkpoint), "--classifier", str(classifier_checkpoint), "--compare", "refined"])
    try:
        upload = made.uploads.add(encoded(photograph()))
        own = made.uploads.map(upload, "explainer", 0)
        judged = made.uploads.judge(upload, own, 0)
        expected = quality(classifier, small, torch.from_numpy(own.values)[None], torch.tensor([0]), fill="white")
        assert judged == pytest.approx({"kept": float(expected.kept), "left": float(expected.left)}, abs=1e-6)
        assert float(quality(classifier, small, torch.from_numpy(own.values)[None], torch.tensor([0])).kept) != pytest.approx(
            judged["kept"]
        )
        refined = refine(None, classifier, small, 0, start=torch.from_numpy(own.values)[None], fill="white").masks[0]
        assert np.abs(made.uploads.map(upload, "refined", 0).values - refined.numpy()).max() < 1e-5
    finally:
        made.close()


def test_limits_that_could_not_be_kept_are_refused(checkpoint: Path) -> None:
    for option, value, words in (("--max_megapixels", "65", "at most 64"), ("--max_megabytes", "257", "at most 256")):
        with pytest.raises(ConfigError, match=f"{option} can be {words}"):
            started([str(checkpoint), option, value])
    started([str(checkpoint), "--max_megapixels", "64", "--max_megabytes", "256"]).close()


def test_maps_of_other_methods_count_too(server: Server, uploaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = server.uploads.find(uploaded["id"])
    before, key = first.size, ask(server, "/explain", encoded(photograph()))[1]["id"]
    monkeypatch.setattr(uploads_module, "_KEPT_BYTES", 2 * before + 32 * 32 * 4)
    for chosen in (0, 1):
        assert ask(server, f"/map?id={key}&method=grad_cam&class={chosen}")[0] == 200
        assert server.uploads.find(key).size == before + (chosen + 1) * 32 * 32 * 4
        assert (uploaded["id"] in server.uploads._kept) is (chosen == 0), "one map fits, two do not"


def test_no_body_is_kept_while_no_place_is_free(server: Server, occupied: threading.Event) -> None:
    status, answer, headers = ask(server, "/explain", encoded(photograph()))
    assert status == 503 and "busy" in answer["error"] and headers["Connection"] == "close"
    assert server.application.intake.held == 0


def test_bodies_are_bounded_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(photograph())
    monkeypatch.setattr(intake, "_HELD", len(picture) + 10)
    head = f"POST /api/explain HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 100\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(head + b"x" * 50)
        for _ in range(1000):
            if server.application.intake.held == 50:
                break
            time.sleep(0.01)
        status, answer, _ = ask(server, "/explain", picture)
        assert status == 503 and "uploads at once" in answer["error"]
    for _ in range(1000):
        if server.application.intake.held == 0:
            break
        time.sleep(0.01)
    assert ask(server, "/explain", picture)[0] == 200


def test_a_body_that_trickles_in_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{HEADER}: 1\r\nContent-Length: 90000\r\n\r\n".encode())
        with pytest.raises(OSError):
            for _ in range(200):
                raw.sendall(b"x")
                time.sleep(0.05)
            raise AssertionError("it was still waited for")
    assert server.application.intake.held == server.application.intake.waiting == 0
