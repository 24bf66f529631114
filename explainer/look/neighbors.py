"""The nearest feature vectors in other images, by exact search."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 256  # queries at a time: their cosines with a whole data set are the largest thing here


def nearest(queries: Tensor, database: Tensor, count: int) -> list[list[tuple[int, int, int, float]]]:
    """The nearest vectors by cosine, one per image.

    Args:
        queries: ``[Q,C]``.
        database: ``[N,C,h,w]``, vectors of N images.
        count: at most so many per query.

    Returns:
        Per query (image, row, column, cosine), nearest first. A vector of zeros has the cosine 0 with everything.
    """
    directions = F.normalize(database.float(), dim=1, eps=1e-12).flatten(2)
    width = database.shape[3]
    answers = []
    for part in F.normalize(queries.float(), dim=1, eps=1e-12).split(_CHUNK):
        cosines, places = torch.einsum("qc,nci->qni", part, directions).max(2)
        for row, where in zip(cosines, places.tolist(), strict=True):
            order = row.argsort(descending=True, stable=True)[:count].tolist()
            answers.append([(n, where[n] // width, where[n] % width, float(row[n])) for n in order])
    return answers
