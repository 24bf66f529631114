"""``predict``: masks or logits of a split as one .npz per image, written as they are made."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from explainer.files import replacing, shortened
from explainer.tensors import Batch


def file_names(ids: Sequence[str]) -> dict[str, str]:
    """A file name without suffix for each id: ``a/b`` becomes ``a_b``, and ids that would share a name get a part of their hash.

    Names that differ in case alone count as shared: some file systems take them for one. Long ones are shortened.
    """
    plain = {i: shortened(i.replace("/", "_"), 200) for i in ids}
    often = Counter(name.casefold() for name in plain.values())
    return {i: name if often[name.casefold()] == 1 else f"{name}-{hashlib.sha256(i.encode()).hexdigest()[:8]}" for i, name in plain.items()}


class PredictionWriter(pl.Callback):
    """Writes ``<folder>/<id>.npz`` with ``id`` and ``masks`` (``[K,H,W]``) or ``logits`` (``[K]``, float32) after each batch.

    Masks are float16, and float32 where a loss (``ranking``, ``order``) trained an order of pixels, which float16 would lose near 1.

    Args:
        folder: where.
        names: file name by sample; see :func:`file_names`, of the whole split, so that all processes agree.

    Attributes:
        written: files so far, of this process.
    """

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self.folder, self.names, self.written = folder, names, 0

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the batch; nothing of it is kept."""
        import numpy as np

        values: Tensor = outputs.float().cpu()
        ranked = any(term.ranks for term in getattr(pl_module, "terms", {}).values())
        for name, value in zip(batch.ids, values, strict=True):
            array = {"masks": (value if ranked else value.half()).numpy()} if value.ndim == 3 else {"logits": value.numpy()}
            with replacing(self.folder / f"{self.names[name]}.npz", durable=False) as stream:
                np.savez_compressed(stream, id=np.array(name), **array)
            self.written += 1
