"""The names of the export formats, read from their files: the command line knows a new one without importing torch or a runtime."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

_CLASS = re.compile(r"^class \w+\((?:\w+\.)?ExportFormat\):.*?^    name(?:: [^=\n]+)? = [\"'](\w+)[\"']$", re.MULTILINE | re.DOTALL)


def format_names(folder: Path | None = None) -> list[str]:
    """Names of all classes derived from :class:`~explainer.export.base.ExportFormat` in the files of this package (or ``folder``)."""
    root = folder if folder is not None else resources.files(__package__)
    texts = [file.read_text("utf-8") for file in root.iterdir() if file.name.endswith(".py")]
    return sorted(name for text in texts for name in _CLASS.findall(text))
