"""The report's frame: one style sheet and one script, both inline. Without the script everything is visible, only unsorted."""

from __future__ import annotations

from html import escape
from importlib import resources


def page(title: str, body: str, style: str = "", script: str | None = None, images: str = "data:", connect: str = "'none'") -> str:
    """A complete document.

    Args:
        title: is escaped.
        body: HTML.
        style: further CSS.
        script: instead of the report's.
        images, connect: where pictures and data may come from, as a content security policy says it.
    """
    root = resources.files("explainer.report")
    looks = root.joinpath("report.css").read_text("utf-8") + style
    behaviour = root.joinpath("report.js").read_text("utf-8") if script is None else script
    policy = f"default-src 'none'; img-src {images}; connect-src {connect}; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{looks}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{behaviour}</script>\n</body>\n</html>\n"
    )
