"""One process a folder: whoever writes a run, an evaluation or an export says so in a file that others read first.

The file names the process and its machine. It counts as left behind once that process is gone; a process of another machine, which cannot
be asked, gives a sign of life every half minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from explainer.errors import ConfigError
from explainer.files import Owner, write_text

__all__ = ["IN_USE", "claimed", "first_process"]

IN_USE = ".in-use"
_SECONDS_BETWEEN_SIGNS, _SECONDS_UNTIL_GIVEN_UP = 30.0, 600.0


@contextlib.contextmanager
def claimed(folder: str | Path, what: str, restarted: bool = False) -> Iterator[None]:
    """The folder is this process's until the block ends. The same process may claim it again inside.

    Args:
        folder: it is made.
        what: is done there, a command's name.
        restarted: a scheduler has started this command before, so that whoever holds the folder elsewhere is that command's end.

    Raises:
        ConfigError: another process that runs holds it; the message says which.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    file, me, made = folder / IN_USE, str(Owner.this()), not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(folder):
        holder, by = _read(file)
        mine = str(holder) == me
        if not mine and holder is not None and not holder.ended and (holder.here or not (restarted or _silent(file))):
            raise ConfigError(
                f"{folder} is in use: {by} of process {holder.pid} on {holder.host} writes there, and two would destroy each other's "
                f"files. Wait for it, stop it, or name another folder. (If you know that this process is gone, delete {file}.)"
            )
        write_text(file, f"{me}\n{what}\n", durable=False)
    if mine:  # claimed further out, which gives it up
        yield
        return
    over = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(file, over), daemon=True, name="signs of life")
    signs.start()
    try:
        yield
    finally:
        over.set()
        signs.join(5)
        with _turn(folder), contextlib.suppress(OSError):
            if str(_read(file)[0]) == me:
                file.unlink()
            if made:
                folder.rmdir()  # if nothing came of it


def first_process() -> bool:
    """Whether this is the first of the processes of its job, or the only one, as torchrun, Lightning or srun announce it."""
    names = ["RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", *(["SLURM_PROCID"] if "SLURM_JOB_ID" in os.environ else [])]
    return not any(int(os.environ.get(name) or 0) for name in names)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process of this machine at a time reads and writes the file. The lock lies apart, so that nothing is left in the folder."""
    # The user's own: a file of someone else in a shared folder of temporary files may not be opened.
    name = hashlib.sha256(f"{getattr(os, 'getuid', int)()} {folder.absolute().resolve()}".encode()).hexdigest()[:24]
    lock = FileLock(Path(tempfile.gettempdir()) / f"explainer-{name}.lock", timeout=20, mode=0o666)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ConfigError(f"{folder} is in use: another process has been claiming it for 20 s ({error.lock_file}). Try again.") from error


def _read(file: Path) -> tuple[Owner | None, str]:
    """Who holds the folder, and for what; ``(None, "")`` where nobody does."""
    try:
        owner, what, *_ = [*file.read_text(encoding="utf-8").splitlines(), "", ""]
    except (OSError, UnicodeDecodeError):
        return None, ""
    return Owner.of(owner), what or "a command"


def _silent(file: Path) -> bool:
    """Whether a process of another machine has given no sign for long, by the clock of the disk that both write to."""
    probe = file.with_name(f"{IN_USE}-{os.getpid()}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - file.stat().st_mtime > _SECONDS_UNTIL_GIVEN_UP
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _give_signs(file: Path, over: threading.Event) -> None:
    while not over.wait(_SECONDS_BETWEEN_SIGNS):
        with contextlib.suppress(OSError):
            os.utime(file)
