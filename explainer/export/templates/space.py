"""Where does a classifier find its evidence? A picture in, the probabilities and masks of its classes out."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from explainer.errors import ExplainerError
from explainer.inference.predictor import Predictor

HERE = Path(__file__).parent
SHOWN = 5
predictor = Predictor(HERE / "fused.onnx")
TOP = min(SHOWN, predictor.description.get("top") or len(predictor.classes))


def explain(picture: str | None) -> tuple[dict[str, float], tuple[Image.Image, list[tuple[np.ndarray, str]]]]:
    """Probabilities by class, and the picture with the masks ``[H,W]`` of the most probable classes."""
    if picture is None:
        raise gr.Error("Choose a picture first.")
    try:
        result = predictor(picture)
    except ExplainerError as error:  # a damaged or far too large picture
        raise gr.Error(str(error).replace(picture, "the picture")) from error
    probabilities = result["probabilities"]
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    places = {int(k): i for i, k in enumerate(result.get("classes", range(len(predictor.classes))))}
    masks = [(result["masks"][places[int(k)]], predictor.classes[k]) for k in order if int(k) in places]
    upright = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
    return {name: float(p) for name, p in zip(predictor.classes, probabilities, strict=True)}, (upright, masks)


demo = gr.Interface(
    explain,
    gr.Image(type="filepath", label="Picture"),
    [gr.Label(num_top_classes=TOP, label="Probabilities"), gr.AnnotatedImage(label="Evidence: point at a class to see its mask alone")],
    examples=[[str(path)] for path in sorted((HERE / "examples").glob("*.png"))] or None,
    cache_examples=False,
    title="Where the evidence lies",
    description="A mask shows where this classifier finds evidence for a class. It does not say that the class is there, nor that the "
    "classifier is right.",
    flagging_mode="never",
    api_name="explain",
)

if __name__ == "__main__":
    demo.launch()
