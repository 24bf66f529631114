"""A data set whose samples can be told apart and calculated by hand."""

from __future__ import annotations

import torch

from explainer.data.contract import ExplainerDataset, Sample
from explainer.errors import CorruptSampleError


class Numbers(ExplainerDataset):
    """Sample i is an image of i / 100 plus augmentation noise; the indices in ``bad`` are corrupt."""

    class_names = ("a", "b")
    task = "multilabel"

    def __init__(self, length: int = 10, bad: tuple[int, ...] = (), split: str = "train") -> None:
        super().__init__(split, 8)
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise CorruptSampleError(f"file{index}.jpg: broken")
        noise = torch.rand(3, 8, 8, generator=self.generator(index)) / 1000
        return Sample(noise + index / 100, torch.tensor([1.0, index % 2]), self.sample_id(index))
