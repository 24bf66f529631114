"""Saving and loading by name: a folder, the Hub's cache and torch.hub give the same network, without a network connection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer.errors import CheckpointError
from explainer.models.explainer import Explainer

ROOT = Path(__file__).parents[3]


def masks(net: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(images)).numpy()


def test_folder_file_and_checkpoint_are_the_same(net: Explainer, images: np.ndarray, checkpoint: Path, tmp_path: Path) -> None:
    folder = explainer.save_pretrained(net, tmp_path / "saved")
    for source in (folder, str(folder), folder / "model.safetensors", checkpoint):
        again = explainer.from_pretrained(source)
        assert np.array_equal(masks(again, images), masks(net, images)) and again.class_names == net.class_names and not again.training


def test_the_hubs_cache_behaves_as_the_folder(net: Explainer, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache laid out as huggingface_hub does, read offline."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--me--masks"
    explainer.save_pretrained(net, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    original = huggingface_hub.snapshot_download

    def from_cache(*args: object, **kwargs: object) -> str:
        return original(*args, cache_dir=tmp_path / "cache", **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    assert np.array_equal(masks(explainer.from_pretrained("me/masks", local_files_only=True), images), masks(net, images))
    with pytest.raises(CheckpointError, match="'me/other' could not be obtained"):
        explainer.from_pretrained("me/other", local_files_only=True)


def test_torch_hub_loads_from_the_repository(net: Explainer, images: np.ndarray, tmp_path: Path) -> None:
    folder = explainer.save_pretrained(net, tmp_path / "saved")
    np.save(tmp_path / "images.npy", images[:2])
    # In a process of its own where the package is not installed: torch.hub itself must put the repository on the path.
    script = (
        "import os, sys, numpy, torch\n"
        "root, folder, images, out = sys.argv[1:]\n"
        "sys.path = [p for p in sys.path if p and os.path.realpath(p) != os.path.realpath(root)]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "try: import explainer; raise SystemExit('still installed: ' + explainer.__file__)\n"
        "except ImportError: pass\n"
        "net = torch.hub.load(root, 'explainer', folder, source='local')\n"
        "with torch.no_grad(): numpy.save(out, net(torch.from_numpy(numpy.load(images))).numpy())\n"
    )
    arguments = [str(ROOT), str(folder), str(tmp_path / "images.npy"), str(tmp_path / "masks.npy")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, timeout=120)
    assert np.abs(np.load(tmp_path / "masks.npy") - masks(net, images[:2])).max() < 1e-6
