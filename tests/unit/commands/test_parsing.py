"""One parser: sub-commands, old spellings, near misses; and no command imports torch before its options are known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from explainer.cli import COMMANDS, main
from explainer.commands import train
from explainer.commands.parsing import Command, Group, check_configs, command_parser, parse, parse_evaluate, parse_run
from explainer.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture
def commands(calls: list[Any]) -> dict[str, Command]:
    def options(parser: Any) -> None:
        parser.add_argument("images", nargs="+")
        parser.add_argument("--batch_size", type=int, default=8)

    def run(_: Any, options: Any) -> int:
        calls.append(options)
        return 3

    return {"look": Command("looks at images", options, run), "other": Command("another", lambda _: None, run)}


def test_a_command_gets_its_options_and_gives_the_exit_code(commands: dict[str, Command], calls: list[Any]) -> None:
    assert main(["look", "a", "b", "--batch_size", "2"], commands) == 3
    assert calls[0].images == ["a", "b"] and calls[0].batch_size == 2


def test_dashes_still_work_with_a_note(commands: dict[str, Command], calls: list[Any], capsys: Any) -> None:
    assert main(["look", "a", "--batch-size=2"], commands) == 3 and calls[0].batch_size == 2
    note = capsys.readouterr().err
    assert note.startswith("note: ") and "--batch_size (instead of --batch-size)" in note and note.count("\n") == 1
    assert main(["look", "a", "--batch-size", "5"], commands) == 3 and calls[1].batch_size == 5
    main(["look", "a", "--batch_size", "5"], commands)
    assert capsys.readouterr().err.count("note:") == 1


def test_near_misses_are_answered(commands: dict[str, Command], calls: list[Any], capsys: Any) -> None:
    for argv, words in (
        (["lok"], "Did you mean look?"),
        ([], "received none"),
        (["look", "a", "--batch_sise", "2"], "Did you mean --batch_size?"),
        (["look", "a", "--batch-sise", "2"], "Did you mean --batch_size?"),
        (["look"], "images"),
        (["look", "a", "--batch_size", "x"], "batch_size"),
        (["look", "a", "--config", "no.yaml"], "no.yaml does not exist"),
    ):
        assert main(argv, commands) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and words in printed and "usage" not in printed
    assert calls == []


@pytest.mark.parametrize("value", ["x" * 9000, "x y " * 3000], ids=["a long word", "a long text"])
def test_a_long_value_is_not_printed_whole(value: str) -> None:
    with pytest.raises(ConfigError, match="logging") as caught:
        parse_run(["fit", "--logging", value])
    assert 10 < len(str(caught.value)) < 4000 and "fit --help" in str(caught.value)


def test_training_knows_the_training_commands_alone() -> None:
    with pytest.raises(ConfigError, match="must be one of the commands"):
        parse(train.COMMANDS, ["evaluate"], "train.py")
    command, _, options = parse(train.COMMANDS, ["fit", "--seed", "3", "--ckpt_path", "last"], "train.py")
    assert command is train.COMMANDS["fit"] and options.seed == 3 and options.ckpt_path == "last"


def test_a_resolved_configuration_does_not_repeat_what_belongs_to_one_call() -> None:
    _, config, rest = parse_run(["fit", "--seed", "3", "--ckpt_path", "last", "--overwrite", "true"])
    assert config.seed == 3 and rest.ckpt_path == "last" and rest.overwrite
    assert "seed: 3" in rest.resolved and "ckpt_path" not in rest.resolved and "overwrite" not in rest.resolved


def every_command() -> list[tuple[str, Command]]:
    """Names and commands, those of groups too."""
    groups = {name: entry.commands if isinstance(entry, Group) else {"": entry} for name, entry in COMMANDS.items()}
    return [(f"{name} {inner}".strip(), c) for name, commands in groups.items() for inner, c in commands.items()]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML's readers keep the last one: a method of a comparison would vanish."""
    file = tmp_path / "e.yaml"
    file.write_text("methods:\n  grad_cam: {}\n  srd: {}\n  grad_cam: {options: {layer: features.5}}\n")
    with pytest.raises(ConfigError, match=r"e.yaml has 'grad_cam' twice in one place \(lines 2 and 4\).*other: \{name: grad_cam"):
        parse_evaluate(["--config", str(file)])


def test_a_configuration_of_aliases_is_read_once(tmp_path: Path) -> None:
    """Ten lists of ten times the list before; and a list that holds itself."""
    lists = ["a0: &a0 [1, 2]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    for number, text in enumerate(("\n".join(lists), "a: &a [*a]\n")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        check_configs(["--config", str(file)])


@pytest.mark.parametrize(("name", "command"), every_command())
def test_every_option_has_a_help_text_and_underscores(name: str, command: Command) -> None:
    actions = command_parser(command, f"explainer {name}")._actions
    flags = [flag for action in actions for flag in action.option_strings]
    assert all("-" not in flag.removeprefix("--") for flag in flags if flag.startswith("--") and flag != "--help")
    assert all(action.help for action in actions if action.option_strings), [a.dest for a in actions if not a.help]


@pytest.mark.parametrize(("name", "command"), every_command())
def test_help_is_for_people(name: str, command: Command) -> None:
    """No address of a Python function, no empty brackets, and one default an option."""
    text = " ".join(command_parser(command, f"explainer {name}").format_help().split())
    assert "<function" not in text and "()" not in text.replace("pl.Trainer()", "") and "type: ," not in text
    for option in re.split(r" (?=--\w)", text):
        assert option.count("default: ") <= 1, option


def test_no_help_imports_torch() -> None:
    code = (
        "import sys; from explainer.cli import COMMANDS, main\n"
        "for argv in ([], ['concepts', 'fit'], *([name] for name in COMMANDS)):\n"
        "    try: main([*argv, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = [m for m in ('torch', 'onnx', 'matplotlib', 'rich', 'starlette') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert all(name in done.stdout for name in COMMANDS) and "--methods" in done.stdout and "--dynamic_size" in done.stdout
