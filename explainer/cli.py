"""The command line ``explainer COMMAND``. The commands are the modules of :mod:`explainer.commands`; importing them imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from explainer.commands import (
    bench,
    calibrate,
    channels,
    concepts,
    data,
    evaluate,
    explain,
    export,
    maps,
    methods,
    overlay,
    randomize,
    report,
    reproduce,
    serve,
    srd,
    train,
)
from explainer.commands.failures import exit_code
from explainer.commands.memory import keep_memory
from explainer.commands.parsing import Command, Group, parse

#: The commands in the order in which ``--help`` lists them.
COMMANDS: dict[str, Command | Group] = {
    **train.COMMANDS,
    "evaluate": evaluate.COMMAND,
    "report": report.COMMAND,
    "reproduce": reproduce.COMMAND,
    "calibrate": calibrate.COMMAND,
    "maps": maps.COMMAND,
    "randomize": randomize.COMMAND,
    "methods": methods.COMMAND,
    "concepts": concepts.GROUP,
    "data": data.GROUP,
    "explain": explain.COMMAND,
    "export": export.COMMAND,
    "serve": serve.COMMAND,
    "overlay": overlay.COMMAND,
    "srd": srd.COMMAND,
    "channels": channels.COMMAND,
    "bench": bench.COMMAND,
}


def main(
    argv: Sequence[str] | None = None,
    commands: Mapping[str, Command | Group] = COMMANDS,
    prog: str = "explainer",
    own_process: bool | None = None,
) -> int:
    """The console command ``explainer``; ``train.py`` and ``evaluate.py`` call it with the commands that they know.

    Args:
        argv: arguments behind the program's name; None takes the process's.
        commands: the commands that may be called.
        prog: the program's name in help texts.
        own_process: whether this process is the command's own, which then keeps its memory (:mod:`explainer.commands.memory`). None: if
            ``argv`` is None.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if argv is None if own_process is None else own_process:
        keep_memory()

    def run() -> int:
        command, parser, options = parse(commands, arguments, prog)
        return command.run(parser, options)

    return exit_code(run)
