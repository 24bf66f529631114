"""The command line: argument parsing only. Nothing heavy is imported until the arguments are known to be good.

``train.py`` takes ``fit | validate | test | predict``; the console command ``explainer`` adds ``evaluate``, ``explain``, ``export`` and
others. The surface is LightningCLI's (jsonargparse): ``--config``, dotted overrides, ``--print_config``, ``--ckpt_path``.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from explainer.commands import randomise as randomise_command
from explainer.commands import report as report_commands
from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.exporting import bench_command, explain_command, export_command
from explainer.commands.look import overlay_command, serve_command
from explainer.commands.maps_config import MapsConfig
from explainer.config import RunConfig
from explainer.errors import ConfigError, ExplainerError
from explainer.evaluation.config import EvaluateConfig
from explainer.inference.outputs import reason, writable_folder

TRAIN_COMMANDS = {
    "fit": "train; resume with --ckpt_path last (or auto: if there is one)",
    "validate": "losses and metrics on the validation split",
    "test": "losses and metrics on the test split",
    "predict": "write masks (or logits) of a split as .npz",
}


class Parser(ArgumentParser):
    """jsonargparse's parser with errors of one paragraph."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and the nearest known option, without pages of usage."""
        text = " ".join(str(message).split())
        found = re.search(r"(?:accept option|key|unrecognized arguments:|option) ['\"]?(?:--)?([\w.]+)", text, re.IGNORECASE)
        known = [a.dest for a in self._actions if a.dest != "help"]
        if found:
            close = difflib.get_close_matches(found.group(1), known, n=1, cutoff=0.75)
            if close and close[0] != found.group(1):
                text += f" Did you mean {close[0]}?"
        raise ConfigError(f"{text}\nSee all options with: {Path(sys.argv[0]).name} {self._command} --help")

    _command = ""


def _train_parser(command: str) -> Parser:
    parser = Parser(prog=f"train.py {command}", description=TRAIN_COMMANDS.get(command, ""), default_env=False)
    parser._command = command
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(RunConfig, as_group=False)
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="checkpoint: last, best, auto (last if there is one) or a path (fit: resume from it)",
    )
    if command == "fit":
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the run that run_dir holds")
    return parser


def _exists(argv: Sequence[str]) -> None:
    """A missing configuration file is answered before jsonargparse mistakes its name for YAML."""
    values = list(argv)
    for flag, value in zip(values, [*values[1:], ""], strict=True):
        path = value if flag == "--config" else flag.removeprefix("--config=") if flag.startswith("--config=") else None
        if path is not None and not Path(path).is_file():
            folder = Path(path).parent
            near = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
            raise ConfigError(
                f"configuration {path} does not exist." + (f" In {folder}: {', '.join(near)}." if near else " Check the path.")
            )
        if path is not None:
            _readable(Path(path))


def _readable(path: Path) -> None:
    """A file that is no text, or a number too long to read, would end in an error from inside the YAML reader."""
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read as text ({error}).") from error


def parse_run(argv: Sequence[str]) -> tuple[str, RunConfig, Namespace]:
    """``[command, options...]`` -> (command, configuration, namespace with ckpt_path, overwrite and the YAML text as ``resolved``)."""
    if not argv or argv[0] not in TRAIN_COMMANDS:
        listing = "\n".join(f"  {name:10} {text}" for name, text in TRAIN_COMMANDS.items())
        if argv and argv[0] in ("-h", "--help"):
            print(
                f"usage: train.py COMMAND --config FILE [--option value ...]\n\ncommands:\n{listing}\n\n"
                "train.py COMMAND --help lists all options."
            )
            raise SystemExit(0)
        got = f"received {argv[0]!r}" if argv else "received none"
        raise ConfigError(f"the first argument must be one of the commands ({got}):\n{listing}")
    command, rest = argv[0], list(argv[1:])
    _exists(rest)
    parser = _train_parser(command)
    namespace = parser.parse_args(rest)
    resolved = parser.dump(namespace)
    values = _instantiate(parser, namespace)
    once = ("ckpt_path", "overwrite")  # of this command; a saved configuration that repeats them would resume or replace unasked
    config = RunConfig(**{k: v for k, v in vars(values).items() if k not in ("config", *once)})
    resolved = "\n".join(line for line in resolved.splitlines() if not line.startswith(tuple(f"{k}:" for k in once))) + "\n"
    rest_of = Namespace(ckpt_path=values.ckpt_path, overwrite=getattr(values, "overwrite", False), resolved=resolved)
    return command, config, rest_of


def _instantiate(parser: Parser, namespace: Namespace) -> Any:
    """The dataclasses; what the parser let through and a dataclass cannot be made of is an error of the configuration too."""
    try:
        return parser.instantiate(namespace)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a section of the configuration has a value of the wrong kind ({error}).") from error


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
    from explainer.commands.fit import run

    return run(command, config, rest.ckpt_path, rest.resolved, rest.overwrite)


def train(argv: Sequence[str] | None = None) -> int:
    """``train.py``: returns the exit code."""
    return _guarded(_train, sys.argv[1:] if argv is None else argv)


def parse_evaluate(argv: Sequence[str]) -> tuple[EvaluateConfig, str]:
    """``[options...]`` -> (configuration, the resolved configuration as YAML)."""
    rest = list(argv)
    _exists(rest)
    parser = Parser(prog="evaluate.py", description="Evaluate explainers: methods x images x protocols.", default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(EvaluateConfig, as_group=False)
    namespace = parser.parse_args(rest)
    resolved = parser.dump(namespace)
    values = _instantiate(parser, namespace)
    return EvaluateConfig(**{k: v for k, v in vars(values).items() if k != "config"}), resolved


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
    _exists(rest)
    parser = Parser(prog="explainer maps", description="Fill a map cache: one method, one split.", default_env=False)
    parser._command = "maps"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(MapsConfig, as_group=False)
    values = _instantiate(parser, parser.parse_args(rest))
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
    _exists(rest)
    parser = Parser(prog="explainer calibrate", description="Calibrate selective explanation on labelled images.", default_env=False)
    parser._command = "calibrate"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(CalibrateConfig, as_group=False)
    values = _instantiate(parser, parser.parse_args(rest))
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
