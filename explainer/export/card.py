"""The model card: what the files beside it are, what they were made from, how good they are, what they must not be used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD, DRIFT = "README.md", "drift.json"
_LIMITS = """- A mask shows where this classifier finds evidence for a class. It does not say that the class is there, nor that the
  classifier is right.
- It explains one classifier, the one with the fingerprint above, on images like those it was trained on. For another classifier, or
  other images, its masks mean nothing: check them with `evaluate.py` first.
- Masks are learned under the rules of its training (area bounds, smoothness); a small or fine structure may be missing.
- Not for decisions about people, medical use or safety without a separate validation on the data of that use."""


def write_card(folder: Path, description: dict[str, Any], metrics: dict[str, Any] | None = None, licence: str | None = None) -> Path:
    """Write ``README.md`` beside the exported files, from ``description`` and every drift report found in ``drift.json``."""
    path = folder / CARD
    path.write_text(card(description, _read(folder / DRIFT), metrics, licence))
    return path


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Add one drift report to ``drift.json``, keyed by its file."""
    reports = _read(folder / DRIFT)
    reports[report["file"]] = report
    (folder / DRIFT).write_text(json.dumps(reports, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # absent or damaged: it is written anew, the files themselves are what counts
    return content if isinstance(content, dict) else {}


def card(description: dict[str, Any], reports: dict[str, Any], metrics: dict[str, Any] | None = None, licence: str | None = None) -> str:
    """The card as Markdown, with the metadata block that the Hugging Face Hub reads."""
    d, e = description, description["explainer"]
    encoder = e["options"].get("encoder_name")
    lines = [
        "---", "library_name: explainer", "pipeline_tag: image-segmentation", "tags: [explainability, saliency, class-masks]", "---", "",
        f"# Explainer: {e['network']}{f' with {encoder}' if encoder else ''}, {len(d['classes'])} classes", "",
        "One forward pass gives, for every class, a mask in [0,1] of where a classifier finds its evidence "
        "(Stalder et al., *What You See is What You Classify*, NeurIPS 2022).", "",
        "## Use", "",
        "```python", "import explainer", 'net = explainer.load("path/of/this/folder")   # model.safetensors',
        "masks = net(images)                            # [B,3,H,W] in [0,1] -> [B,K,H,W] in [0,1]", "",
        "from explainer.export.predictor import Predictor   # no torch; model.onnx",
        'masks = Predictor("model.onnx")("photo.jpg")["masks"]', "```",
        "A `.pt2` file: `torch.export.load(path).module(check_guards=False)(images)`.", "",
        "## What it is", "",
        f"- Classes: {', '.join(str(c) for c in d['classes'])}",
        f"- Parameters: {d['parameters']:,}; trained at {d['image_size'] or 'an unknown'} px; weights `{d['weights']}`",
        f"- Explains the classifier with fingerprint `{d['explained_classifier'] or 'unknown'}`",
        f"- Data: {json.dumps(d['data']) if d['data'] else 'not recorded'}",
        f"- Versions: {json.dumps(d['versions'])}", "",
        "## Metrics", "",
        *_metrics(metrics), "",
        "## Files and drift against the network in torch", "",
        *_drift(reports), "",
        "## Licence", "",
        licence or "Not stated by whoever exported it. The code is Apache-2.0; weights also depend on the terms of the training data and "
        "of pretrained encoder weights.", "",
        "## Limits", "", _LIMITS, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _metrics(metrics: dict[str, Any] | None) -> list[str]:
    numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}
    if not numbers:
        return ["Not recorded. Evaluate with `python evaluate.py` and export again with `--metrics FILE`."]
    return ["| metric | value |", "|---|---|", *(f"| {k} | {v:.4f} |" for k, v in sorted(numbers.items()))]


def _drift(reports: dict[str, Any]) -> list[str]:
    if not reports:
        return ["`model.safetensors` holds the weights themselves."]
    head = ["| file | precision | largest | mean | IoU at 0.5 | faithfulness | latency, batch 1 | size | verdict |", "|" + "---|" * 9]
    rows = []
    for name, r in sorted(reports.items()):
        faithfulness = f"{r['faithfulness']['change']:+.4f}" if r["faithfulness"] else "-"
        rows.append(
            f"| {name} | {r['precision']} | {r['max_difference']:.1e} | {r['mean_difference']:.1e} | {r['iou']:.4f} | {faithfulness} | "
            f"{r['latency_ms']:.1f} ms (eager {r['eager_latency_ms']:.1f}) | {r['file_bytes'] / 2**20:.2f} MiB | "
            f"{'; '.join(r['violations']) or 'within limits'} |"
        )
    return [*head, *rows]
