"""Every format computes what the network computes, for any batch, and opens in a process that has its runtime alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import explainer
from explainer import plugins, vocabulary
from explainer.errors import CheckpointError, ConfigError, ExportError, FingerprintMismatchError, ShapeError, UnknownNameError
from explainer.export.exporting import build_format, export
from explainer.export.fused import FusedExplainer
from explainer.export.onnx import half_weights, quantize
from explainer.export.parity import probe
from explainer.export.safetensors import from_pretrained, push_to_hub, save_pretrained
from explainer.inference import formats as base
from explainer.inference.formats import ExportModel, ExportOptions
from explainer.inference.runtime import open_model
from explainer.models.classifiers import SmallVGG
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.export.alone import alone
from tests.unit.export.conftest import NAMES, colored

# torch and what its own distribution requires.
TORCH = (
    "torch",
    "torchgen",
    "numpy",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "filelock",
    "fsspec",
    "setuptools",
)
ODD = [(1, 32, 32), (3, 37, 53), (5, 64, 40), (8, 21, 90)]


def eager(net: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(images)).numpy()


def test_the_test_network_segments(net: Explainer) -> None:
    images, masks = colored(9, 32, 1)
    found = eager(net, images.numpy()) > 0.5
    assert (found & (masks.numpy() > 0.5)).sum() / (found | (masks.numpy() > 0.5)).sum() > 0.8


def test_onnx_takes_any_batch_and_size(net: Explainer, onnx_any: tuple[Path, Any]) -> None:
    path, report = onnx_any
    runtime = open_model(path, threads=1)
    assert runtime.classes == list(NAMES) and runtime.size is None
    for shape in [*ODD, *((b, 32, 32) for b in range(2, 9))]:
        images = probe(shape, None)
        masks = runtime.run(images)["masks"]
        assert masks.shape == (shape[0], 3, *shape[1:]) and np.abs(masks - eager(net, images)).max() < 1e-4
    assert report.max_difference < 1e-4 and report.iou == 1.0 and not report.violations and report.real_images
    assert abs(report.faithfulness["change"]) < 1e-5 and 0 < report.faithfulness["eager"] < 1
    assert report.file_bytes == path.stat().st_size and report.latency_ms > 0
    assert len({s[0] for s in report.shapes}) >= 2 and len({tuple(s[1:]) for s in report.shapes}) >= 2
    model = onnx.load(path)
    assert [o.version for o in model.opset_import if o.domain == ""] == [20]
    assert json.loads({p.key: p.value for p in model.metadata_props}["classes"]) == list(NAMES)
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_onnx_opens_with_onnxruntime_alone(onnx_fused: tuple[Path, Any], tmp_path: Path) -> None:
    code = (
        "import numpy as np, onnxruntime as ort; s = ort.InferenceSession(sys.argv[1]);"
        "print({o.name: s.run([o.name], {'image': np.zeros((2, 3, 32, 32), 'float32')})[0].shape for o in s.get_outputs()}['merged'])"
    )
    done = alone(("onnxruntime", "numpy"), code, onnx_fused[0], cwd=tmp_path)
    assert done.stdout.strip() == "(2, 32, 32)", done.stderr[-2000:]


def test_drift_and_card_lie_beside_the_file(net: Explainer, onnx_any: tuple[Path, Any], classifier: Explanandum) -> None:
    path, report = onnx_any
    assert json.loads((path.parent / "drift.json").read_text())["model.onnx"] == json.loads(json.dumps(report.as_dict()))
    card = (path.parent / "README.md").read_text()
    for text in (
        classifier.fingerprint(),
        "red, green, a/b blue",
        "CC-BY-4.0",
        "## Limits",
        "| model.onnx | fp32 |",
        '"name": "shapes"',
        "unet with resnet18",
    ):
        assert text in card
    assert "/home/someone" not in card and "/home/someone" not in json.dumps(onnx_description(path))
    assert not list(path.parent.glob(".partial*"))


def onnx_description(path: Path) -> dict[str, Any]:
    return json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["explainer"])


def test_fused_onnx_gives_probabilities_masks_merged_and_areas(
    net: Explainer, classifier: Explanandum, onnx_fused: tuple[Path, Any], images: np.ndarray
) -> None:
    path, report = onnx_fused
    assert path.name == "fused.onnx" and not report.violations
    result = open_model(path).run(images)
    with torch.no_grad():
        probabilities = classifier(torch.from_numpy(images)).sigmoid().numpy()
    masks = eager(net, images)
    assert np.abs(result["probabilities"] - probabilities).max() < 1e-5 and np.abs(result["masks"] - masks).max() < 1e-4
    assert np.allclose(result["areas"], masks.mean(axis=(2, 3)), atol=1e-5)
    for p, m, merged in zip(probabilities, masks, result["merged"], strict=True):
        expected = m[p >= 0.5].max(axis=0) if (p >= 0.5).any() else np.zeros_like(m[0])
        assert np.abs(expected - merged).max() < 1e-4


def test_fused_merges_only_predicted_classes(net: Explainer, images: np.ndarray) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), 3)

    plain = Explainer.from_config(net.config)
    plain.load_state_dict(net.state_dict())
    x = torch.from_numpy(images[:2])
    for logits, task, kept in (
        ([3.0, -3.0, 2.0], "multilabel", [0, 2]),
        ([-3.0, -3.0, -2.0], "multilabel", []),
        ([-3.0, -1.0, -2.0], "multiclass", [1]),
    ):
        fused = FusedExplainer(plain, Explanandum(Fixed(logits), 3, task))  # type: ignore[arg-type]
        with torch.no_grad():
            probabilities, masks, merged, _ = fused(x)
        expected = masks[:, kept].amax(dim=1) if kept else torch.zeros_like(merged)
        assert torch.equal(merged, expected)
        assert torch.allclose(probabilities[0], torch.tensor(logits).sigmoid() if task == "multilabel" else torch.tensor(logits).softmax(0))


def test_a_fused_model_refuses_another_classifier(net: Explainer) -> None:
    torch.manual_seed(5)
    other = Explanandum(SmallVGG(3, (8, 8)), 3)
    with pytest.raises(FingerprintMismatchError, match="Load the classifier it was trained with"):
        FusedExplainer(net, other)
    with pytest.raises(ConfigError, match="has 3 classes, the classifier 4"):
        FusedExplainer(net, Explanandum(SmallVGG(4, (8, 8)), 4))


def test_a_fixed_size_is_said(onnx_fused: tuple[Path, Any]) -> None:
    runtime = open_model(onnx_fused[0])
    with pytest.raises(ShapeError, match=r"exported for images of 32 x 32, received 40 x 32.*--dynamic_size"):
        runtime.run(np.zeros((1, 3, 40, 32), np.float32))
    with pytest.raises(ShapeError, match=r"float32 \[B,3,H,W\]"):
        runtime.run(np.zeros((1, 3, 32, 32)))
    for batch in range(1, 9):
        assert runtime.run(np.zeros((batch, 3, 32, 32), np.float32))["masks"].shape == (batch, 3, 32, 32)


def test_half_weights_halve_the_file_and_hardly_move_a_mask(
    net: Explainer, onnx_any: tuple[Path, Any], images: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(onnx_any[0])
    half_weights(model)
    onnx.checker.check_model(model)
    path = tmp_path / "half.onnx"
    onnx.save_model(model, path)
    assert path.stat().st_size < 0.6 * onnx_any[0].stat().st_size
    difference = np.abs(open_model(path).run(images)["masks"] - eager(net, images))
    assert 0 < difference.max() < 0.05 and difference.mean() < 1e-3


def test_static_int8_keeps_the_masks(net: Explainer, onnx_any: tuple[Path, Any], images: np.ndarray, tmp_path: Path) -> None:
    source = onnx.load(onnx_any[0])
    model = quantize(source, images)
    onnx.helper.set_model_props(model, {p.key: p.value for p in source.metadata_props})
    path = tmp_path / "int8.onnx"
    onnx.save_model(model, path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") > 10 and path.stat().st_size < 0.5 * onnx_any[0].stat().st_size
    weights = {t.name: t.data_type for t in model.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in weights.values()) > 10
    a, b = open_model(path).run(images)["masks"] >= 0.5, eager(net, images) >= 0.5
    assert (a & b).sum() / (a | b).sum() >= 0.95


@pytest.mark.slow
def test_torch_export_takes_any_batch_and_size(net: Explainer, tmp_path: Path) -> None:
    path, report = export(net, "torch_export", tmp_path, dynamic_size=True)
    runtime = open_model(path)
    for shape in [*ODD, *((b, 32, 32) for b in range(2, 9))]:
        images = probe(shape, None)
        assert np.abs(runtime.run(images)["masks"] - eager(net, images)).max() < 1e-5
    assert report.max_difference < 1e-5
    code = "import torch; m = torch.export.load(sys.argv[1]).module(check_guards=False);print(tuple(m(torch.rand(4, 3, 33, 50)).shape))"
    done = alone(TORCH, code, path, cwd=tmp_path)
    assert done.stdout.strip() == "(4, 3, 33, 50)", done.stderr[-2000:]


@pytest.mark.slow
def test_openvino_takes_any_batch_and_size(net: Explainer, tmp_path: Path) -> None:
    path, report = export(net, "openvino", tmp_path, dynamic_size=True)
    runtime = open_model(path, threads=1)
    for shape in ODD:
        images = probe(shape, None)
        assert np.abs(runtime.run(images)["masks"] - eager(net, images)).max() < 1e-4
    assert report.file_bytes > path.with_suffix(".bin").stat().st_size > path.stat().st_size
    code = (
        "import json, numpy as np, openvino as ov; m = ov.Core().read_model(sys.argv[1]);"
        "c = ov.Core().compile_model(m, 'CPU'); print(c(np.zeros((2,3,32,32),'float32'))['masks'].shape,"
        "json.loads(m.get_rt_info(['explainer']).astype(str))['classes'][0])"
    )
    done = alone(("openvino", "numpy"), code, path, cwd=tmp_path)
    assert done.stdout.strip() == "(2, 3, 32, 32) red", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["onnx", "openvino"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precisions_stay_within_their_limits(
    net: Explainer, classifier: Explanandum, images: np.ndarray, tmp_path: Path, format_name: str, precision: str
) -> None:
    path, report = export(net, format_name, tmp_path, precision=precision, fused=True, explanandum=classifier, calibration=images)
    assert path.stem == f"fused-{precision}" and not report.violations
    assert open_model(path).run(images)["masks"].shape == (12, 3, 32, 32)


def test_the_baked_in_threshold_is_stored(net: Explainer, classifier: Explanandum, images: np.ndarray, tmp_path: Path) -> None:
    path, report = export(net, "torch_export", tmp_path, fused=True, explanandum=classifier, threshold=0.3)
    runtime = open_model(path)
    assert runtime.description["threshold"] == report.threshold == 0.3 and report.changed_predictions == 0
    result = runtime.run(images)
    for p, m, merged in zip(result["probabilities"], result["masks"], result["merged"], strict=True):
        assert np.abs((m[p >= 0.3].max(axis=0) if (p >= 0.3).any() else np.zeros_like(m[0])) - merged).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("network", ["deeplabv3", "deeplabv3plus", "fpn", "torchvision_deeplabv3"])
def test_other_networks_and_downscaling_export(network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {} if network.startswith("torchvision") else {"encoder_name": "resnet18"}
    net = Explainer(network, 2, options, downscale=2, image_size=64).eval()
    for format_name in ("onnx", "torch_export"):
        _, report = export(net, format_name, tmp_path, dynamic_size=True)
        assert report.max_difference < 1e-4


def test_safetensors_round_trip_through_load(net: Explainer, images: np.ndarray, tmp_path: Path) -> None:
    path, report = export(net, "safetensors", tmp_path / "out")
    assert path.name == "model.safetensors" and report.max_difference == 0
    for given in (tmp_path / "out", path):
        again = explainer.load(given)
        assert not again.training and again.class_names == NAMES and again.metadata == net.metadata
        assert np.array_equal(eager(again, images), eager(net, images))


def test_pretrained_folder_behaves_as_the_hub(net: Explainer, images: np.ndarray, tmp_path: Path) -> None:
    folder = save_pretrained(net, tmp_path / "local")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert np.array_equal(eager(from_pretrained(folder), images), eager(net, images))
    uploaded: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            uploaded.update(private=private, exist_ok=exist_ok)
            return f"hub:{name}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            uploaded[repo_id] = sorted(p.name for p in Path(folder_path).iterdir())

    assert push_to_hub(net, "me/x", api=Api()) == "hub:me/x"
    assert uploaded == {"private": True, "exist_ok": True, "me/x": ["README.md", "config.json", "model.safetensors"]}
    with pytest.raises(CheckpointError, match="neither a file, a folder nor a Hub repository"):
        from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' could not be obtained .* copy its files into a folder"):
        from_pretrained("nobody/nothing", local_files_only=True)


def test_export_refuses_drift_and_leaves_nothing(net: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = type(build_format("safetensors"))
    original = form.open

    def shifted(self: Any, path: Path, threads: int | None = None) -> Any:
        runtime = original(self, path, threads)
        with torch.no_grad():
            next(p for p in runtime.net.network.segmentation_head.parameters() if p.ndim == 1).add_(0.01)
        return runtime

    monkeypatch.setattr(form, "open", shifted)
    with pytest.raises(
        ExportError, match=r"model\.safetensors was not written: max difference 0\.00\d+ is above the limit 0\.0001.*--allow_drift"
    ):
        export(net, "safetensors", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    _, report = export(net, "safetensors", tmp_path / "out", allow_drift=True)
    assert report.violations and "max difference" in (tmp_path / "out" / "README.md").read_text()
    _, report = export(net, "safetensors", tmp_path / "out", tolerance=0.01)
    assert not report.violations and report.limits == {"max_difference": 0.01}


def test_options_that_do_not_fit_are_refused(net: Explainer, classifier: Explanandum, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch_export cannot be written with precision 'int8'; it offers fp32"):
        export(net, "torch_export", tmp_path, precision="int8")
    with pytest.raises(ConfigError, match="int8 needs calibration images: --calibration FOLDER"):
        export(net, "onnx", tmp_path, precision="int8")
    with pytest.raises(ConfigError, match="needs the classifier: --classifier CHECKPOINT"):
        export(net, "onnx", tmp_path, fused=True)
    with pytest.raises(ConfigError, match=r"safetensors stores the Explainer alone; choose onnx.*, web for --fused"):
        export(net, "safetensors", tmp_path, fused=True, explanandum=classifier)
    with pytest.raises(UnknownNameError, match="Did you mean 'onnx'"):
        export(net, "onx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_is_a_new_format_for_the_command_line_too(tmp_path: Path) -> None:
    known = ["litserve", "onnx", "openvino", "safetensors", "space", "torch_export", "triton", "web"]
    assert vocabulary.formats() == list(plugins.discover("explainer.export")) == known
    (tmp_path / "other.py").write_text(
        'class Mine(base.ExportFormat):\n    """Mine."""\n\n    suffix = ".x"\n    name: ClassVar[str] = "mine"\n'
    )
    (tmp_path / "no.py").write_text('name = "no"\n')
    assert vocabulary.names_in(tmp_path) == ["mine"]


@pytest.mark.parametrize(("format_name", "module", "extra"), [("onnx", "onnx", "export"), ("openvino", "openvino", "openvino")])
def test_a_missing_package_names_its_extra(
    net: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, module: str, extra: str
) -> None:
    real = base.importlib.import_module

    def absent(name: str) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=rf"{module} is not installed .*pip install 'explainer-net\[{extra}\]'"):
        build_format(format_name).write(ExportModel(net), tmp_path / "model", ExportOptions((32, 32)))


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    for suffix, text in (
        (".onnx", "not a model written by `explainer export --format onnx`"),
        (".pt2", "not a program"),
        (".xml", "not a model written by"),
    ):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match=text):
            open_model(path)
    with pytest.raises(CheckpointError, match=r"holds 3 model files \(bad.onnx, bad.pt2, bad.xml\).*Give the file"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "absent.onnx")


def test_the_card_tells_how_to_use_the_files_that_are_there(
    net: Explainer, classifier: Explanandum, onnx_fused: tuple[Path, Any], tmp_path: Path
) -> None:
    text = (onnx_fused[0].parent / "README.md").read_text()
    assert 'Predictor("fused.onnx")' in text and "model.safetensors" not in text and "explainer.load" not in text and ".pt2" not in text
    assert "model.onnx" not in text and "predicted from a probability of 0.5" in text
    export(net, "safetensors", tmp_path, metrics={"iou": 0.8125}, license="CC-BY-4.0\n\nand more")
    text = (tmp_path / "README.md").read_text()
    assert "explainer.load(" in text and "Predictor" not in text and "openvino" not in text
    # A second export keeps what was said of the same weights, unless it says otherwise; of others, it does not.
    export(net, "torch_export", tmp_path, fused=True, explanandum=classifier)
    text = (tmp_path / "README.md").read_text()
    assert (
        "| iou | 0.8125 |" in text and "CC-BY-4.0\n\nand more" in text and 'open_model("fused.pt2")' in text and "explainer.load(" in text
    )
    export(net, "safetensors", tmp_path, metrics={"iou": 0.5}, license="MIT")
    text = (tmp_path / "README.md").read_text()
    assert "| iou | 0.5000 |" in text and "MIT" in text and "CC-BY" not in text and "0.8125" not in text
    other = Explainer.from_config(net.config).eval()
    other.metadata = {"fill": "blur"}
    save_pretrained(other, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "0.5000" not in text and "Not stated by whoever exported it" in text and "shown as: blur" in text


def test_the_instructions_of_each_kind_of_file() -> None:
    from explainer.export.card import _use

    assert "\n".join(_use(["model.xml", "model.bin"])).count("model.bin") == 1 and "openvino" in "\n".join(_use(["model.xml"]))
    every = _use(["README.md", "fused-int8.onnx", "model.onnx", "model.pt2", "model.safetensors", "model.xml"])
    assert every[0] == "```python" and every[-1] == "```" and sum('Predictor("' in line for line in every) == 2
    for name in ("fused-int8.onnx", "model.onnx", "model.pt2", "model.safetensors", "model.xml"):
        assert any(name in line for line in every)


def test_a_library_that_cannot_write_is_one_paragraph(net: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, model: Any, path: Path, options: Any) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(type(build_format("safetensors")), "write", full)
    with pytest.raises(ExportError, match=r"model\.safetensors could not be written \(PytorchStreamWriter.*Check the space"):
        export(net, "safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []
