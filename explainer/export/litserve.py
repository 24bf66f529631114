"""A server of its own with LitServe: pictures by HTTP in, probabilities and masks out. It needs neither torch nor this package."""

from __future__ import annotations

from pathlib import Path

from explainer.export.bundle import Bundle, template, write_predictor
from explainer.files import write_text
from explainer.inference.formats import ExportModel, ExportOptions


class LitServe(Bundle):
    """``litserve/server.py`` with the fused model and requirements.txt."""

    name = "litserve"
    folder = "litserve"
    fused_only = True

    def surround(self, model: ExportModel, path: Path, folder: Path, options: ExportOptions) -> None:
        """See :class:`Bundle`."""
        write_text(folder / "server.py", template("litserve.py").replace("fused.onnx", path.name))
        requirements = "litserve>=0.2.19\nnumpy>=1.26\nonnxruntime>=1.20\npillow>=10.3\n"
        write_text(folder / "requirements.txt", requirements)
        write_predictor(folder)

    def use(self, name: str) -> list[str]:
        """See :class:`ExportFormat`."""
        return [
            f"A server: `pip install -r requirements.txt && python server.py --port 8000` answers requests with `{name}` (onnxruntime).",
            "",
            "```bash",
            """echo "{\\"image\\": \\"$(base64 -w0 photo.jpg)\\"}" | curl --json @- http://127.0.0.1:8000/predict""",
            "```",
        ]
