"""A shared encoder in one file: classification and masks of one pass, the most probable classes chosen inside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from explainer.cli import main
from explainer.errors import ConfigError
from explainer.export.exporting import export
from explainer.export.fused import FusedExplainer
from explainer.export.onnx import with_whole_factors
from explainer.inference.predictor import Predictor, enlarged
from explainer.inference.runtime import open_model
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

K, TOP = 7, 3
NAMES = tuple("abcdefg")


class Tiny(nn.Module):
    """Three stages, of strides 4, 8 and 16, and a linear head on the mean of the last."""

    def __init__(self, classes: int = K) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 7, 3, 2, 1), nn.Conv2d(7, 9, 3, 2, 1)
        self.head = nn.Linear(9, classes)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.three(self.two(self.one(x).relu()).relu()).relu().mean(dim=(2, 3)))


def shared(task: str = "multiclass", start: str = "activation", order: float = 0.0) -> tuple[Explainer, Explanandum]:
    torch.manual_seed(3)
    classifier = Tiny()
    classifier.head.weight.data.mul_(20)
    e = Explanandum(classifier, K, task, mean=[0.5] * 3, std=[0.4] * 3, class_names=NAMES)  # type: ignore[arg-type]
    net = Explainer(
        "fpn",
        K,
        {"width": 8, "start": start, "order": order},
        class_names=NAMES,
        mean=[0.5] * 3,
        std=[0.4] * 3,
        image_size=32,
        encoder="shared",
        explanandum=e,
    ).eval()
    nn.init.normal_(net.network.head.own)  # type: ignore[union-attr]
    if order:
        nn.init.normal_(net.network.head.rank_own)  # type: ignore[union-attr]
    net.metadata = {"fingerprint": e.fingerprint(), "task": task}
    return net.requires_grad_(False), e


@pytest.fixture(scope="module")
def pair() -> tuple[Explainer, Explanandum]:
    return shared()


@pytest.fixture(scope="module")
def top_file(pair: tuple[Explainer, Explanandum], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Of the most probable classes, at the decoder's resolution."""
    return export(pair[0], "onnx", tmp_path_factory.mktemp("top"), fused=True, top=TOP, full_size=False)


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count * height + width))


@pytest.mark.parametrize(("task", "order"), [("multiclass", 0.0), ("multilabel", 0.0), ("multilabel", 2.0)])
def test_one_pass_gives_what_two_give(task: str, order: float) -> None:
    net, e = shared(task, order=order)
    x = pictures(4, 32, 32)
    with torch.no_grad():
        probabilities, masks = e.probabilities(e(x)), net(x)
        before = e.classifier.calls
        found = dict(zip(FusedExplainer(net, e).outputs, FusedExplainer(net, e)(x), strict=True))
        assert e.classifier.calls == before + 1, "the classifier runs once"
        some = dict(zip(FusedExplainer(net, e, top=TOP).outputs, FusedExplainer(net, e, top=TOP)(x), strict=True))
    assert torch.allclose(found["probabilities"], probabilities, atol=1e-6) and torch.allclose(found["masks"], masks, atol=1e-5)
    order = probabilities.argsort(dim=1, descending=True)[:, :TOP]
    rows = torch.arange(4)[:, None]
    assert torch.equal(some["classes"], order) and torch.allclose(some["masks"], masks[rows, order], atol=1e-5)
    assert torch.allclose(some["areas"], masks.mean(dim=(2, 3))[rows, order], atol=1e-5)
    for i in range(4):
        predicted = [int(order[i, 0])] if task == "multiclass" else [k for k in range(K) if probabilities[i, k] >= 0.5]
        expected = masks[i, predicted].amax(dim=0) if predicted else torch.zeros(32, 32)
        assert torch.allclose(found["merged"][i], expected, atol=1e-5)
        inside = [k for k in predicted if k in order[i]]
        expected = masks[i, inside].amax(dim=0) if inside else torch.zeros(32, 32)
        assert torch.allclose(some["merged"][i], expected, atol=1e-5)


@pytest.mark.slow
def test_the_most_probable_classes_are_chosen_in_a_file_of_any_size(pair: tuple[Explainer, Explanandum], tmp_path: Path) -> None:
    path, report = export(pair[0], "onnx", tmp_path, dynamic_size=True, fused=True, top=TOP)
    runtime = open_model(path)
    assert not report.violations and runtime.top == TOP and runtime.description["outputs"][1] == "classes"
    for shape in ((1, 32, 32), (5, 37, 53), (2, 64, 40)):
        x = pictures(*shape)
        result = runtime.run(x.numpy())
        with torch.no_grad():
            masks, scores = pair[0](x).numpy(), pair[1](x).softmax(dim=1).numpy()
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        rows = np.arange(shape[0])[:, None]
        assert np.array_equal(result["classes"], order) and result["masks"].shape == (shape[0], TOP, *shape[1:])
        assert np.abs(result["masks"] - masks[rows, order]).max() < 1e-4 and np.abs(result["probabilities"] - scores).max() < 1e-5
        assert np.abs(result["areas"] - masks.mean(axis=(2, 3))[rows, order]).max() < 1e-5


def test_a_file_of_the_most_probable_classes_explains_and_serves(top_file: tuple[Path, Any], tmp_path: Path, capsys: Any) -> None:
    from explainer.look.application import upload_facts
    from explainer.look.uploads import Uploads

    picture = tmp_path / "picture.png"
    Image.fromarray((pictures(1, 48, 40)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(picture)
    predictor = Predictor(top_file[0])
    result = predictor(picture)
    assert result["masks"].shape == (TOP, 48, 40) and result["areas"].shape == result["classes"].shape == (TOP,)
    best = NAMES[result["probabilities"].argmax()]
    out = tmp_path / "out"
    assert main(["explain", str(top_file[0]), str(picture), "--out", str(out), "--quiet", "--top", "2"]) == 0
    row = json.loads((out / "results.json").read_text())["images"][0]
    assert (
        row["chosen"] == [NAMES[k] for k in result["classes"][:2]] and row["chosen"][0] == best and set(row["areas"]) == set(row["chosen"])
    )
    assert row["scores"][best] == pytest.approx(float(result["probabilities"].max()), abs=1e-3)
    for options, words in (
        (["--top", "4"], "the masks of the 3 most probable"),
        (["--classes", "a"], "export again without --top"),
    ):
        assert main(["explain", str(top_file[0]), str(picture), "--out", str(tmp_path / "x"), "--quiet", *options]) == 2
        assert words in capsys.readouterr().err
    uploads = Uploads(open_model(top_file[0]))
    upload = uploads.add(picture.read_bytes())
    assert upload.chosen == [NAMES.index(best)] and upload.classes == list(result["classes"])
    areas = upload_facts(upload, K)["areas"]
    assert len(areas) == K and [k for k in range(K) if areas[k] is not None] == sorted(upload.classes)
    assert np.array_equal(uploads.map(upload, "explainer", upload.classes[1]).values, upload.masks[1])
    absent = next(k for k in range(K) if k not in upload.classes)
    with pytest.raises(ConfigError, match="3 most probable classes"):
        uploads.map(upload, "explainer", absent)


def test_masks_can_stay_at_the_decoders_resolution(pair: tuple[Explainer, Explanandum], top_file: tuple[Path, Any]) -> None:
    import onnxruntime

    path, report = top_file
    assert not report.violations
    x = pictures(3, 32, 32)
    raw = onnxruntime.InferenceSession(str(path)).run(["masks"], {"image": x.numpy()})[0]
    assert raw.shape == (3, TOP, 8, 8)
    result = open_model(path).run(x.numpy())
    expected = nn.functional.interpolate(torch.from_numpy(raw), (32, 32), mode="bilinear", align_corners=False)
    assert np.abs(result["masks"] - expected.numpy()).max() < 1e-6 and result["merged"].shape == (3, 32, 32)
    fused = FusedExplainer(*pair, top=TOP, full_size=False)
    with torch.no_grad():
        found = dict(zip(fused.outputs, fused(x), strict=True))
        scores = pair[1](x).softmax(dim=1)
    assert np.abs(found["masks"].numpy() - raw).max() < 1e-4 and np.array_equal(found["classes"].numpy(), result["classes"])
    assert np.array_equal(result["classes"], scores.argsort(dim=1, descending=True)[:, :TOP].numpy())
    assert np.abs(result["areas"] - result["masks"].mean(axis=(2, 3))).max() < 1e-5, "a whole factor keeps the mean"
    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(read.intersection(node.output) for node in graph.node), "nothing is computed that nobody reads"
    resizes = [node for node in onnx.load(path).graph.node if node.op_type == "Resize"]
    assert resizes and all(len(node.input) == 3 for node in resizes)
    assert with_whole_factors(onnx.load(path)).SerializeToString() == onnx.load(path).SerializeToString(), "nothing is left to do"


@pytest.mark.parametrize("format_name", ["onnx", pytest.param("torch_export", marks=pytest.mark.slow)])
def test_masks_that_begin_as_shares_and_have_an_order_are_exported(format_name: str, tmp_path: Path) -> None:
    """All classes compete in the file too, where the masks of few are computed; the order has a decoder of its own."""
    net, _ = shared("multilabel", "foreground", order=2.0)
    path, report = export(net, format_name, tmp_path, fused=True, top=TOP)
    assert path.exists() and report.max_difference < 1e-3


def test_numpy_enlarges_as_torch_does() -> None:
    for size, out in (((7, 9), (29, 9)), ((1, 3), (5, 5)), ((6, 6), (6, 6)), ((9, 8), (4, 3))):
        maps = pictures(2, *size)
        expected = nn.functional.interpolate(maps, out, mode="bilinear", align_corners=False).numpy()
        assert np.abs(enlarged(maps.numpy(), out) - expected).max() < 1e-6


def test_what_does_not_fit_is_refused(pair: tuple[Explainer, Explanandum], net: Explainer, classifier: Explanandum, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"top must lie in 1\.\.7, the number of classes, received 8"):
        FusedExplainer(*pair, top=8)
    with pytest.raises(ConfigError, match="need a shared encoder"):
        FusedExplainer(net, classifier, full_size=False)
    for options in ({"top": 2}, {"full_size": False}):
        with pytest.raises(ConfigError, match="add --fused"):
            export(pair[0], "onnx", tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "precision"), [("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8"), ("torch_export", "fp32")]
)
def test_every_format_and_precision(pair: tuple[Explainer, Explanandum], tmp_path: Path, format_name: str, precision: str) -> None:
    x = pictures(12, 32, 32).numpy()
    # An untrained network decides nothing clearly, so int8 moves its probabilities and masks by more than the limits of a trained one.
    path, report = export(
        pair[0], format_name, tmp_path, fused=True, top=TOP, precision=precision, calibration=x, allow_drift=precision == "int8"
    )
    result = open_model(path).run(x)
    assert result["masks"].shape == (12, TOP, 32, 32) and report.mean_difference < (0.1 if precision == "int8" else 2e-3)


@pytest.mark.slow
def test_an_encoder_of_its_own_computes_the_most_probable_classes_too(net: Explainer, classifier: Explanandum, tmp_path: Path) -> None:
    path, report = export(net, "onnx", tmp_path, fused=True, explanandum=classifier, top=2)
    assert not report.violations
    for batch in (1, 5):
        x = pictures(batch, 32, 32)
        result = open_model(path).run(x.numpy())
        with torch.no_grad():
            masks = net(x).numpy()
        assert np.abs(result["masks"] - masks[np.arange(batch)[:, None], result["classes"]]).max() < 1e-4
