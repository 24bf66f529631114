"""What every protocol is: it asks for maps and turns a batch into rows. Concrete protocols are in :mod:`explainer.evaluation.protocols`."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from explainer import plugins
from explainer.errors import ConfigError
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Method, Scene

Mode = Literal["paper", "code", "corrected"]
PACKAGE = "explainer.evaluation.protocols"


@dataclass(frozen=True)
class Column:
    """One number of a protocol.

    Attributes:
        title: heading in tables.
        higher_is_better: direction; None when neither is better.
        percent: shown times 100.
        average: over all rows, or ``classes``: the mean over classes of each class's mean.
        value: name in ``Row.values`` where it is not the column's own (one value averaged in two ways).
        counts: ``(vector, entry)``: computed from a summed vector of counts instead of averaged (see :meth:`Protocol.from_counts`).
        shown: whether the column is in the printed tables (the files have all columns).
    """

    title: str
    higher_is_better: bool | None = True
    percent: bool = False
    average: Literal["rows", "classes"] = "rows"
    value: str | None = None
    counts: tuple[str, int] | None = None
    shown: bool = True

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Protocol(abc.ABC):
    """A table of a paper, or a part of one.

    Class attributes:
        name: how configurations call it.
        source: paper and table.
        uses_maps: False for protocols about the classifier alone; they run once, under the label "classifier".
        needs_truth: reads ground-truth masks.
        uses_scale: raw and rescaled maps differ for it.

    Args:
        mode: paper, code or corrected; see each protocol for what differs.
    """

    name: ClassVar[str]
    #: Heading of the protocol's table in plain words; empty: the name.
    heading: ClassVar[str] = ""
    #: What the protocol asks, in one sentence below the heading.
    question: ClassVar[str] = ""
    source: ClassVar[str] = ""
    uses_maps: ClassVar[bool] = True
    needs_truth: ClassVar[bool] = False
    uses_scale: ClassVar[bool] = False
    #: Images from the start of the split that the protocol looks at; None takes all.
    images: int | None = None
    #: Labels of the methods that the protocol looks at; None takes all.
    methods: list[str] | None = None

    def __init__(self, mode: Mode = "corrected") -> None:
        self.mode = mode

    @abc.abstractmethod
    def columns(self) -> dict[str, Column]:
        """The numbers, by their name in ``Row.values``."""

    @abc.abstractmethod
    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Score a batch. ``maps`` is None where ``uses_maps`` is False."""

    def wanted(self, scene: Scene) -> Tensor:
        """Classes whose maps are needed, bool ``[B,K]``; default the explained ones."""
        return scene.explained

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """What the entries of each vector stand for."""
        return {}

    def from_counts(self, vector: str, summed: Tensor) -> Tensor:
        """Scores ``[...,M]`` of a summed vector of counts ``[...,V]``; only of protocols with columns of counts, which override it."""
        raise NotImplementedError(f"{self.name} has no counts")

    def not_applicable(self, method: Method) -> str | None:
        """Why the protocol cannot say anything about a method, or None."""
        return None

    def unsuited(self, explanandum: Any) -> str | None:
        """Why the protocol cannot say anything about a classifier, or None."""
        return None

    def identity(self) -> dict[str, Any]:
        """Plain values that decide the rows."""
        return {
            "protocol": self.name,
            **{k: v for k, v in sorted(vars(self).items()) if not k.startswith("_") and k not in ("images", "methods")},
        }


@dataclass(frozen=True)
class Score:
    """What a protocol says about one image (``class_index`` None) or one class of it: a row without its labels."""

    row: int
    class_index: int | None
    values: dict[str, float]
    vectors: dict[str, list[float]]

    def labelled(self, method: str, scale: str, protocol: str, scene: Scene) -> Row:
        """The finished row."""
        return Row(method, scale, protocol, scene.batch.ids[self.row], scene.indices[self.row], self.class_index, self.values, self.vectors)


def scores(
    rows: Tensor | int,
    classes: Tensor | None,
    values: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor] | None = None,
    digits: int | None = None,
) -> list[Score]:
    """One :class:`Score` per row from columns ``[P]`` and vectors ``[P,V]``.

    Args:
        rows: image of each row ``[P]``, or B for one row per image.
        classes: class of each row ``[P]``, or None.
        values, vectors: numbers, and lists of numbers, by name.
        digits: significant digits kept of the vectors' entries; None keeps all.
    """
    images = list(range(rows)) if isinstance(rows, int) else rows.tolist()
    numbers = {k: v.detach().double().cpu().tolist() for k, v in values.items()}
    lists = {k: v.detach().double().cpu().tolist() for k, v in (vectors or {}).items()}
    if digits is not None:
        lists = {k: [[float(f"{x:.{digits}g}") for x in row] for row in v] for k, v in lists.items()}
    chosen = [None] * len(images) if classes is None else classes.tolist()
    return [
        Score(b, k, {name: column[i] for name, column in numbers.items()}, {name: column[i] for name, column in lists.items()})
        for i, (b, k) in enumerate(zip(images, chosen, strict=True))
    ]


def none_wanted(scene: Scene) -> Tensor:
    """No class at all, bool ``[B,K]``."""
    return torch.zeros_like(scene.labels)


def build_protocol(label: str, options: Mapping[str, Any] | None, mode: Mode) -> Protocol:
    """The protocol of a configuration entry: ``{label: {protocol: name, option: value}}``; the label is the name by default.

    Besides the protocol's own options there are ``images`` (look at so many images from the start of the split) and ``methods`` (a list
    of labels, to spare the others a slow protocol).

    Raises:
        ConfigError: an unknown name or option.
    """
    given = dict(options or {})
    name = given.pop("protocol", label)
    given.setdefault("mode", mode)
    if given["mode"] not in ("paper", "code", "corrected"):
        raise ConfigError(f"protocols.{label}: mode must be paper, code or corrected, received {given['mode']!r}.")
    images = given.pop("images", None)
    if images is not None and (not isinstance(images, int) or images < 1):
        raise ConfigError(f"protocols.{label}: images must be a positive whole number, received {images!r}.")
    methods = given.pop("methods", None)
    if methods is not None and (not isinstance(methods, list) or not all(isinstance(m, str) for m in methods)):
        raise ConfigError(f"protocols.{label}: methods must be a list of labels, received {methods!r}.")
    protocol: Protocol = plugins.build(PACKAGE, name, **given)
    protocol.methods = methods
    if images is not None:
        protocol.images = images
    return protocol


def parse_protocols(entries: list[Any], mode: Mode) -> dict[str, Protocol]:
    """The configuration's list as protocols by label.

    Raises:
        ConfigError: an entry of another form, or a label twice.
    """
    built: dict[str, Protocol] = {}
    for entry in entries:
        if isinstance(entry, str):
            items: list[tuple[str, Any]] = [(entry, {})]
        elif isinstance(entry, dict):
            items = list(entry.items())
        else:
            raise ConfigError(f"protocols must be names or {{label: {{option: value}}}}, received {entry!r}.")
        for label, options in items:
            if label in built:
                raise ConfigError(f"protocol {label!r} is listed twice. Give one a label of its own: {{{label}_2: {{protocol: {label}}}}}.")
            if options is not None and not isinstance(options, dict):
                raise ConfigError(f"protocols.{label} must be a mapping of options, received {options!r}.")
            built[label] = build_protocol(label, options, mode)
    if not built:
        raise ConfigError("protocols is empty: name at least one, e.g. protocols: [segmentation, insertion_deletion].")
    return built
