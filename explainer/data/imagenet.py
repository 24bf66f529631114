"""The names of ImageNet's classes, in the order of the class indices of ILSVRC-2012."""

from __future__ import annotations

import functools
from collections import Counter


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """1000 names, all different: WordNet's first word of each class, with the class's WordNet number where two share it
    ("crane (n02012849)" is the bird).
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    first = [info.index_to_description(k).split(",")[0].strip() for k in range(info.num_classes())]
    count = Counter(first)
    return tuple(f"{name} ({info.index_to_label_name(k)})" if count[name] > 1 else name for k, name in enumerate(first))
