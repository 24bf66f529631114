"""A web page that explains pictures on the visitor's own device, with onnxruntime-web; nothing is sent anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from explainer.errors import ConfigError
from explainer.export.bundle import Bundle, network_size, template, write_examples
from explainer.files import write_json, write_text
from explainer.geometry import PADDING
from explainer.inference.formats import ExportModel, ExportOptions

#: Of onnxruntime-web: the part that computes with WebAssembly, which every browser has.
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PAGE = ("index.html", "page.css", "page.js", "pixels.js")


class Web(Bundle):
    """``web/index.html`` with ``fused.onnx``; any web server for files will do.

    onnxruntime-web comes from the user's own copy (``--runtime``) and is copied beside the page, so that the page asks no other site for
    anything. Without ``--runtime`` the folder ``web/runtime`` must be filled before the page is opened; the page says so too.
    """

    name = "web"
    folder = "web"
    fused_only = True

    def check(self, options: ExportOptions) -> None:
        """See :class:`ExportFormat`; also raises for a runtime that is not one."""
        super().check(options)
        if options.runtime is None:
            return
        absent = [name for name in RUNTIME if not (options.runtime / name).is_file()]
        if absent:
            raise ConfigError(
                f"--runtime {options.runtime} lacks {', '.join(absent)}: give the folder node_modules/onnxruntime-web/dist that "
                "`npm install onnxruntime-web` makes."
            )

    def surround(self, model: ExportModel, path: Path, folder: Path, options: ExportOptions) -> None:
        """See :class:`Bundle`."""
        d = model.description
        examples = write_examples(options.examples, folder / "examples")
        height, width = network_size(d)
        known = {
            "file": path.name,
            "classes": d["classes"],
            "height": height,
            "width": width,
            "geometry": d["geometry"],
            "padding": PADDING,
            "task": d["task"],
            "threshold": d["threshold"],
            "top": d["top"],
            "precision": d["precision"],
            "weights": d["weights"],
            "explained_classifier": d["explained_classifier"],
            "runtime": RUNTIME,
            "examples": examples,
        }
        write_json(folder / "model.json", known)
        for name in _PAGE:
            write_text(folder / name, template(f"web/{name}"))
        if options.runtime is not None:
            (folder / "runtime").mkdir()
            for name in RUNTIME:
                shutil.copyfile(options.runtime / name, folder / "runtime" / name)

    def use(self, name: str) -> list[str]:
        """See :class:`ExportFormat`."""
        return [
            f"A web page. It runs `{name}` on the visitor's device (WebAssembly); pictures are not sent anywhere. Try it with",
            "`python -m http.server --bind 127.0.0.1 8000` in this folder and open http://127.0.0.1:8000/, or put the folder on any web",
            "server for files.",
            "",
            f"The folder `runtime` must hold {', '.join(f'`{n}`' for n in RUNTIME)} of the npm package onnxruntime-web (MIT licence);",
            "`explainer export --format web --runtime node_modules/onnxruntime-web/dist` copies them.",
        ]
