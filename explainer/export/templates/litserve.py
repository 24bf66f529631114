"""Masks over HTTP: ``{"image": <base64 of a picture>}`` to /predict, probabilities and PNG masks of the shown classes back."""

from __future__ import annotations

import argparse
import base64
import binascii
import io
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
from fastapi import HTTPException
from PIL import Image

from explainer.errors import ExplainerError
from explainer.inference.predictor import Predictor

MODEL = Path(__file__).parent / "fused.onnx"


class Evidence(ls.LitAPI):
    """Answers with the most probable classes, ``top`` of them (default 3), each with its mask at the picture's size."""

    def setup(self, device: str) -> None:
        """Open the model; one copy a worker."""
        self.predictor = Predictor(MODEL)

    def decode_request(self, request) -> tuple[Image.Image, int]:  # LitServe reads JSON where it has no type
        """The picture and the number of classes."""
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(request["image"], validate=True)))
            return picture, max(1, int(request.get("top", 3)))
        except (KeyError, TypeError, ValueError, binascii.Error, OSError, Image.DecompressionBombError) as error:
            raise HTTPException(422, 'expected JSON {"image": base64 of a picture, "top": number of classes}.') from error

    def predict(self, x: tuple[Image.Image, int]) -> dict[str, Any]:
        """All that is known of one picture."""
        picture, top = x
        try:
            result = self.predictor(picture)
        except (ExplainerError, OSError) as error:
            raise HTTPException(422, f"the picture cannot be used ({error}).") from error
        return {**result, "top": top}

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """JSON: probabilities of all classes; name, area and mask (8-bit grey PNG, base64) of the shown ones."""
        classes = self.predictor.classes
        rows = [int(k) for k in output.get("classes", range(len(classes)))]  # the class of each mask
        shown = sorted(range(len(rows)), key=lambda i: -output["probabilities"][rows[i]])[: output["top"]]
        return {
            "probabilities": {name: float(p) for name, p in zip(classes, output["probabilities"], strict=True)},
            "masks": [{"class": classes[rows[i]], "area": float(output["areas"][i]), "png": png(output["masks"][i])} for i in shown],
        }


def png(mask: np.ndarray) -> str:
    """A mask ``[H,W]`` in [0,1] as base64."""
    stream = io.BytesIO()
    Image.fromarray((mask * 255).round().astype(np.uint8)).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 answers other machines too: put a proxy with TLS in front")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="copies of the model, each of which answers one request at a time")
    args = parser.parse_args()
    server = ls.LitServer(Evidence(), accelerator="cpu", workers_per_device=args.workers, timeout=60, max_payload_size=64 * 2**20)
    server.run(host=args.host, port=args.port, generate_client_file=False)
