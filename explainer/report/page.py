"""Pages from templates: one frame, one style sheet and one script, all inline. Without the script everything is visible, only unsorted.

Templates are Jinja's; their values are escaped. A template is named by its path in the package: ``report/page.html`` is the frame, and
others extend it.
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page(title: str, body: str, style: str = "") -> str:
    """A complete document in the frame of the report.

    Args:
        title: plain text.
        body: HTML.
        style: further CSS.
    """
    return rendered("report/page.html", title=title, body=body, style=style)


def rendered(template: str, images: str = "data:", connect: str = "'none'", **values: Any) -> str:
    """A complete document from a template that extends the frame.

    Args:
        template: path in the package.
        images: where pictures may come from, as a content security policy says it.
        connect: where data may come from, likewise.
        values: the template's; escaped unless they are :class:`markupsafe.Markup`.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return _environment().get_template(template).render(images=images, connect=connect, **values)


def inline(text: str, tag: str) -> str:
    """The content of a page's one ``<style>`` or ``<script>``.

    Args:
        text: what :func:`rendered` returns.
        tag: its name.
    """
    return text[text.index(f"<{tag}>") + len(tag) + 2 : text.rindex(f"</{tag}>")]


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("explainer", "")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    # Style sheets and scripts are taken as they are: their braces are no template's.
    found.globals["source"] = lambda name: Markup(loader.get_source(found, name)[0])
    return found
