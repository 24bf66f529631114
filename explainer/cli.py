"""The command line: argument parsing only. Nothing heavy is imported until the arguments are known to be good.

``train.py`` takes ``fit | validate | test | predict``; the console command ``explainer`` adds ``evaluate``, ``explain``, ``export`` and
others. The surface is LightningCLI's (jsonargparse): ``--config``, dotted overrides, ``--print_config``, ``--ckpt_path``.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile

from explainer.commands import concepts as concepts_command
from explainer.commands import randomise as randomise_command
from explainer.commands import report as report_commands
from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.exporting import bench_command, explain_command, export_command
from explainer.commands.look import overlay_command, serve_command
from explainer.commands.maps_config import MapsConfig
from explainer.commands.parsing import TRAIN_COMMANDS, Parser, check_configs, instantiate, parse_evaluate, parse_run
from explainer.errors import ConfigError, ExplainerError
from explainer.inference.outputs import reason, writable_folder

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


def _guarded(function: Any, argv: Sequence[str]) -> int:
    """Run a command; the project's own errors and the system's (disk, permissions) become one paragraph and exit code 2."""
    try:
        return int(function(argv) or 0)
    except ExplainerError as error:
        if os.environ.get("EXPLAINER_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`): nothing is wrong, but Python would say so again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("EXPLAINER_DEBUG"):
            raise
        print(f"error: {reason(error)}. {_REMEDIES.get(error.errno or 0, _REMEDY)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(argv: Sequence[str]) -> int:
    command, config, rest = parse_run(argv)
    if command == "fit":
        from explainer.commands.fit import FitRequest, fit

        return fit(FitRequest(config, rest.ckpt_path, rest.resolved, rest.overwrite))
    from explainer.commands.validate import run

    return run(command, config, rest.ckpt_path)


def train(argv: Sequence[str] | None = None) -> int:
    """``train.py``: returns the exit code."""
    return _guarded(_train, sys.argv[1:] if argv is None else argv)


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate; raises the project's errors (``evaluate_main`` prints them)."""
    config, resolved = parse_evaluate(argv)
    writable_folder(config.out)
    from explainer.commands.evaluate import run

    return run(config, resolved)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """``evaluate.py``: returns the exit code."""
    return _guarded(evaluate, sys.argv[1:] if argv is None else argv)


def parse_maps(argv: Sequence[str]) -> MapsConfig:
    """``[options...]`` -> the configuration of ``explainer maps``."""
    rest = list(argv)
    check_configs(rest)
    parser = Parser(prog="explainer maps", description="Fill a map cache: one method, one split.", default_env=False)
    parser._command = "maps"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(MapsConfig, as_group=False)
    values = instantiate(parser, parser.parse_args(rest))
    return MapsConfig(**{k: v for k, v in vars(values).items() if k != "config"})


def maps_command(argv: Sequence[str]) -> int:
    """Fill a map cache."""
    config = parse_maps(argv)
    if config.cache.folder is not None:
        writable_folder(config.cache.folder, "--cache.folder")
    from explainer.commands.maps import run

    return run(config)


def calibrate_command(argv: Sequence[str]) -> int:
    """Choose the quality score from which explanations are given."""
    rest = list(argv)
    check_configs(rest)
    parser = Parser(prog="explainer calibrate", description="Calibrate selective explanation on labelled images.", default_env=False)
    parser._command = "calibrate"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(CalibrateConfig, as_group=False)
    values = instantiate(parser, parser.parse_args(rest))
    config = CalibrateConfig(**{k: v for k, v in vars(values).items() if k != "config"})
    from explainer.commands.calibrate import run

    return run(config)


def _train_command(name: str) -> Callable[[Sequence[str]], int]:
    return lambda argv: _train([name, *argv])


def _methods(argv: Sequence[str]) -> int:
    from explainer.baselines.overview import markdown

    print(markdown())
    return 0


#: Subcommands of ``explainer``: what it does, and a function of the arguments after its name. The functions import what they need.
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    **{name: (text, _train_command(name)) for name, text in TRAIN_COMMANDS.items()},
    "evaluate": ("methods x images x protocols -> tables with intervals", evaluate),
    "report": (report_commands.SUMMARY, report_commands.main),
    "calibrate": ("quality score from which explanations are given, with a guarantee", calibrate_command),
    "maps": ("maps of one method over a split, kept for evaluation and distillation", maps_command),
    "randomise": (randomise_command.SUMMARY, randomise_command.main),
    "concepts": (concepts_command.SUMMARY, concepts_command.main),
    "methods": ("all per-image methods with what each needs and costs", _methods),
    "explain": ("class masks, overlays and numbers for images and folders", explain_command),
    "export": ("safetensors, ONNX, torch.export or OpenVINO, checked against the network", export_command),
    "serve": ("a local web page: drop an image, look at the masks of its classes", serve_command),
    "overlay": ("a page on which a patch shows how similar a layer finds all other patches", overlay_command),
    "bench": ("latency, throughput and memory of exported models and of the classifier", bench_command),
}


def _command(argv: Sequence[str]) -> int:
    listing = "\n".join(f"  {name:10} {text}" for name, (text, _) in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: explainer COMMAND [--option value ...]\n\ncommands:\n{listing}\n\nexplainer COMMAND --help lists all options.")
        return 0
    if argv and argv[0] == "--version":
        from explainer import __version__

        print(__version__)
        return 0
    if not argv or argv[0] not in COMMANDS:
        got = f"received {argv[0]!r}" if argv else "received none"
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1) if argv else []
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"the first argument must be one of the commands ({got}).{hint}\n{listing}")
    return COMMANDS[argv[0]][1](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The console command ``explainer``: returns the exit code."""
    return _guarded(_command, sys.argv[1:] if argv is None else argv)
