"""From a trained Explainer to a checked file: write, open again, compare, and only then put it where it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explainer import plugins
from explainer.errors import ConfigError, ExplainerError, ExportError
from explainer.export.card import add_report, examples_name, write_card
from explainer.export.fused import FusedExplainer
from explainer.export.parity import DriftReport, measure
from explainer.files import partial_folder
from explainer.geometry import height_width
from explainer.inference.classifier import require_same_classifier
from explainer.inference.describe import describe
from explainer.inference.eager import EagerRuntime
from explainer.inference.explaining import SHOWN, choose, finite, scores_of
from explainer.inference.formats import DEFAULT_SIDE, Array, ExportFormat, ExportModel, ExportOptions
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

_LARGEST_BATCH = 32


def build_format(name: str) -> ExportFormat:
    """The format called ``name``; unknown names are answered with the known ones."""
    chosen: ExportFormat = plugins.build(__package__, name)
    return chosen


def check_formats(names: Sequence[str], options: ExportOptions, fused: bool) -> None:
    """Ask all formats of one call before the first is written.

    Raises:
        ConfigError: one of them cannot be written so.
    """
    for form in map(build_format, names):
        form.check(options)
        if fused:
            _require_fusable(form)


def _require_fusable(form: ExportFormat) -> None:
    if not form.fusable:
        known = sorted(plugins.discover(__package__).items(), key=lambda item: (item[1].folder is not None, item[0]))
        others = ", ".join(name for name, other in known if other.fusable)
        raise ConfigError(
            f"format {form.name} stores the Explainer alone; choose {others} for --fused, and export {form.name} by a call without it."
        )


def export(
    net: Explainer,
    format_name: str,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    precision: str = "fp32",
    fused: bool = False,
    explanandum: Explanandum | None = None,
    threshold: float = 0.5,
    top: int | None = None,
    full_size: bool = True,
    calibration: Array | None = None,
    tolerance: float | None = None,
    allow_drift: bool = False,
    metrics: dict[str, Any] | None = None,
    license: str | None = None,
    examples: Array | None = None,
    runtime: Path | None = None,
) -> tuple[Path, DriftReport]:
    """Write ``net`` into the folder ``out`` with its drift report (``drift.json``) and model card (``README.md``).

    A format with a folder of its own (web, space, triton, litserve) puts all of this into that folder inside ``out``.

    Args:
        size: ``(height, width)``; default the size it was trained at.
        dynamic_size: accept any size.
        precision: fp32, fp16 or int8.
        fused: put the classifier into the same file; needs ``explanandum``, unless the encoder is shared with it.
        explanandum: the classifier; also used to measure the change in faithfulness.
        threshold: least probability of a predicted class, in a fused multi-label model.
        top: a fused model computes the masks of the most probable classes only, this many.
        full_size: a fused model with a shared encoder gives masks at the image's resolution; otherwise at its decoder's.
        calibration: ``[N,3,H,W]`` images for int8, and to measure drift on; for int8 every fourth is kept for that.
        tolerance: largest allowed mask difference instead of the limits in :data:`explainer.export.parity.LIMITS`.
        allow_drift: write the file even if it exceeds them.
        examples: ``[N,3,H,W]`` in [0,1], pictures that the model card shows with their masks; N at least 1.
        runtime: folder with the files of onnxruntime-web, for the web page.

    Returns:
        The file and its report.

    Raises:
        ExportError: the model cannot be exported, or drifts further than allowed; nothing is left behind then.
        ConfigError: an option does not fit, or an optional package is missing (names the extra).
    """
    form = build_format(format_name)
    fused = fused or form.fused_only
    used, seen = split_calibration(calibration, precision)
    options = ExportOptions(size or height_width(net.image_size or DEFAULT_SIDE), dynamic_size, precision, used, examples, runtime)
    form.check(options)
    if min(options.size) < 1:
        raise ConfigError(f"size must be positive, received {options.size}.")
    if not fused and (top is not None or not full_size):
        raise ConfigError("--top and --mask_size decoder belong to a fused model: add --fused.")
    net = net.eval()
    explanandum = explanandum or net.explanandum
    shapes = parity_shapes(options, form)
    if seen is not None:
        shapes.append((min(_LARGEST_BATCH, len(seen)), *options.size))
    if fused:
        model = _fused(net, form, options, explanandum, threshold, top, full_size)
    else:
        require_same_classifier(explanandum, {"explained_classifier": net.metadata.get("fingerprint")}, "this Explainer")
        model = ExportModel(net, ("masks",), net.stride * net.downscale, describe(net, options, explanandum))
    out = Path(out) / (form.folder or "")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be created ({error.strerror}). Choose another folder.") from error
    with partial_folder(out) as folder:
        path = folder / file_name(form, options, fused)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(form, model, path, options)
        report = measure(
            model,
            form.open(path) if net.explanandum is None else form.open(path, given=lambda _: net.explanandum),
            file=path,
            format_name=form.name,
            precision=precision,
            shapes=shapes,
            images=seen,
            explanandum=explanandum,
            tolerance=tolerance,
        )
        report.file = path.relative_to(folder).as_posix()
        if report.violations and not allow_drift:
            raise ExportError(
                f"{path.name} was not written: {'; '.join(report.violations)}. Largest mask difference {report.max_difference:.3g}, "
                f"mean {report.mean_difference:.3g}, IoU at 0.5 {report.iou:.4f}. Use a higher precision, other or more calibration "
                "images, or accept it with --allow_drift (or a --tolerance of your own)."
            )
        for made in sorted(p for p in folder.rglob("*") if p.is_file()):
            place = out / made.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            made.replace(place)
    add_report(out, report.as_dict())
    if examples is not None:
        _draw_examples(net, explanandum, examples, out / examples_name(model.description["weights"]))
    use, front = form.use(report.file), form.front(model.description)
    write_card(out, model.description, metrics, license, use=use, front=front)
    return out / report.file, report


def _draw_examples(net: Explainer, explanandum: Explanandum | None, examples: Array, path: Path) -> None:
    """A sheet of pictures with the masks of the classes that each shows."""
    from explainer.figures import mask_sheet  # matplotlib takes a second to import

    runtime = EagerRuntime(net)
    masks = finite(runtime.run(examples), runtime)["masks"]
    scores = scores_of({}, examples, explanandum)
    shown = torch.zeros(masks.shape[:2])
    for i, own in enumerate(masks):
        chosen = choose(own, None if scores is None else scores[i], explanandum, runtime, threshold=0.5)
        shown[i, chosen[:SHOWN]] = 1
    mask_sheet(torch.from_numpy(examples), torch.from_numpy(masks), shown, runtime.classes, path)


def _write(form: ExportFormat, model: ExportModel, path: Path, options: ExportOptions) -> None:
    """As ``form.write``; a full disk or the like, which each library reports by a type of its own, becomes an :class:`ExportError`."""
    try:
        form.write(model, path, options)
    except (ExplainerError, OSError):
        raise
    except Exception as error:  # RuntimeError of torch and OpenVINO, SafetensorError, protobuf's errors
        raise ExportError(
            f"{path.name} could not be written ({' '.join(str(error).split())[:300]}). Check the space on the disk of --out, or choose "
            "another --format."
        ) from error


def _fused(
    net: Explainer,
    form: ExportFormat,
    options: ExportOptions,
    explanandum: Explanandum | None,
    threshold: float,
    top: int | None,
    full_size: bool,
) -> ExportModel:
    if explanandum is None:
        raise ConfigError("a fused model needs the classifier: --classifier CHECKPOINT.")
    if not explanandum.differentiable:
        raise ConfigError(
            "this classifier gives scores only: it cannot be put into the same file. Give its checkpoint, or leave out --fused."
        )
    _require_fusable(form)
    both = FusedExplainer(net, explanandum, threshold, top, full_size)
    baked = threshold if explanandum.task == "multilabel" else None
    return ExportModel(
        both, both.outputs, net.stride * net.downscale, describe(net, options, explanandum, outputs=both.outputs, threshold=baked, top=top)
    )


def file_name(form: ExportFormat, options: ExportOptions, fused: bool = False) -> str:
    """``model.onnx``, ``model-int8.onnx``, ``fused.xml``, ..."""
    if form.name == "safetensors":
        return "model.safetensors"
    return form.file_name(("fused" if fused else "model") + ("" if options.precision == "fp32" else f"-{options.precision}"))


def parity_shapes(options: ExportOptions, form: ExportFormat) -> list[tuple[int, int, int]]:
    """Batch sizes 1, 3 and 8 at the size asked for; where any size is accepted, also two that are no multiples of anything."""
    height, width = options.size
    found = [(1, height, width), (3, height, width), (8, height, width)]
    if options.dynamic_size or form.name == "safetensors":
        found[1:] = [(3, height * 3 // 4 + 5, width + 13), (8, height, max(16, width // 2 + 1))]
    return found


def split_calibration(images: Array | None, precision: str) -> tuple[Array | None, Array | None]:
    """Images to calibrate on and images to measure drift on. int8 ranges are fitted to images, so drift is asked of others: every
    fourth, if there are at least eight.
    """
    if images is None or precision != "int8" or len(images) < 8:
        return images, images
    held = np.arange(len(images)) % 4 == 3
    return images[~held], images[held]
