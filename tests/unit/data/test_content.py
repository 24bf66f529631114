"""Fingerprints follow the bytes of the files: the same size or the same time is no excuse."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest

from explainer import plugins
from explainer.data import content
from explainer.data.content import MISSING, content_digests
from tests.factories import dataset_options


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPLAINER_CACHE", str(tmp_path / "memory"))
    monkeypatch.setattr(content, "_SETTLED_NS", 0)
    return tmp_path / "memory" / "content.sqlite"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    original = content._digest
    monkeypatch.setattr(content, "_digest", lambda path: (read.append(path), original(path))[1])
    return read


def test_digests_are_of_the_bytes_and_remembered(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    expected = hashlib.blake2b(b"one", digest_size=16).hexdigest()
    read = count_reads(monkeypatch)
    assert content_digests([a, b, tmp_path / "none"]) == [expected, expected, MISSING] and sorted(read) == [a, b]
    assert content_digests([b, a]) == [expected, expected] and len(read) == 2, "both were known"
    os.utime(a, ns=(1, 1))  # the time alone: read again, same answer
    assert content_digests([a, b]) == [expected, expected] and read[2:] == [a]
    assert str(a).encode() not in memory.read_bytes(), "the memory holds no paths"


def test_equal_size_and_restored_time_do_not_hide_a_change(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    stamp = path.stat()
    before = content_digests([path])
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns and path.stat().st_size == stamp.st_size
    assert content_digests([path]) != before


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", 3_600_000_000_000)
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    content_digests([path])
    assert not memory.exists()


@pytest.mark.parametrize("bad", [b"", b"not a database" * 100, "other table", "nonsense inside"])
def test_a_damaged_memory_costs_time_and_nothing_else(tmp_path: Path, memory: Path, bad: bytes | str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    expected = hashlib.blake2b(b"one", digest_size=16).hexdigest()
    memory.parent.mkdir()
    if isinstance(bad, bytes):
        memory.write_bytes(bad)
    else:
        with sqlite3.connect(memory) as file:
            columns = "key BLOB PRIMARY KEY, other TEXT" if bad == "other table" else "key BLOB PRIMARY KEY, stamp TEXT, digest TEXT"
            file.execute(f"CREATE TABLE content ({columns})")
            if bad == "nonsense inside":
                key = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).digest()
                file.execute("INSERT INTO content VALUES (?, ?, ?)", (key, content._stamp(path), 7))
    time.sleep(0.01)
    assert content_digests([path]) == [expected]
    assert content_digests([path]) == [expected]
    with sqlite3.connect(memory) as file:
        assert file.execute("SELECT digest FROM content").fetchall() == [(expected,)], "it was written anew"


def test_a_memory_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("EXPLAINER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(content, "_SETTLED_NS", 0)
    assert content_digests([tmp_path / "file"]) == [hashlib.blake2b(b"x", digest_size=16).hexdigest()]


def test_an_account_without_a_home_has_a_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number."""
    for name in ("EXPLAINER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", str)  # which leaves a ~ that it cannot replace
    assert content.memory_file().parent.parent.parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("name", ["voc", "cub", "image_folder", "csv"])
def test_fingerprints_see_a_file_of_equal_size(name: str, kind: str, tmp_path: Path) -> None:
    options = dataset_options(name, tmp_path / "data")

    def build() -> object:
        return plugins.build("explainer.data", name, split="train", size=16, **options)

    data = build()
    path = getattr(data.records[0], kind)
    before, size = data.fingerprint(), path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert path.stat().st_size == size and build().fingerprint() != before


def test_fingerprints_see_the_annotations_of_coco_and_the_boxes_of_voc(tmp_path: Path) -> None:
    for name, pattern, old, new in (
        ("coco", "annotations/instances_train2014.json", '"iscrowd": 0', '"iscrowd": 1'),
        ("voc", "VOCdevkit/VOC2007/Annotations/000001.xml", "<xmin>1</xmin>", "<xmin>0</xmin>"),
    ):
        options = dataset_options(name, tmp_path / name)
        before = plugins.build("explainer.data", name, split="train", size=16, **options).fingerprint()
        path = tmp_path / name / pattern
        text = path.read_text()
        if name == "voc":
            old = text[text.index("<xmax>") : text.index("</xmax>")]
            new = "<xmax>" + str(int(old[6:]) - 1)
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert plugins.build("explainer.data", name, split="train", size=16, **options).fingerprint() != before, name
