"""From arguments to configurations. Nothing here imports torch: ``--help`` and a typing error are answered at once."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from explainer.config import RunConfig
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig

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


def train_parser(command: str) -> Parser:
    """The options of ``fit``, ``validate``, ``test`` or ``predict``."""
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


def check_configs(argv: Sequence[str]) -> None:
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
    check_configs(rest)
    parser = train_parser(command)
    namespace = parser.parse_args(rest)
    resolved = parser.dump(namespace)
    values = instantiate(parser, namespace)
    once = ("ckpt_path", "overwrite")  # of this command; a saved configuration that repeats them would resume or replace unasked
    config = RunConfig(**{k: v for k, v in vars(values).items() if k not in ("config", *once)})
    resolved = "\n".join(line for line in resolved.splitlines() if not line.startswith(tuple(f"{k}:" for k in once))) + "\n"
    rest_of = Namespace(ckpt_path=values.ckpt_path, overwrite=getattr(values, "overwrite", False), resolved=resolved)
    return command, config, rest_of


def instantiate(parser: Parser, namespace: Namespace) -> Any:
    """The dataclasses; what the parser let through and a dataclass cannot be made of is an error of the configuration too."""
    try:
        return parser.instantiate(namespace)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a section of the configuration has a value of the wrong kind ({error}).") from error


def parse_evaluate(argv: Sequence[str]) -> tuple[EvaluateConfig, str]:
    """``[options...]`` -> (configuration, the resolved configuration as YAML)."""
    rest = list(argv)
    check_configs(rest)
    parser = Parser(prog="evaluate.py", description="Evaluate explainers: methods x images x protocols.", default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(EvaluateConfig, as_group=False)
    namespace = parser.parse_args(rest)
    resolved = parser.dump(namespace)
    values = instantiate(parser, namespace)
    return EvaluateConfig(**{k: v for k, v in vars(values).items() if k != "config"}), resolved
