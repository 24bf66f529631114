"""Numbers of a configuration, asked before anything is read or computed. Imports nothing heavy."""

from __future__ import annotations

from explainer.errors import ConfigError


def require_least(config: object, least: int, *names: str) -> None:
    """Raise ConfigError for a field of ``config`` that is smaller than ``least``; None leaves a default."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, received {value}.")


def require_share(config: object, *names: str, ends: bool = False) -> None:
    """Raise ConfigError for a field of ``config`` that does not lie in (0,1), with ``ends`` in [0,1]."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1 or (value in (0, 1) and not ends):
            raise ConfigError(f"{name} must lie in {'[0,1]' if ends else '(0,1)'}, received {value}.")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that the random generators do not take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must lie in 0..{2**32 - 1}, received {seed}.")
