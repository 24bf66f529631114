"""The web page fits pictures to the network's image, and masks to pictures, as Python does: the same code runs in node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainer
from explainer.geometry import GEOMETRIES, PADDING, placement
from explainer.inference.predictor import _in_picture, _placed

PIXELS = Path(explainer.__file__).parent / "export" / "templates" / "web" / "pixels.js"
SCRIPT = """
import {readFileSync} from "fs";
import {placement, networkImage, inPicture} from "./pixels.mjs";
const answers = JSON.parse(readFileSync("cases.json")).map(({geometry, H, W, h, w, rgba, mask}) => {
  const place = placement(geometry, H, W, h, w);
  return {place, image: [...networkImage(Uint8ClampedArray.from(rgba), W, place, h, w, PADDING)],
          mask: [...inPicture(Float32Array.from(mask), h, w, place, h, w, H, W)]};
});
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: apt-get install nodejs")
def test_pictures_and_masks_are_those_of_python(tmp_path: Path) -> None:
    random, cases, expected = np.random.default_rng(0), [], []
    for geometry in GEOMETRIES:
        for H, W, h, w in ((50, 60, 32, 32), (61, 33, 48, 24), (20, 90, 32, 32), (24, 24, 24, 24), (3, 5, 8, 8)):
            picture = random.integers(0, 256, (H, W, 3), dtype=np.uint8)
            mask = random.random((h, w)).astype(np.float32)
            place = placement(geometry, (H, W), (h, w))
            rgba = np.dstack([picture, np.full((H, W), 255, np.uint8)]).ravel().tolist()
            cases.append({"geometry": geometry, "H": H, "W": W, "h": h, "w": w, "rgba": rgba, "mask": mask.ravel().tolist()})
            image = np.asarray(_placed(Image.fromarray(picture), place), dtype=np.float32).transpose(2, 0, 1) / 255
            expected.append((place, image, _in_picture(mask, place)))
    (tmp_path / "pixels.mjs").write_text(PIXELS.read_text())
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "run.mjs").write_text(SCRIPT.replace("PADDING", str(list(PADDING))))
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    off = []
    for answer, (place, image, mask) in zip(json.loads(done.stdout), expected, strict=True):
        assert (tuple(answer["place"]["source"]), tuple(answer["place"]["target"])) == (place.source, place.target)
        difference = 255 * np.abs(np.array(answer["image"]) - image.ravel())
        assert difference.max() < 1.01, "Pillow rounds in fixed point: now and then a grey value is its neighbour"
        off.append((difference > 0.5).mean())
        assert np.abs(np.array(answer["mask"]) - mask.ravel()).max() < 1e-5
    assert np.mean(off) < 0.02
