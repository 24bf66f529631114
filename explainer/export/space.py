"""A Hugging Face Space: a page with gradio that explains pictures on the Space's processor. It needs neither torch nor this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from explainer.export.bundle import Bundle, template, write_examples, write_predictor
from explainer.files import write_text
from explainer.inference.formats import ExportModel, ExportOptions

#: Tested with these; a Space installs gradio by the front matter, anyone else by requirements.txt.
GRADIO = "6.31.0"


class Space(Bundle):
    """``space/``: README.md with the settings of the Space, app.py, requirements.txt, the fused model, and examples if there are any."""

    name = "space"
    folder = "space"
    fused_only = True

    def surround(self, model: ExportModel, path: Path, folder: Path, options: ExportOptions) -> None:
        """See :class:`Bundle`."""
        write_text(folder / "app.py", template("space.py").replace("fused.onnx", path.name))
        write_text(folder / "requirements.txt", f"gradio=={GRADIO}\nnumpy>=1.26\nonnxruntime>=1.20\npillow>=10.3\n")
        write_predictor(folder)
        write_examples(options.examples, folder / "examples")

    def use(self, name: str) -> list[str]:
        """See :class:`ExportFormat`."""
        return [
            f"This folder is a Hugging Face Space: push it as it is. `app.py` runs `{name}` with onnxruntime; torch is not needed.",
            "On your own machine: `pip install -r requirements.txt && python app.py`.",
        ]

    def front(self, description: dict[str, Any]) -> dict[str, Any] | None:
        """See :class:`ExportFormat`."""
        return {
            "title": f"Where the evidence lies: {len(description['classes'])} classes",
            "sdk": "gradio",
            "sdk_version": GRADIO,
            "python_version": "3.11",
            "app_file": "app.py",
            "pinned": False,
            "tags": ["explainability", "saliency", "class-masks"],
        }
