"""MkDocs hook: the pages of the reference that are written from the code each time the guide is built."""

from __future__ import annotations

import dataclasses
import html
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import docstring_parser
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from explainer.cli import COMMANDS
from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.concepts_config import ConceptsConfig
from explainer.commands.maps_config import MapsConfig
from explainer.commands.parsing import Command, Group, command_parser
from explainer.config import RunConfig
from explainer.evaluation.config import EvaluateConfig
from explainer.metrics.facts import INPUTS, inputs
from explainer.plugins import discover

#: Configurations with the command that reads them.
CONFIGURATIONS: dict[str, type] = {
    "fit": RunConfig,
    "evaluate": EvaluateConfig,
    "calibrate": CalibrateConfig,
    "maps": MapsConfig,
    "concepts fit": ConceptsConfig,
}
#: Packages whose modules are found by name.
PLUGINS = {
    "Losses": "explainer.losses",
    "Protocols": "explainer.evaluation.protocols",
    "Data sets": "explainer.data",
}
#: Public names: they change only with a deprecation of one minor version.
API = (
    "explainer.load",
    "explainer.Explanandum",
    "explainer.save_pretrained",
    "explainer.from_pretrained",
    "explainer.push_to_hub",
    "explainer.baselines.build",
    "explainer.models.masking.aggregate",
    "explainer.losses.classification.classification_loss",
    "explainer.losses.entropy.entropy_loss",
    "explainer.losses.area.mask_area",
    "explainer.losses.area.area_bound_loss",
    "explainer.losses.total_variation.total_variation",
    "explainer.inference.predictor.Predictor",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; they are in the navigation like any other."""
    for name, write in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    return files


def methods() -> str:
    """The table of per-image methods."""
    from explainer.baselines.overview import markdown

    return f"""# Methods

`explainer.baselines.build(name, explanandum, **options)` gives an attributor: `attributor(images, class_index) -> [B,H,W]`, and
`attributor.all_classes(images) -> [B,K,H,W]`, which shares what classes have in common. Nothing stays changed on your model. Each has a
list of options (`explainer methods --options NAME`). This table is what `explainer methods` prints; its facts are verified by tests over
every method.

{markdown()}
"""


def commands() -> str:
    """Every command with its options."""
    lines = ["# Commands", "", "`explainer COMMAND --help` prints the same. `train.py` and `evaluate.py` are `explainer fit` and", ""]
    lines[2] += " `explainer evaluate` from a clone. Options are spelled with underscores."
    for name, command in _walk(COMMANDS):
        parser = command_parser(command, f"explainer {name}")
        actions = [a for a in parser._actions if "." not in a.dest and a.dest not in ("help", "print_config")]
        lines += [f"## explainer {name}", "", html.escape(parser.description or "", quote=False), ""]
        for reads, cls in CONFIGURATIONS.items():
            keys = {f.name for f in dataclasses.fields(cls)}
            if keys <= {a.dest for a in actions}:
                lines += [f"Every key of the [configuration of `{reads}`](configuration.md#{_anchor(reads)}) is an option.", ""]
                actions = [a for a in actions if a.dest not in keys]
                break
        rows = []
        for a in actions:
            flag = ", ".join(f"`{o}`" for o in a.option_strings) or f"`{a.dest.upper()}`"
            choices = f" ({', '.join(map(str, a.choices))})" if a.choices else ""
            default = "" if a.default in (None, [], "==SUPPRESS==") else f"`{_plain(a.default)}`"
            rows.append((flag, "required" if a.required else default, _cell((a.help or "").replace("%%", "%") + choices)))
        lines += _table(("option", "default", "meaning"), rows)
    return "\n".join(lines)


def configuration() -> str:
    """Every key of every configuration, with its type and default, from the dataclasses."""
    lines = [
        "# Configuration",
        "",
        "Keys of YAML files; each is also an option, as in `--optimizer.lr 5e-4`. `null` is YAML's nothing.",
        "",
    ]
    seen: set[type] = set()
    for command, cls in CONFIGURATIONS.items():
        lines += [f"## explainer {command}", "", *_keys(cls, seen)]
    return "\n".join(lines) + "\n"


def _keys(cls: type, seen: set[type]) -> list[str]:
    """The tables of a dataclass and of those inside it; a class that stands elsewhere on the page is linked."""
    documented = docstring_parser.parse(inspect.getdoc(cls) or "")
    meaning = {p.arg_name: p.description or "" for p in documented.params}
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for f in dataclasses.fields(cls):
        kinds = (hints[f.name], *typing.get_args(hints[f.name]))
        within = [t for t in kinds if isinstance(t, type) and dataclasses.is_dataclass(t)]
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if within:
            kind = f"[{within[0].__name__}](#{within[0].__name__.lower()})"
            shown = "" if dataclasses.is_dataclass(default) else f"`{_plain(default)}`"
            inner += within
        else:
            kind = _cell(_type(hints[f.name]))
            shown = "required" if default is dataclasses.MISSING else f"`{_plain(default)}`"
        rows.append((f"`{f.name}`", kind, shown, _cell(meaning[f.name])))
    text = [p for p in (documented.short_description, documented.long_description) if p]
    lines = [_cell(" ".join(text)), "", *_table(("key", "type", "default", "meaning"), rows)]
    for t in inner:
        if t not in seen:
            seen.add(t)
            lines += [f"### {t.__name__}", "", *_keys(t, seen)]
    return lines


def api() -> str:
    """The public names with signature, arguments and results, from their docstrings."""
    lines = ["# Python", "", "Public names. They change only with a deprecation of one minor version. Shape letters: B batch, K classes,"]
    lines += ["C channels, H and W pixels. Images are RGB in [0,1].", ""]
    for name in API:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        documented = docstring_parser.parse(inspect.getdoc(thing) or "")
        text = "\n\n".join(p for p in (documented.short_description, documented.long_description) if p)
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing))).replace("torch.Tensor", "Tensor")
        signature = signature.removesuffix(" -> None") if inspect.isclass(thing) else signature
        lines += [f"## {name}", "", f"```python\n{attribute}{signature}\n```", "", _escape(_roles(text)), ""]
        if documented.params:
            lines += _table(("argument", "meaning"), [(f"`{p.arg_name}`", _cell(p.description or "")) for p in documented.params])
        if documented.returns and documented.returns.description:
            lines += [f"**Returns:** {_cell(documented.returns.description)}", ""]
        for e in documented.raises:
            lines += [f"**Raises** `{e.type_name}`: {_cell(e.description or '')}", ""]
    return "\n".join(lines)


def plugins() -> str:
    """Losses, protocols and data sets with their options, as configurations name them, and the metrics of Python."""
    lines = ["# Losses, protocols, metrics, data sets", ""]
    lines += [
        "Names for configurations, and the options that each takes. [Methods](methods.md) have a page of their own. One file adds a",
        "",
    ]
    lines[-1:] = ["[further one](../howto/extend.md).", ""]
    for title, package in PLUGINS.items():
        rows = []
        for name, cls in discover(package).items():
            taken = ", ".join(_options(cls))
            # A protocol's class says what its rows are; its module says what it measures.
            about = inspect.getmodule(cls) if title == "Protocols" else cls
            rows.append((f"`{name}`", _cell((inspect.getdoc(about) or "").partition("\n\n")[0]), taken))
        lines += [f"## {title}", "", *_table(("name", "what it is", "options with defaults"), rows)]
    return "\n".join([*lines, *_metrics()])


def _options(plugin: Callable[..., Any], without: Container[str] = ()) -> list[str]:
    """The options of a plug-in with their defaults."""
    taken = [p for p in inspect.signature(plugin).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    taken = [p for p in taken if p.name not in without]
    return [f"`{p.name}`" if p.default is p.empty else f"`{p.name}: {_default(p.default)}`" for p in taken]


def _metrics() -> list[str]:
    """The metrics as Python takes them: inputs, options and the facts of each."""
    rows = []
    for name, metric in discover("explainer.metrics").items():
        facts = metric if inspect.isclass(metric) else metric.facts
        better = {True: "higher", False: "lower", None: ""}[facts.higher_is_better]
        low, high = (f"{bound:.3g}" for bound in facts.bounds)
        about = f"{(inspect.getdoc(metric) or '').partition(chr(10) * 2)[0]} (`{metric.__module__}.{metric.__qualname__}`)"
        given = ", ".join(f"`{p}`" for p in inputs(metric.values if inspect.isclass(metric) else metric))
        taken = ", ".join(_options(metric, without=INPUTS))
        rows.append((f"`{name}`", _cell(about), f"[{low}, {high}]", better, given, taken))
    text = ["## Metrics", "", "Functions of tensors, one value per image. `PerImageMetric` and `PerClassMetric` average them as"]
    text += ["torchmetrics does: [From Python](../howto/python.md).", ""]
    text += _table(("name", "what it is", "range", "better", "inputs", "options with defaults"), rows)
    return [*text, *_table(("input", "what it is"), [(f"`{name}`", _cell(f"`{kind}`")) for name, kind in INPUTS.items()])]


PAGES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "commands": commands,
    "configuration": configuration,
    "plugins": plugins,
    "api": api,
}


def _walk(commands: typing.Mapping[str, Command | Group], before: str = "") -> Iterator[tuple[str, Command]]:
    for name, command in commands.items():
        if isinstance(command, Group):
            yield from _walk(command.commands, f"{before}{name} ")
        else:
            yield before + name, command


def _anchor(command: str) -> str:
    return f"explainer-{command.replace(' ', '-')}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)] + [""]


def _type(t: Any) -> str:
    """A type as a reader of YAML says it: ``text or null``, ``raise or skip``."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
    if t in names:
        return names[t]
    origin, inside = typing.get_origin(t), typing.get_args(t)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin is dict:
        return f"mapping of {_type(inside[1])}" if inside[1] is not Any else "mapping"
    if origin in (list, tuple):
        return f"list of {_type(inside[0])}"
    return " or ".join(_type(i) for i in inside) if inside else getattr(t, "__name__", str(t))


def _default(value: Any) -> str:
    """An option's default: as YAML where it can be, by its name otherwise."""
    if isinstance(value, tuple):
        value = [float(f"{v:g}") if isinstance(v, float) else v for v in value]  # 0.3 and not 0.30000000000000004
    try:
        return _plain(value)
    except yaml.YAMLError:
        return getattr(value, "__name__", type(value).__name__)


def _plain(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False) if not isinstance(value, str) else value
    return text.removesuffix("...\n").strip().replace("|", "\\|")


def _roles(text: str) -> str:
    """Sphinx's cross references and double backticks as Markdown has them."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _escape(text: str) -> str:
    """HTML's signs, outside of code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return _escape(_roles(" ".join(text.split()))).replace("|", "\\|")
