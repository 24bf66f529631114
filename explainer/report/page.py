"""The report's frame: one style sheet and one script, both inline. Without the script everything is visible, only unsorted."""

from __future__ import annotations

from html import escape
from importlib import resources


def page(title: str, body: str) -> str:
    """A complete document; ``title`` is escaped, ``body`` is HTML."""
    root = resources.files("explainer.report")
    style, script = (root.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
