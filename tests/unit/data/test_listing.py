"""Which files of a folder are anyone's images."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from explainer.data.listing import image_files, printable, subfolders
from explainer.errors import DatasetNotFoundError
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


def test_a_folder_that_links_to_itself_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "a" / "broken.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "a" / "circle.png").symlink_to(tmp_path / "a" / "circle.png")
    with caplog.at_level("WARNING"):
        assert [p.name for p in image_files(tmp_path)] == ["x.png"]
    assert "2 image(s)" in caplog.text and "lead nowhere" in caplog.text and "broken.png" in caplog.text


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"x")
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith(("b", ".hidden")):  # as the system does to anyone but root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetNotFoundError, match=r"/b cannot be read \(Permission denied\): its images would be missing"):
        image_files(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert [p.parent.name for p in image_files(tmp_path)] == ["a", "c"], "hidden folders do not matter"


def test_photographs_in_formats_that_are_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "b.HEIC", "c.heic", "d.nef", "notes.txt", "masks.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in image_files(tmp_path)] == ["a.jpg"]
    assert f"3 photograph(s) in {tmp_path} are in formats that are not read (.heic, .nef), the first {tmp_path}/b.HEIC" in caplog.text
