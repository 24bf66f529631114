"""How a command ends: errors become one paragraph and an exit code. ``EXPLAINER_DEBUG=1`` shows the traceback instead."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable

from explainer.errors import ExplainerError
from explainer.inference.outputs import reason

_REMEDY = "Check the path, the disk and the permissions of the folder (all of the error: EXPLAINER_DEBUG=1)."
_REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Free some of your quota, or write to another disk.",
    errno.EACCES: "Choose a folder in which you may write.",
    errno.EPERM: "Choose a folder in which you may write.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.ENOTDIR: "A part of the path is a file: choose another path.",
    errno.EISDIR: "Name a file in this folder instead.",
}


def exit_code(function: Callable[[], int]) -> int:
    """Run a command.

    Returns:
        What the command returns; 2 after one of the project's errors or the system's (disk, permissions, odd names); 130 after Ctrl-C.
    """
    _let_every_name_be_printed()
    try:
        code = int(function() or 0)
        _flush()
        return code
    except ExplainerError as error:
        if os.environ.get("EXPLAINER_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`): nothing is wrong, but Python would say so again when it flushes at its end.
        _leave_output()
        return 0
    except OSError as error:
        if os.environ.get("EXPLAINER_DEBUG"):
            raise
        print(f"error: {reason(error)}. {_REMEDIES.get(error.errno or 0, _REMEDY)}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        if os.environ.get("EXPLAINER_DEBUG"):
            raise
        around = error.object[max(0, error.start - 80) : error.end + 40].encode("ascii", "backslashreplace").decode()
        print(f"error: {around!r} cannot be written as {error.encoding}. Rename that file or folder, or write elsewhere.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _let_every_name_be_printed() -> None:
    """Under an ASCII locale a class named in another alphabet is shown by its code points: work that is done does not end in an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is none, and takes every name
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what waits in the output's buffer: a full disk behind `>` is an error too."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _leave_output()
        raise


def _leave_output() -> None:
    """What the buffer still holds goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # an output that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
