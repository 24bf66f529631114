"""Plug-ins: a new file with a class that has a ``name`` is all it takes.

``find("explainer.losses", "entropy")`` imports every module of the package once and returns the concrete class whose
``name`` is asked for; an unknown name is answered with the known ones. Metrics are functions, to which a decorator gives the ``name``.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any

from explainer.errors import ConfigError, ExplainerError, UnknownNameError
from explainer.vocabulary import todays


@functools.cache
def discover(package: str) -> dict[str, Any]:
    """Concrete classes and functions of ``package`` by their ``name``, sorted. Each counts where it is defined, not where imported."""
    root = importlib.import_module(package)
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(root.__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for plugin in vars(module).values():
            if not (inspect.isclass(plugin) or inspect.isfunction(plugin)) or plugin.__module__ != module.__name__:
                continue
            name = vars(plugin).get("name")
            if not isinstance(name, str) or inspect.isabstract(plugin):
                continue
            if name in found and found[name] is not plugin:
                raise ConfigError(f"two plug-ins are called {name!r}: {found[name].__module__} and {module.__name__}. Rename one.")
            found[name] = plugin
    return dict(sorted(found.items()))


def find(package: str, name: str) -> Any:
    """The class or function called ``name``. Raises :class:`UnknownNameError` with the known names and the closest one."""
    known = discover(package)
    name = todays(name, known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        kind = package.rpartition(".")[2]
        raise UnknownNameError(f"{kind} has no plug-in called {name!r}.{hint} Known: {', '.join(known)}.")
    return known[name]


def build(package: str, name: str, *args: Any, **options: Any) -> Any:
    """Instantiate the class called ``name``; an unknown option is answered with the known ones."""
    cls = find(package, name)
    parameters = inspect.signature(cls).parameters
    options = {todays(option, parameters): value for option, value in options.items()}
    check_options(cls, options, given=len(args))
    try:
        return cls(*args, **options)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, ExplainerError):
            raise
        raise ConfigError(f"{name}: an option has a value of the wrong kind ({error}). Received {options}.") from error


def check_options(cls: type, options: dict[str, Any], given: int = 0) -> None:
    """Raise :class:`ConfigError` unless every option is a keyword of ``cls.__init__`` (the first ``given`` are taken)."""
    parameters = list(inspect.signature(cls).parameters.values())[given:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"{getattr(cls, 'name', cls.__name__)} has no option {option!r}.{hint} Its options: {', '.join(known) or 'none'}."
            )
