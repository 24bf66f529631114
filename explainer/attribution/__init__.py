"""The protocols of everything that explains, and the cache of its maps."""

from explainer.attribution.protocol import Attributor, DenseAttributor, FromDense, check_class_index, check_images, one_map

__all__ = ["Attributor", "DenseAttributor", "FromDense", "check_class_index", "check_images", "one_map"]
