"""What command lines share: a parser whose errors are one paragraph, and numbers with bounds. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import math
from typing import NoReturn

from explainer.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse with errors of one paragraph."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and the nearest option."""
        flags = [s for action in self._actions for s in action.option_strings]
        wrong = next((word for word in message.split() if word.startswith("--")), "")
        close = difflib.get_close_matches(wrong, flags, n=1) if "unrecognized" in message else []
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{message}.{hint}\nSee all options with: {self.prog} --help")


def parser(name: str, description: str) -> Parser:
    """The parser of ``explainer NAME``."""
    return Parser(prog=f"explainer {name}", description=description, allow_abbrev=False)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, received {text!r}")
    return value


def name_list(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
