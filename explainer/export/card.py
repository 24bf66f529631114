"""The model card: what the files beside it are, what they were made from, how good they are, what they must not be used for."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard, ModelCardData, SpaceCardData

from explainer.files import parse_json, write_json, write_text
from explainer.geometry import size_text

log = logging.getLogger(__name__)
CARD, DRIFT = "README.md", "drift.json"
_UNSTATED = "Not stated by whoever exported it"
#: Licences that the Hub knows by these names; others are "other", with their own text as name.
_LICENSES = ("apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "gpl-3.0", "mit", "openrail")
_USE = """- For people who build or audit the classifier: to see on which parts of a picture it bases its decision for each class, to find
  wrong cues, to compare two of its versions, to choose pictures that deserve a closer look.
- For pictures like those it was trained on, in RGB."""
_LIMITS = """- A mask shows where this classifier finds evidence for a class. It does not say that the class is there, nor that the
  classifier is right.
- It explains one classifier, the one with the fingerprint above, on images like those it was trained on. For another classifier, or
  other images, its masks mean nothing: check them with `evaluate.py` first.
- Masks are learned under the rules of its training (area bounds, smoothness); a small or fine structure may be missing.
- Not for decisions about people, medical use or safety without a separate validation on the data of that use."""


def write_card(
    folder: Path,
    description: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    license: str | None = None,
    *,
    use: Sequence[str] = (),
    front: dict[str, Any] | None = None,
) -> Path:
    """Write ``README.md`` beside the exported files: from ``description``, the files that lie there, and their reports in ``drift.json``.

    Metrics and licence that are not given are taken over from the card that is replaced, if it is of the same weights.

    Args:
        folder: folder of the files.
        description: what :func:`explainer.inference.describe.describe` says of the network.
        metrics: numbers by name; other values, and those of training steps (``train/``), are left out.
        license: licence of the weights, as text or as a name that the Hub knows.
        use: lines of Markdown that say how the folder is used; none: how each file is opened.
        front: metadata of a card that is not a model's.
    """
    path = folder / CARD
    # A name that would break out of the card's tables and code is left out; no file of ours has one.
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and re.fullmatch(r"[\w.-]+", p.name))
    reports = {name: report for name, report in _read(folder / DRIFT).items() if (folder / name).is_file()}
    old_metrics, old_license = _of_the_old_card(path, description["weights"])
    write_text(path, card(description, reports, metrics or old_metrics, license or old_license, files, use=use, front=front))
    return path


def _of_the_old_card(path: Path, weights: str) -> tuple[dict[str, Any] | None, str | None]:
    """Metrics and licence of a card of the same weights."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None, None
    if f"weights `{weights}`" not in text:
        return None, None
    parts = {name.strip(): body.strip() for name, _, body in (part.partition("\n") for part in text.split("\n## "))}
    metrics = {}
    for line in parts.get("Metrics", "").splitlines()[2:]:
        name, _, value = line.strip("| ").rpartition(" | ")
        with contextlib.suppress(ValueError):  # a line that someone wrote by hand
            metrics[re.sub(r"\\(.)", r"\1", name)] = float(value)
    license = parts.get("Licence", "")
    return metrics or None, None if license.startswith(_UNSTATED) else license or None


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Add one drift report to ``drift.json``, keyed by its file."""
    reports = _read(folder / DRIFT)
    reports[report["file"]] = report
    write_json(folder / DRIFT, reports)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): it is written anew, without the reports of earlier exports", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def card(
    description: dict[str, Any],
    reports: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    license: str | None = None,
    files: Sequence[str] = ("model.safetensors",),
    *,
    use: Sequence[str] = (),
    front: dict[str, Any] | None = None,
) -> str:
    """The card as Markdown, with the metadata block that the Hugging Face Hub reads; instructions for the ``files`` that are there."""
    d, e = description, description["explainer"]
    encoder = e["options"].get("encoder_name")
    trained = size_text(d["image_size"]) if d["image_size"] else "an unknown size"
    title = f"# Explainer: {plain(e['network'])}{f' with {plain(encoder)}' if encoder else ''}, {len(d['classes'])} classes"
    lines = [
        title,
        "",
        "One forward pass gives, for every class, a mask in [0,1] of where a classifier finds its evidence "
        "(Stalder et al., *What You See is What You Classify*, NeurIPS 2022).",
        "",
        "## Use",
        "",
        *(use or _use(files)),
        "",
        "## What it is",
        "",
        f"- Classes: {', '.join(plain(c) for c in d['classes'])}",
        f"- Parameters: {d['parameters']:,}; trained at {trained}; weights `{d['weights']}`",
        f"- Explains the classifier with fingerprint `{d['explained_classifier'] or 'unknown'}`",
        f"- Removed pixels were shown as: {plain(d.get('fill') or 'mean (not recorded)')}",
        *([f"- Masks are computed of the {d['top']} most probable classes of each image (`classes`)"] if d.get("top") else []),
        *([f"- Classes are predicted from a probability of {d['threshold']:g} (merged mask of fused files)"] if d.get("threshold") else []),
        f"- Data: {plain(json.dumps(d['data'])) if d['data'] else 'not recorded'}",
        f"- Versions: {plain(json.dumps(d['versions']))}",
        "",
        "## Intended use",
        "",
        _USE,
        "",
        "## Limits",
        "",
        _LIMITS,
        "",
        "## Examples",
        "",
        *_examples(examples_name(d["weights"]), files),
        "",
        "## Metrics",
        "",
        *_metrics(metrics),
        "",
        "## Files and drift against the network in torch",
        "",
        *_drift(reports),
        "",
        "## Licence",
        "",
        license
        or f"{_UNSTATED}. The code is Apache-2.0; weights also depend on the terms of the training data and of pretrained encoder weights.",
        "",
    ]
    return str(ModelCard(f"---\n{_metadata(license, front).to_yaml()}\n---\n\n" + "\n".join(lines)))


def _metadata(license: str | None, front: dict[str, Any] | None) -> CardData:
    """What the Hub sorts and filters by; ``front`` are the settings of a Space, which a model does not have."""
    known = license is not None and license.strip().lower() in _LICENSES
    name = None if license is None or known else " ".join(license.split())
    if front is not None:
        return SpaceCardData(license=license.strip().lower() if license is not None and known else None, **front)
    return ModelCardData(
        library_name="explainer",
        pipeline_tag="image-segmentation",
        tags=["explainability", "saliency", "class-masks"],
        license=license.strip().lower() if license is not None and known else "other" if name else None,
        license_name=name,
    )


def examples_name(weights: str) -> str:
    """File of the example pictures beside the card. It names the weights, so that pictures of others are never shown.

    Args:
        weights: their fingerprint.
    """
    return f"examples_{weights}.png"


def _examples(name: str, files: Sequence[str]) -> list[str]:
    if name not in files:
        return ["Not included. Export again with `--examples FOLDER`, a folder of pictures that may be shown."]
    return [f"![Pictures, each with its merged mask and the masks of its classes]({name})", "", "What a mask keeps is bright."]


def plain(text: Any) -> str:
    """Text that is shown in Markdown as it stands: one line, no markup, no HTML, no table cells."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&])", r"\\\1", line)


def _use(files: Sequence[str]) -> list[str]:
    """How to open what is there, one way per kind of file."""
    lines = ["```python"]
    if "model.safetensors" in files:
        lines += [
            "import explainer",
            'net = explainer.load("path/of/this/folder")   # model.safetensors with config.json',
            "masks = net(images)                            # [B,3,H,W] in [0,1] -> [B,K,H,W] in [0,1]",
            "",
        ]
    for name in files:
        outputs = "masks, merged, probabilities, areas" if name.startswith("fused") else "masks, areas"
        if name.endswith(".onnx"):
            lines += [
                "from explainer.inference.predictor import Predictor   # no torch",
                f'result = Predictor("{name}")("photo.jpg")   # {outputs}',
                "",
            ]
        elif name.endswith(".pt2"):
            lines += [
                "from explainer.inference.runtime import open_model   # checks that the file is data alone",
                f'result = open_model("{name}").run(images)   # numpy [B,3,H,W] float32; in torch alone, for files you trust:',
                f'outputs = torch.export.load("{name}").module(check_guards=False)(images)',
                "",
            ]
        elif name.endswith(".xml"):
            lines += [
                f"import openvino   # {name} with {name[:-4]}.bin",
                f'result = openvino.Core().compile_model("{name}", "CPU")(images)   # numpy [B,3,H,W] float32',
                "",
            ]
    return [*lines[:-1], "```"]


def _metrics(metrics: dict[str, Any] | None) -> list[str]:
    numbers = {
        k: v
        for k, v in (metrics or {}).items()
        # A training step's own loss says nothing about the masks of new pictures.
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and not k.startswith("train/")
    }
    if not numbers:
        return ["Not recorded. Evaluate with `python evaluate.py` and export again with `--metrics FILE`."]
    return ["| metric | value |", "|---|---|", *(f"| {plain(k)} | {v:.4f} |" for k, v in sorted(numbers.items()))]


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
