"""A tiny Explainer that really segments (so that a mask has an inside and an edge), its classifier, and one export of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.export.exporting import export
from explainer.models.classifiers import SmallVGG
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

NAMES = ("red", "green", "a/b blue")
OPTIONS = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}


def colored(count: int, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[N,3,S,S]`` with one bright rectangle in channel k on grey noise, and its mask ``[N,3,S,S]``."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.1 * torch.rand(count, 3, side, side, generator=generator)
    masks = torch.zeros(count, 3, side, side)
    for n in range(count):
        y, x = (int(v) for v in torch.randint(2, side // 2, (2,), generator=generator))
        box = (n, n % 3, slice(y, y + side // 3), slice(x, x + side // 3))
        images[box], masks[box] = 0.95, 1.0
    return images, masks


@pytest.fixture(scope="session")
def classifier() -> Explanandum:
    torch.manual_seed(1)
    return Explanandum(SmallVGG(3, (8, 8)), 3, class_names=NAMES, input_size=32)


@pytest.fixture(scope="session")
def net(classifier: Explanandum) -> Explainer:
    torch.manual_seed(0)
    net = Explainer("unet", 3, OPTIONS, class_names=NAMES, image_size=32, stride=8)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=90)  # settles the BatchNorm statistics
    for step in range(90):
        images, masks = colored(12, 32, step)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net.logits(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.metadata = {
        "fingerprint": classifier.fingerprint(),
        "data": {"name": "shapes", "options": {"size": 32, "root": "/home/someone/data"}},
        "versions": {"torch": "x"},
    }
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return colored(12, 32, 1000)[0].numpy()


@pytest.fixture(scope="session")
def onnx_any(net: Explainer, images: np.ndarray, classifier: Explanandum, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """``model.onnx`` for any size, measured on real images and with the classifier."""
    out = tmp_path_factory.mktemp("onnx_any")
    return export(net, "onnx", out, dynamic_size=True, calibration=images, explanandum=classifier, license="CC-BY-4.0")


@pytest.fixture(scope="session")
def onnx_fused(net: Explainer, classifier: Explanandum, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return export(net, "onnx", tmp_path_factory.mktemp("onnx_fused"), fused=True, explanandum=classifier)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs of other sizes in two folders, a truncated one, and a text file."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    images, _ = colored(3, 48, 7)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    Image.fromarray(pixels[0, :40]).save(root / "one.png")
    Image.fromarray(pixels[1]).save(root / "deep" / "one.png")
    (root / "broken.png").write_bytes((root / "one.png").read_bytes()[:200])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def checkpoint(net: Explainer, tmp_path: Path) -> Path:
    """A checkpoint as ExplainTask writes it."""
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    state = {f"explainer.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"kind": "explainer", "explainer": net.config, **net.metadata}}, path)
    return path


@pytest.fixture
def classifier_checkpoint(classifier: Explanandum, tmp_path: Path) -> Path:
    path = tmp_path / "classifier.ckpt"
    values = {
        "kind": "classifier",
        "classifier": {
            "arch": "small_vgg",
            "options": {"widths": [8, 8]},
            "input_size": 32,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "num_classes": 3,
        "task": "multilabel",
        "class_names": list(NAMES),
    }
    state = {f"classifier.{k}": v for k, v in classifier.classifier.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": values}, path)
    return path
