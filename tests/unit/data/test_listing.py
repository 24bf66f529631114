"""Which files of a folder are anyone's images."""

from __future__ import annotations

import os
from pathlib import Path

from explainer.data.listing import image_files, printable, subfolders
from explainer.inference.pictures import find_pictures


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    root = tmp_path / ".above" / "photos"
    good = ["a.JPG", "deep/b.png", "deep/er/c.webp"]
    junk = [
        ".x.png",
        "._a.jpg",
        "@eaDir/a.jpg",
        "deep/.ipynb_checkpoints/b.png",
        "__MACOSX/a.jpg",
        "Thumbs.db",
        "notes.txt",
        "$RECYCLE.BIN/d.png",
    ]
    for name in (*good, *junk):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "folder.png").mkdir()
    assert [p.relative_to(root).as_posix() for p in image_files(root)] == good
    assert subfolders(root) == ["deep", "folder.png"]
    assert list(find_pictures([root])) == good
    assert list(find_pictures([root, root / "a.JPG", root / ".x.png"])) == [*good, ".x.png"], "a file that is named is meant"


def test_names_become_text_that_can_be_written(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    path.write_bytes(b"x")
    assert printable(path.name) == r"caf\xe9.png" and list(find_pictures([tmp_path])) == [r"caf\xe9.png"]
    assert list(find_pictures([tmp_path]).values()) == [path] and list(find_pictures([path])) == [r"caf\xe9.png"]
    assert printable("größe/x.png") == "größe/x.png"


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "a" / "broken.png").symlink_to(tmp_path / "none.png")
    assert [p.name for p in image_files(tmp_path)] == ["x.png"]
