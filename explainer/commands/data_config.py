"""What the commands on data have in common: the configuration whose data they read, its splits, its samples as they are stored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import Namespace

from explainer.commands.parsing import Parser
from explainer.config import DataConfig
from explainer.errors import ConfigError

SPLITS = ("train", "val", "test")


def add_data_options(parser: Parser) -> None:
    """Declare the configuration, and every key of its data section."""
    parser.add_argument("config", help="configuration of a run or of data (configs/data/*.yaml), or a folder of class folders")
    for name, kind in get_type_hints(DataConfig).items():  # None: as the configuration says
        parser.add_argument(
            f"--data.{name}", type=kind | None, default=None, help="instead of the configuration's, see explainer fit --help"
        )


def data_config(options: Namespace) -> DataConfig:
    """The data section of the configuration, with what was given on the command line in place of its own.

    Raises:
        ConfigError: an unreadable configuration, or an unknown key.
    """
    section = _section(Path(options.config))
    for name, value in vars(options.data).items():
        if value is None:
            continue
        own = section.get(name)
        section[name] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    return _data_config(section, options.config)


def _section(path: Path) -> dict[str, Any]:
    """The data section of a configuration file; a folder is class folders."""
    if path.is_dir():
        return {"name": "image_folder", "options": {"root": str(path)}}
    if not path.is_file():
        raise ConfigError(f"configuration {path} does not exist. Give a YAML file with a data section, or a folder of class folders.")
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"configuration {path} is not valid YAML ({' '.join(str(error).split())[:300]}).") from error
    section = content.get("data", content) if isinstance(content, dict) else None
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise ConfigError(f"configuration {path} has no data section. It looks like: data: {{name: voc, options: {{root: data/voc}}}}.")
    return dict(section)


def _data_config(section: Mapping[str, Any], source: str) -> DataConfig:
    known = {f.name: f for f in fields(DataConfig)}
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{source}: data has no key {key!r}. Its keys: {', '.join(known)}.")
        if key.endswith("options") and not isinstance(value, dict):
            raise ConfigError(f"{source}: data.{key} must be a mapping, received {value!r}.")
    return DataConfig(**section)


def require_splits(names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a name that is no split's."""
    if unknown := [name for name in names if name not in SPLITS]:
        raise ConfigError(f"--splits must be of {', '.join(SPLITS)}, received {unknown[0]!r}.")


def unchanged(config: DataConfig) -> DataConfig:
    """The same data as it is stored: without augmentation and with the masks."""
    from explainer import plugins

    known = inspect.signature(plugins.find("explainer.data", config.name)).parameters
    plain = {key: value for key, value in (("augment", None), ("masks", True), ("cache", "none")) if key in known}
    if "masks" not in plain:  # generated data, or photographs without labels: nothing to undo but the augmentation
        plain = {key: "none" for key in ("augment",) if key in known}
    return replace(config, options={**config.options, **plain}, train_options={**config.train_options, **plain})
