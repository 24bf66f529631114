"""From arguments to configurations: one parser with a sub-command for each command. Nothing here imports torch.

Each module of this package that is a command declares a :class:`Command`. :func:`parse` builds the parser of ``explainer``; the options
of a command are declared only when it is the one that was called, so ``--help`` stays fast.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from explainer.config import RunConfig
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig
from explainer.vocabulary import FORMER, todays

C = TypeVar("C")


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help without the address of a function where that is the kind of value, and without a second default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        if inspect.isfunction(action.type):
            text = re.sub(r"type: %\(type\)s(, )?", "", text)
        if "default: " in (action.help or ""):
            text = re.sub(r"(, )?default: %\(default\)s\)$", ")", text)
        return text.removesuffix(" ()")


class Parser(ArgumentParser):
    """jsonargparse's parser with errors of one paragraph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`ConfigError` with what is wrong and the nearest known option, without pages of usage."""
        text = _brief(" ".join(str(message).split()))
        if text.startswith("the following arguments are required: "):
            start, _, missing = text.partition(": ")
            flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
            text = f"{start}: {', '.join(flags.get(name, name) for name in missing.split(', '))}"
        pattern = r"(?:accept option|key|unrecognized arguments:|option) ['\"]?(?:--)?([\w.-]+)"
        if found := re.search(pattern, text, re.IGNORECASE):
            wrong = found.group(1).replace("-", "_")
            known = [a.dest for a in self._actions if a.dest != "help"]
            close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.75)
            if close and close[0] != wrong:
                text += f" Did you mean --{close[0]}?"
        program = self.prog.replace(" [options]", "")
        raise ConfigError(f"{text}\nSee all options with: {program} --help")


def _brief(text: str, word: int = 200, whole: int = 3000) -> str:
    """The message with long values cut, which it may quote whole: a file's content in the place of an option, for example."""
    text = re.sub(rf"\S{{{word + 1},}}", lambda found: f"{found[0][: word // 2]}... ({len(found[0])} characters)", text)
    return text if len(text) <= whole else f"{text[: whole // 2]} ... {text[-whole // 2 :]}"


@dataclass(frozen=True)
class Command:
    """A sub-command of ``explainer``.

    Attributes:
        summary: one line for the list of commands; it also heads the command's own ``--help``.
        add_options: declares the command's options on a parser.
        run: does the work. It receives the command's parser and its parsed options and returns the exit code.
    """

    summary: str
    add_options: Callable[[Parser], None]
    run: Callable[[Parser, Namespace], int]


@dataclass(frozen=True)
class Group:
    """A name that several commands share, as in ``explainer concepts fit``.

    Attributes:
        summary: one line for the list of commands.
        commands: the commands behind the shared name.
    """

    summary: str
    commands: Mapping[str, Command | Group]


def command_parser(command: Command, prog: str) -> Parser:
    """The parser of one command with all its options.

    Args:
        command: the command.
        prog: what the user typed before the options, for example ``explainer fit``.
    """
    parser = Parser(prog=prog, description=f"{command.summary[:1].upper()}{command.summary[1:]}.", default_env=False)
    command.add_options(parser)
    return parser


def parse(commands: Mapping[str, Command | Group], argv: Sequence[str], prog: str = "explainer") -> tuple[Command, Parser, Namespace]:
    """Find the command and parse its options.

    Args:
        commands: all commands by name.
        argv: what stands behind the program's name.
        prog: the program's name.

    Returns:
        The command, its parser, and its options.

    Raises:
        ConfigError: no such command or option, or a value of the wrong kind.
    """
    argv = [todays(word, commands) for word in argv[:1]] + list(argv[1:])
    called = next((word for word in argv if not word.startswith("-")), None)
    if called not in commands and not {"-h", "--help", "--version"} & set(argv):
        listing = "\n".join(f"  {name:10} {c.summary}" for name, c in commands.items())
        close = difflib.get_close_matches(called, commands, n=1) if called else []
        hint = f" Did you mean {close[0]}?" if close else ""
        got = f"received {called!r}" if called else "received none"
        raise ConfigError(f"the first argument behind {prog} must be one of the commands ({got}).{hint}\n{listing}")
    if called is not None and argv[0] == called:
        command = commands[called]
        if isinstance(command, Group):
            return parse(command.commands, argv[1:], f"{prog} {called}")
        # Its own parser and not the root, whose messages would name the options as `fit.seed`.
        parser = command_parser(command, f"{prog} {called}")
        rest = with_underscores(parser, argv[1:])
        check_configs(rest)
        return command, parser, parser.parse_args(rest)
    _root_parser(commands, prog).parse_args(list(argv))  # --help and --version end the process
    raise ConfigError(f"options stand behind the command: {prog} {called or 'COMMAND'} [options].")


def _root_parser(commands: Mapping[str, Command | Group], prog: str) -> Parser:
    from explainer import __version__

    text = "Train an Explainer for a classifier, evaluate explanations, export and use them."
    root = Parser(prog=prog, description=text, version=__version__, default_env=False)
    added = root.add_subcommands(dest="command", metavar="COMMAND", title="commands", description="COMMAND --help lists its options.")
    for name, command in commands.items():
        added.add_subcommand(name, Parser(prog=f"{prog} {name}", default_env=False), help=command.summary)
    return root


def with_underscores(parser: Parser, argv: Sequence[str]) -> list[str]:
    """Replace options in an old spelling by today's: ``--batch-size``, which version 0.1 accepted, with a note, and ``--licence``."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    changed: dict[str, str] = {}
    result = []
    for word in argv:
        flag, equals, value = word.partition("=")
        underscored = flag[2:].replace("-", "_")
        today = "--" + FORMER.get(underscored, underscored)
        if flag.startswith("--") and flag not in known and today in known:
            if "-" in flag[2:]:
                changed[flag] = today
            word = f"{today}{equals}{value}"
        result.append(word)
    if changed:
        listing = ", ".join(f"{new} (instead of {old})" for old, new in changed.items())
        print(f"note: options are spelled with underscores: {listing}. Version 0.3 will refuse dashes.", file=sys.stderr)
    return result


def check_configs(argv: Sequence[str]) -> None:
    """Answer a missing or unreadable configuration file before jsonargparse mistakes its name for YAML.

    Raises:
        ConfigError: a file behind ``--config`` does not exist or is no text.
    """
    values = list(argv)
    for flag, value in zip(values, [*values[1:], ""], strict=False):
        path = value if flag == "--config" else flag.removeprefix("--config=") if flag.startswith("--config=") else None
        if path is not None:
            _check_config(Path(path))


def _check_config(path: Path) -> None:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        remedy = f"In {path.parent}: {', '.join(near)}." if near else "Check the path."
        raise ConfigError(f"configuration {path} does not exist. {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read as text ({error}).") from error
    with contextlib.suppress(yaml.YAMLError, RecursionError):  # jsonargparse says what is wrong with it
        _require_unique_keys(path, yaml.compose(text, yaml.SafeLoader))


def _require_unique_keys(path: Path, root: yaml.Node | None) -> None:
    """Refuse a key that a mapping has twice: YAML's readers keep the last one without a word."""
    left, seen = [root], set()  # an alias is its anchor's node: once is enough, and it may hold itself
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        left += [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"configuration {path} has {key.value!r} twice in one place (lines {lines[key.value]} and {line}): the first would be "
                    f"dropped. Remove one; of methods or protocols name both: other: {{name: {key.value}, options: {{...}}}}."
                )
            lines[key.value] = line


def add_config_options(parser: Parser, config: type) -> None:
    """Declare ``--config`` and an option for each field of a configuration, nested ones with dots.

    Args:
        parser: parser of the command.
        config: a dataclass; its docstring is the help text.
    """
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(config, as_group=False)


def to_config(parser: Parser, namespace: Namespace, config: type[C], apart: Sequence[str] = ()) -> C:
    """The dataclass from parsed options.

    Args:
        parser: the command's.
        namespace: its options.
        config: the dataclass whose fields :func:`add_config_options` declared.
        apart: options that are not fields of it.

    Raises:
        ConfigError: the parser let a value through of which a dataclass cannot be made.
    """
    try:
        values = vars(parser.instantiate(namespace))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a section of the configuration has a value of the wrong kind ({error}).") from error
    return config(**{k: v for k, v in values.items() if k not in ("config", *apart)})


# Options of this command alone: a saved configuration that repeats them would resume or replace a run unasked.
_ONCE = ("ckpt_path", "overwrite")


def add_run_options(parser: Parser, fit: bool) -> None:
    """Declare the options of a training run.

    Args:
        parser: parser of ``fit``, ``validate``, ``test`` or ``predict``.
        fit: whether it is ``fit``, which alone can overwrite.
    """
    add_config_options(parser, RunConfig)
    parser.epilog = (
        "The usual ones: --config, --run_dir, --seed, --ckpt_path, --data.name, --data.options, --data.batch_size, "
        "--classifier.checkpoint, --optimizer.lr, --trainer.max_epochs, --logging.wandb."
    )
    text = "checkpoint: last, previous (the one before last), best, auto (last if there is one) or a path (fit: resume from it)"
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=text)
    if fit:
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the run that run_dir holds")


def to_run(parser: Parser, namespace: Namespace) -> tuple[RunConfig, Namespace]:
    """The configuration of a run, and a namespace of ``ckpt_path``, ``overwrite`` and the configuration as YAML (``resolved``)."""
    lines = parser.dump(namespace).splitlines()
    resolved = "\n".join(line for line in lines if not line.startswith(tuple(f"{k}:" for k in _ONCE))) + "\n"
    overwrite = namespace.get("overwrite", False)
    return to_config(parser, namespace, RunConfig, _ONCE), Namespace(ckpt_path=namespace.ckpt_path, overwrite=overwrite, resolved=resolved)


def parse_run(argv: Sequence[str]) -> tuple[str, RunConfig, Namespace]:
    """Parse ``[command, options...]`` of a training run from Python.

    Returns:
        The command, the configuration, and what :func:`to_run` says beside it.
    """
    name, rest = argv[0], list(argv[1:])
    check_configs(rest)
    parser = Parser(prog=f"explainer {name}", default_env=False)
    add_run_options(parser, fit=name == "fit")
    return (name, *to_run(parser, parser.parse_args(rest)))


def parse_evaluate(argv: Sequence[str]) -> tuple[EvaluateConfig, str]:
    """Parse ``[options...]`` of an evaluation from Python -> (configuration, the resolved configuration as YAML)."""
    check_configs(argv)
    parser = Parser(prog="explainer evaluate", default_env=False)
    add_config_options(parser, EvaluateConfig)
    namespace = parser.parse_args(list(argv))
    return to_config(parser, namespace, EvaluateConfig), parser.dump(namespace)
