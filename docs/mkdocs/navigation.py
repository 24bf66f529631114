"""MkDocs hook: every page is in the navigation, by folder, and the pictures of the tests are pictures of the guide."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PICTURES = "tests/pictures"
#: Sections in the order of the navigation, with the folder of their pages.
SECTIONS = {
    "Tutorials": "tutorials",
    "How to": "howto",
    "Explanation": "explanation",
    "Reference": "reference",
    "Results": "results",
}
#: Pages that stand first in their section; the others follow by name.
FIRST = ("tutorials/quickstart.md", "howto/install.md", "howto/train.md", "howto/evaluate.md", "results/shapes.md", "results/street.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, and build the navigation from the pages that are there.

    Args:
        files: pages and pictures that MkDocs found.
        config: the settings; their ``nav`` is set.

    Returns:
        The files, with the pictures.
    """
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    config.nav = navigation([page.src_uri for page in files.documentation_pages()])
    return files


def navigation(pages: list[str]) -> list[str | dict[str, list[str]]]:
    """The navigation of these pages.

    Args:
        pages: paths relative to ``docs``, such as ``howto/train.md``.

    Returns:
        MkDocs' ``nav``: the start page, the sections with their pages, then the remaining pages of the top folder.
    """

    def order(page: str) -> tuple[int, str]:
        return (FIRST.index(page) if page in FIRST else len(FIRST), page)

    nav: list[str | dict[str, list[str]]] = ["index.md"]
    for title, folder in SECTIONS.items():
        if inside := sorted((p for p in pages if PurePosixPath(p).parts[0] == folder), key=order):
            nav.append({title: inside})
    return nav + sorted(p for p in pages if "/" not in p and p != "index.md")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point pictures, which pages name by their place in the repository, to where the guide has them."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"](../{up}{PICTURES}/", f"]({up}pictures/")
