"""One atomic writer: old or new, never a part; what the dead left is cleared, what the living write is not."""

import ast
import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from explainer import files
from explainer.files import Owner, clear_leftovers, partial_folder, replacing, second_name, shortened, write_json, write_text

PACKAGE = Path(files.__file__).parent


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_place_holds_the_old_or_the_new_text(tmp_path):
    path = tmp_path / "new/a.json"
    write_text(path, "first \u00e4\u4e2d")
    assert path.read_bytes().decode("utf-8") == "first \u00e4\u4e2d"
    with pytest.raises(ZeroDivisionError), replacing(path) as stream:
        stream.write(b"half")
        stream.flush()
        assert path.read_text(encoding="utf-8").startswith("first")
        assert len(names(path.parent)) == 2
        1 / 0  # noqa: B018
    assert names(path.parent) == ["a.json"] and path.read_text(encoding="utf-8").startswith("first")
    write_text(path, "second", durable=False)
    assert path.read_text(encoding="utf-8") == "second"


def test_bytes_are_durable_before_they_take_the_place(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: seen.append((tmp_path / "a").exists()))
    write_text(tmp_path / "a", "x")
    assert seen == [False, True], "the file before it is renamed, the folder after"


def _write_half(path, started):
    with replacing(path) as stream:
        stream.write(b"x" * 1000)
        stream.flush()
        with partial_folder(Path(path).parent) as folder:
            (folder / "model.bin").write_bytes(b"y" * 1000)
            started.set()
            time.sleep(60)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, signum):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_write_half, args=(tmp_path / "shard-7.npz", started))
    process.start()
    assert started.wait(20)
    assert clear_leftovers(tmp_path) == [], "it is being written"
    assert len(names(tmp_path)) == 2
    os.kill(process.pid, signum)
    process.join(20)
    assert len(names(tmp_path)) == 2, "the test proves nothing"
    write_text(tmp_path / "other.json", "{}")
    assert names(tmp_path) == ["other.json"]


def test_the_owner_of_a_used_number_is_another(monkeypatch):
    me = Owner.this()
    assert str(Owner.of(str(me))) == str(me) and me.here and not me.ended
    assert Owner("elsewhere", me.pid, me.start).ended is False, "another machine's processes cannot be asked"
    if me.start:
        assert Owner(me.host, me.pid, me.start - 1).ended, "the number was given again"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert Owner(me.host, dead.pid, 1).ended
    for words in ("", "a", "host~x~1", "host~1", "a~1~2~3"):
        assert Owner.of(words) is None


def test_other_files_stay(tmp_path):
    me = Owner.this()
    keep = [".hidden.tmp", "plain.tmp", f".a~{me}~12345678.tmp", ".a~other-host~1~1~12345678.tmp", ".a~b~c~d.tmp"]
    for name in keep:
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert clear_leftovers(tmp_path) == []
    long_ago = time.time() - 2 * 86_400
    os.utime(tmp_path / keep[3], (long_ago, long_ago))
    assert [p.name for p in clear_leftovers(tmp_path)] == [keep[3]], "nobody has written to it for two days"
    assert clear_leftovers(tmp_path / "none") == []


def test_a_second_name_without_hard_links_is_a_copy(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "1")
    second_name(tmp_path / "a", tmp_path / "b")
    write_text(tmp_path / "a", "2")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "1"
    monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    second_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "2" and names(tmp_path) == ["a", "b"]


def test_a_full_disk_is_said_with_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"), replacing(tmp_path / "a.json") as stream:
        stream.write(b"1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_names_of_any_length_are_written(tmp_path):
    """Of 255 bytes, and in an alphabet that takes three a character."""
    for name in ("x" * 255, "\u732b" * 85):
        write_text(tmp_path / name, "1")
        second_name(tmp_path / name, tmp_path / f"{name[:-1]}y")
    assert len(names(tmp_path)) == 4
    assert shortened("\u732b.png", 80) == "\u732b.png"
    one, other = (shortened("\u732b" * 100 + end, 80) for end in ("a", "b"))
    assert one != other and len(one.encode()) <= 80 and one.startswith("\u732b" * 23)


def test_json_is_what_others_can_read(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [1, (math.inf, "x")], 3: {"c": -math.inf, "d": 0.5}})
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1, [None, "x"]], "3": {"c": None, "d": 0.5}}


def test_every_read_and_write_names_its_encoding():
    """Under an ASCII locale Python would take ASCII, and a class named in another alphabet would end the run."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and not _encoded(node):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


def _encoded(call):
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    keywords = {k.arg for k in call.keywords}
    if name in ("read_text", "write_text"):
        ours = isinstance(function, ast.Name)  # explainer.files.write_text writes UTF-8
        return ours or "encoding" in keywords or (name == "read_text" and bool(call.args))
    if name == "open" and (isinstance(function, ast.Name) or _opens_path(function)):
        mode = next((a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "r")
        return "b" in mode or "encoding" in keywords
    return True


def _opens_path(function):
    """Whether ``x.open`` is of a path: images, formats and the system's own open have other arguments."""
    owner = function.value
    return getattr(owner, "id", getattr(owner, "attr", "")) not in ("Image", "os", "form", "webbrowser", "zipfile", "tarfile")


def test_every_writer_is_the_atomic_one():
    """Renames and hand-made temporary names belong to one module; sets that are put aside are renamed whole."""
    allowed = {"files.py", "attribution/map_cache.py", "tasks/run_folder.py", "export/exporting.py"}
    found = {
        str(p.relative_to(PACKAGE))
        for p in PACKAGE.rglob("*.py")
        if ".replace(path" in (text := p.read_text(encoding="utf-8")) or '.tmp"' in text or "os.replace" in text
    }
    assert found <= allowed, found - allowed
    written = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _replaces_in_place(node) and path.name != "files.py"
    ]
    assert written == []


def _replaces_in_place(call):
    """``path.write_text(...)``, a file opened for writing, ``x.save(path)`` or ``save_file``: what was there is lost at once."""
    if not isinstance(call.func, ast.Attribute):
        return call.func.id == "save_file" if isinstance(call.func, ast.Name) else False
    if call.func.attr in ("save", "savez", "savez_compressed") and call.args:
        places = [node.id for argument in call.args[:2] for node in ast.walk(argument) if isinstance(node, ast.Name)]
        return "path" in places or "out" in places
    mode = next((a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "r")
    return call.func.attr == "write_text" or (call.func.attr == "open" and _opens_path(call.func) and mode[0] in "wx")
