"""What a user's own Trainer hands to the tasks, checked: batches, classes of the data, weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from explainer.errors import ConfigError
from explainer.tensors import Batch


def require_batch(batch: object) -> None:
    """Refuse what an ordinary DataLoader makes of (image, label) pairs.

    Raises:
        ConfigError: ``batch`` is no :class:`~explainer.tensors.Batch`.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(
            f"a batch must be an explainer.tensors.Batch (images [B,3,H,W] in [0,1] and targets [B,K]), received {type(batch).__name__}. "
            "Make the DataLoader with collate_fn=explainer.data.contract.collate, of samples explainer.data.contract.Sample."
        )


def require_order(names: Sequence[str], others: Sequence[str] | None, whose: str, others_whose: str) -> None:
    """Refuse the same classes in another order: nothing would show that outputs and names have changed places.

    Args:
        names, others: class names; None: unknown.
        whose, others_whose: whose they are, for the message.

    Raises:
        ConfigError: the same names, in another order.
    """
    if others is not None and list(names) != list(others) and sorted(names) == sorted(others):
        raise ConfigError(
            f"{whose} has the classes {', '.join(names)}, {others_whose} has {', '.join(others)}: the same in another order. "
            "Give both one order."
        )


def require_data_order(trainer: Any, names: Sequence[str], whose: str) -> None:
    """:func:`require_order` against the trainer's data module, if it has one that knows its classes."""
    require_order(names, getattr(getattr(trainer, "datamodule", None), "class_names", None), whose, "the data")


def require_fit(own: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, section: str) -> None:
    """Refuse weights of another network in one sentence.

    Args:
        own: the network's state_dict.
        found: the checkpoint's.
        what: what they shall fit, for the message.
        section: of the configuration, which made it.

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape.
    """
    odd = sorted(own.keys() ^ found.keys())
    odd += [key for key in own if key in found and hasattr(found[key], "shape") and own[key].shape != found[key].shape]
    if odd:
        raise ConfigError(
            f"the checkpoint's weights do not fit this {what} ({len(odd)} keys differ, for example {', '.join(odd[:5])}). "
            f"Use the {section} section it was trained with."
        )
