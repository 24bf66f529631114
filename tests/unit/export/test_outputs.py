"""Results that cannot be written: said before the work where it can be known, and in one paragraph where it cannot."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from explainer import cli
from explainer.commands.parsing import Command
from explainer.errors import ConfigError
from explainer.files import write_text
from explainer.inference.outputs import writable_file, writable_folder


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A path below a file."""
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "below"


def test_folders_and_files_that_can_be_written_are_not_made(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and writable_file(tmp_path / "a" / "c.json")
    assert list(tmp_path.iterdir()) == []


def test_others_are_refused(blocked: Path, tmp_path: Path) -> None:
    for path in (blocked, blocked.parent):
        with pytest.raises(ConfigError, match=r"--out .* cannot be written \(not a folder: .*file\)"):
            writable_folder(path)
    with pytest.raises(ConfigError, match="not a folder"):
        writable_file(blocked)
    with pytest.raises(ConfigError, match=r"is a folder\. Name a file in it"):
        writable_file(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "absent.ckpt", "absent", "--out", "{out}"],
        ["export", "absent.ckpt", "--out", "{out}"],
        ["bench", "absent.onnx", "--out", "{out}"],
        ["overlay", "absent", "--classifier", "absent.ckpt", "--out", "{out}.html"],
        ["calibrate", "--model", "absent.ckpt", "--out", "{out}"],
        ["evaluate", "--out", "{out}"],
        ["maps", "--cache.folder", "{out}"],
        ["randomize", "absent.ckpt", "--out", "{out}.ckpt"],
        ["report", "absent", "--out", "{out}.html"],
        ["data", "check", ".", "--out", "{out}"],
        ["reproduce", "voc2007_vgg16", "--out", "{out}.html"],
        ["concepts", "fit", "--layers", "[absent]", "--out", "{out}"],
        ["concepts", "report", "absent", "--out", "{out}.html"],
    ],
    ids=lambda arguments: "-".join(arguments[:2]) if arguments[1] in ("check", "fit", "report") else arguments[0],
)
def test_every_command_asks_before_it_works(blocked: Path, arguments: list[str], capsys: Any) -> None:
    """Nothing that is named exists, so that any work would fail with other words."""
    assert cli.main([a.format(out=blocked) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "not a folder" in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x.png"), "No space left on device: out/x.png. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "Permission denied: out. Choose a folder in which you may write"),
        (OSError("odd"), "odd. Check the path"),
    ],
)
def test_errors_of_the_system_are_one_paragraph(monkeypatch: pytest.MonkeyPatch, capsys: Any, error: OSError, words: str) -> None:
    def fails(*_: Any) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "report", Command("", lambda _: None, fails))
    assert cli.main(["report"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {words}") and "Traceback" not in printed and printed.count("\n") == 1
    monkeypatch.setenv("EXPLAINER_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["report"])


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from explainer import cli\n"
        "from explainer.commands.parsing import Command\n"
        "cli.COMMANDS['report'] = Command('', lambda p: None, lambda *_: [print('x' * 1000) for _ in range(1000)] and 0)\n"
        "sys.exit(cli.main(['report']))"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


def test_a_full_disk_behind_the_output_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`explainer report > /full/disk`: the words wait in a buffer until the end."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "report", Command("", lambda _: None, lambda *_: 0))
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err.startswith("error: No space left on device")


def test_an_ascii_output_shows_every_name(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0`: what is done is not undone by the last line that is printed."""
    output = io.TextIOWrapper(written := io.BytesIO(), encoding="ascii", errors="surrogateescape")
    monkeypatch.setitem(cli.COMMANDS, "report", Command("", lambda _: None, lambda *_: print("\u043a\u043e\u0442: 0.5") or 0))
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main(["report"]) == 0, capsys.readouterr().err
    assert written.getvalue() == b"\\u043a\\u043e\\u0442: 0.5\n"


def test_names_that_are_not_utf8_end_in_words(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(
        cli.COMMANDS, "report", Command("", lambda _: None, lambda *_: write_text(tmp_path / "x", "run_dir: caf\udce9") or 0)
    )
    assert cli.main(["report"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "udce9' cannot be written as utf-8. Rename" in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())
