"""Folders that run an exported model elsewhere: a web page, a Space, a Triton repository, a LitServe server."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from explainer.errors import ConfigError, ExportError
from explainer.export.exporting import build_format, export
from explainer.export.triton import configuration
from explainer.export.web import RUNTIME
from explainer.inference.formats import ExportModel, ExportOptions
from explainer.inference.predictor import Predictor
from explainer.inference.runtime import formats_by_suffix, open_model
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.export.alone import alone
from tests.unit.export.conftest import NAMES, colored

#: An interpreter with the packages of a Space or a server, where this one does not have them.
PYTHON = os.environ.get("DEPLOY_PYTHON", sys.executable)
#: The request of the guide's page.
GUIDE = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/howto/deploy.md").read_text(), re.S)[0]
#: Folder dist of the npm package onnxruntime-web.
WEB_RUNTIME = os.environ.get("ORT_WEB")


def needs(module: str) -> None:
    """Skip without a package that these folders bring along by their requirements.txt and this project does not need."""
    if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{module} is not installed: pip install {module} into an environment and name its python in DEPLOY_PYTHON")


@pytest.fixture(scope="module")
def web_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty files by the names of the runtime's."""
    folder = tmp_path_factory.mktemp("dist")
    for name in RUNTIME:
        (folder / name).write_text("")
    return folder


def surrounded(name: str, source: Path, folder: Path, **options: Any) -> Path:
    """The folder of a format around a file that is already exported."""
    form, description = build_format(name), Predictor(source).description
    path = folder / form.file_name(source.stem)
    path.parent.mkdir(parents=True)
    path.write_bytes(source.read_bytes())
    form.surround(ExportModel(torch.nn.Identity(), description=description), path, folder, ExportOptions((32, 32), **options))
    return path


@pytest.mark.slow
def test_the_export_of_a_folder_has_model_card_and_report_in_it(
    net: Explainer, classifier: Explanandum, images: np.ndarray, tmp_path: Path
) -> None:
    path, report = export(net, "space", tmp_path, explanandum=classifier, license="mit", examples=images[:2])
    home = tmp_path / "space"
    assert path == home / "fused.onnx" and report.format == "space" and not report.violations
    assert list(tmp_path.iterdir()) == [home], "nothing lies beside the folder"
    assert json.loads((home / "drift.json").read_text())["fused.onnx"]["file"] == "fused.onnx"
    _, front, card = (home / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front)
    pinned = dict(line.split("==") for line in (home / "requirements.txt").read_text().splitlines() if "==" in line)
    assert settings["sdk"] == "gradio" and settings["app_file"] == "app.py" and settings["license"] == "mit"
    assert settings["sdk_version"] == pinned["gradio"], "a Space and requirements.txt install the same gradio"
    assert "This folder is a Hugging Face Space" in card and "| fused.onnx | fp32 |" in card
    assert [p.name for p in sorted((home / "examples").iterdir())] == ["example_1.png", "example_2.png"]
    assert np.array_equal(np.asarray(Image.open(home / "examples" / "example_2.png")), (images[1] * 255).round().transpose(1, 2, 0))
    # The part of this package that goes along is all that it needs.
    code = (
        "from explainer.inference.predictor import Predictor; import explainer; p = Predictor('fused.onnx');"
        "print(explainer.__file__, p('examples/example_1.png')['masks'].shape)"
    )
    done = alone(("explainer", "onnxruntime", "numpy", "PIL"), code, cwd=home)
    assert done.stdout.split(" ", 1)[1].strip() == "(3, 32, 32)" and str(home) in done.stdout, done.stderr[-2000:]


def test_a_file_of_a_folder_is_not_mistaken_for_its_format(onnx_fused: tuple[Path, Any], tmp_path: Path) -> None:
    assert formats_by_suffix()[".onnx"].name == "onnx"
    path = surrounded("triton", onnx_fused[0], tmp_path / "triton")
    assert open_model(path).classes == list(NAMES)


def test_a_page_needs_the_classifier(net: Explainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the classifier: --classifier CHECKPOINT"):
        export(net, "web", tmp_path)
    assert not (tmp_path / "web").exists() or not list((tmp_path / "web").iterdir())


def test_a_folder_that_is_no_runtime_is_refused(net: Explainer, classifier: Explanandum, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks ort\.wasm\.min\.mjs, .*npm install onnxruntime-web"):
        export(net, "web", tmp_path, explanandum=classifier, runtime=tmp_path)


def test_the_page_is_told_what_the_file_does(onnx_fused: tuple[Path, Any], web_runtime: Path, images: np.ndarray, tmp_path: Path) -> None:
    surrounded("web", onnx_fused[0], tmp_path / "web", runtime=web_runtime, examples=images[:1])
    home = tmp_path / "web"
    known = json.loads((home / "model.json").read_text())
    assert known["classes"] == list(NAMES) and (known["height"], known["width"]) == (32, 32) and known["file"] == "fused.onnx"
    assert known["threshold"] == 0.5 and known["geometry"] == "squash" and known["examples"] == ["example_1.png"]
    assert sorted(p.name for p in (home / "runtime").iterdir()) == sorted(RUNTIME)
    for page in home.glob("*.*s"):
        assert not re.search(r"https?://", page.read_text()), "the page asks another site"
    assert "default-src 'none'" in (home / "index.html").read_text()


def fields(text: str, kind: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> (type, dimensions) of Triton's configuration."""
    found = re.findall(rf'^{kind} {{\n  name: "(\w+)"\n  data_type: (\w+)\n  dims: \[ (.*) \]', text, re.M)
    return {name: (dtype, [int(d) for d in dims.split(", ") if d]) for name, dtype, dims in found}


def test_the_configuration_for_triton_says_what_the_session_says(onnx_fused: tuple[Path, Any], tmp_path: Path) -> None:
    path = surrounded("triton", onnx_fused[0], tmp_path / "triton")
    assert path == tmp_path / "triton" / "explainer" / "1" / "model.onnx"
    text = (path.parents[1] / "config.pbtxt").read_text()
    session = onnxruntime.InferenceSession(str(path))
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        expected = {v.name: (types[v.type], [d if isinstance(d, int) else -1 for d in v.shape[1:]]) for v in values}
        assert fields(text, kind) == expected
    assert fields(text, "output")["masks"] == ("TYPE_FP32", [3, 32, 32]) and fields(text, "output")["areas"][1] == [3]
    assert (path.parents[1] / "labels.txt").read_text().splitlines() == list(NAMES)
    assert "max_batch_size: 32" in text and "dynamic_batching {" in text and 'platform: "onnxruntime_onnx"' in text


@pytest.mark.slow
def test_the_configuration_for_triton_keeps_the_official_schema(
    onnx_fused: tuple[Path, Any], onnx_any: tuple[Path, Any], tmp_path: Path
) -> None:
    needs("tritonclient.grpc")
    for number, (source, sides) in enumerate(((onnx_fused[0], [3, 32, 32]), (onnx_any[0], [3, -1, -1]))):
        path = surrounded("triton", source, tmp_path / str(number))
        code = (
            "import sys; from google.protobuf import text_format; from tritonclient.grpc import model_config_pb2 as m;"
            "c = text_format.Parse(open(sys.argv[1]).read(), m.ModelConfig());"
            "print(c.name, c.platform, c.max_batch_size, list(c.input[0].dims), c.dynamic_batching.max_queue_delay_microseconds)"
        )
        done = subprocess.run([PYTHON, "-c", code, path.parents[1] / "config.pbtxt"], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == f"explainer onnxruntime_onnx 32 {sides} 2000", done.stderr[-2000:]


def test_a_type_that_triton_was_not_told_of_is_refused() -> None:
    half = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT16, ["batch", 3, 8, 8])
    with pytest.raises(ExportError, match="input image has the ONNX element type 10"):
        configuration(onnx.helper.make_graph([], "g", [half], []))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answered(url: str, process: subprocess.Popen[bytes], data: bytes | None = None, seconds: float = 90) -> Any:
    """What a server answers once it is up."""
    until = time.monotonic() + seconds
    while True:
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code not in (502, 503):
                raise
        except OSError:
            pass
        assert process.poll() is None and time.monotonic() < until, "the server did not start"
        time.sleep(0.3)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that is not the network's size."""
    pixels = (colored(1, 60, 3)[0][0, :, :50] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def stopped(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes it has started, which it leaves behind where it is only asked to end."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_the_litserve_folder_serves(onnx_fused: tuple[Path, Any], picture: Path, tmp_path: Path) -> None:
    needs("litserve")
    surrounded("litserve", onnx_fused[0], tmp_path / "served")
    port = free_port()
    command = [PYTHON, "server.py", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=tmp_path / "served", start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        answered(f"http://127.0.0.1:{port}/info", process)
        names: dict[str, Any] = {}
        code = GUIDE.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("photo.jpg", str(picture))
        exec(compile(code, "deploy.md", "exec"), names)
        answer = names["answer"]
        for bad in (b"{}", b'{"image": "bm90IGEgcGljdHVyZQ=="}'):
            with pytest.raises(urllib.error.HTTPError) as refused:
                answered(f"http://127.0.0.1:{port}/predict", process, bad)
            assert refused.value.code == 422
    finally:
        stopped(process)
    expected = Predictor(onnx_fused[0])(picture)
    best = np.argsort(-expected["probabilities"])[:2]
    assert [m["class"] for m in answer["masks"]] == [NAMES[k] for k in best]
    assert np.allclose([answer["probabilities"][n] for n in NAMES], expected["probabilities"], atol=1e-5)
    for entry, k in zip(answer["masks"], best, strict=True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"])))) / 255
        assert mask.shape == (50, 60) and np.abs(mask - expected["masks"][k]).max() < 0.01


_SPACE = """
import json, sys
sys.path.insert(0, ".")
import numpy as np
import app
from gradio_client import Client, handle_file
_, url, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
client = Client(url, verbose=False)
label, masks = client.predict(handle_file(sys.argv[1]), api_name="/explain")
direct, (shown, own) = app.explain(sys.argv[1])
print(json.dumps({"label": label, "names": [a["label"] for a in masks["annotations"]], "direct": direct, "size": shown.size,
                  "means": [float(m.mean()) for m, _ in own], "shapes": [m.shape for m, _ in own]}))
app.demo.close()
"""


@pytest.mark.slow
def test_the_space_runs_as_it_is(onnx_fused: tuple[Path, Any], picture: Path, images: np.ndarray, tmp_path: Path) -> None:
    needs("gradio")
    surrounded("space", onnx_fused[0], tmp_path / "space", examples=images[:2])
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, "-c", _SPACE, picture], cwd=tmp_path / "space", env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # beside gradio's own words
    expected = Predictor(onnx_fused[0])(picture)
    order = np.argsort(-expected["probabilities"])
    assert answer["names"] == [NAMES[k] for k in order] and answer["size"] == [60, 50]
    assert answer["label"]["label"] == NAMES[order[0]]
    assert np.allclose([answer["direct"][n] for n in NAMES], expected["probabilities"], atol=1e-5)
    assert np.allclose(answer["means"], expected["masks"][order].mean(axis=(1, 2)), atol=1e-5)
    assert answer["shapes"] == [[50, 60]] * 3


@pytest.fixture
def served() -> Iterator[Any]:
    """Serves a folder on this machine."""
    servers: list[http.server.ThreadingHTTPServer] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map: ClassVar[dict[str, str]] = {
            **http.server.SimpleHTTPRequestHandler.extensions_map,
            ".mjs": "text/javascript",
            ".wasm": "application/wasm",
        }

        def log_message(self, *_: Any) -> None:
            pass

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["fused", "top"])
def test_the_page_computes_what_python_computes(
    kind: str,
    net: Explainer,
    classifier: Explanandum,
    onnx_fused: tuple[Path, Any],
    picture: Path,
    images: np.ndarray,
    served: Any,
    tmp_path: Path,
) -> None:
    from tests.browser import browser, screenshots

    if WEB_RUNTIME is None:
        pytest.skip("npm install onnxruntime-web and name its folder dist in ORT_WEB")
    source = onnx_fused[0] if kind == "fused" else export(net, "onnx", tmp_path / "top", fused=True, top=2, explanandum=classifier)[0]
    surrounded("web", source, tmp_path / "web", runtime=Path(WEB_RUNTIME), examples=images[:3])
    address = served(tmp_path / "web")
    expected = Predictor(source)(picture)
    order = np.argsort(-expected["probabilities"])[: 2 if kind == "top" else 3]
    rows = {int(k): i for i, k in enumerate(expected.get("classes", range(3)))}
    with browser(tmp_path / "profile") as page:
        page.size(1100, 800)
        page.open(address)
        page.wait("document.body.dataset.state === 'ready'")
        page.choose_file("#file", picture)
        page.wait("document.body.dataset.state === 'done'")
        rows_of = "[...document.querySelectorAll('#classes button')]"
        shown = page.run(f"{rows_of}.map(b => [Number(b.dataset.class), Number(b.dataset.probability)])")
        assert [k for k, _ in shown] == order.tolist()
        assert np.allclose([p for _, p in shown], expected["probabilities"][order], atol=2e-3)
        for k in order:
            page.click(f"#classes [data-class='{k}']")
            data = page.run("document.getElementById('save').href")
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("L")) / 255
            assert mask.shape == (50, 60) and np.abs(mask - expected["masks"][rows[int(k)]]).max() < 0.02
        page.click("#examples button")
        page.wait("document.getElementById('view').width === 32 && document.body.dataset.state === 'done'")
        page.screenshot(screenshots(tmp_path) / f"web_{kind}.png")
        assert page.errors == []
        assert all(request.startswith((address, "data:", "blob:")) for request in page.requests), "the page asked another site"


@pytest.mark.browser
def test_the_page_says_that_its_runtime_is_missing(onnx_fused: tuple[Path, Any], served: Any, tmp_path: Path) -> None:
    from tests.browser import browser

    surrounded("web", onnx_fused[0], tmp_path / "web")
    with browser(tmp_path / "profile") as page:
        page.open(served(tmp_path / "web"))
        page.wait("document.body.dataset.state === 'error'")
        assert "runtime/ort.wasm.min.mjs is missing: copy" in page.run("document.getElementById('status').textContent")
