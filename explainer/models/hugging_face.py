"""Image classifiers of Hugging Face's ``transformers`` as classifiers to be explained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from explainer.errors import ConfigError


class HuggingFaceClassifier(nn.Module):
    """Any module that is called with ``pixel_values`` and returns an object with ``logits``, as a module from images to logits.

    ``explainer.Explanandum(HuggingFaceClassifier(model), num_classes=K, mean=processor.image_mean, std=processor.image_std)`` with the
    model's image processor. Methods find the model's layers under ``model.``. The package ``transformers`` is not needed here.

    Args:
        model: the model, for example a ``ViTForImageClassification``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B,C,H,W]`` -> logits ``[B,K]``.

        Raises:
            ConfigError: the model's output has no ``logits``.
        """
        output = self.model(pixel_values=images)
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(self.model).__name__} returned {type(output).__name__} without logits: it is no image classifier. Use one with a "
                "classification head (AutoModelForImageClassification)."
            )
        return logits


def from_pretrained(num_classes: int, path: str) -> HuggingFaceClassifier:
    """A classifier that ``transformers`` saved, for ``classifier.arch: explainer.models.hugging_face:from_pretrained``.

    Args:
        num_classes: number of classes K; must be the model's.
        path: folder of the model (``classifier.options.path``). Nothing is downloaded.

    Raises:
        ConfigError: ``transformers`` is not installed, or the folder holds no image classifier of K classes.
    """
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ConfigError("classifiers of Hugging Face need the package transformers: pip install transformers.") from error
    try:
        model: Any = AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"classifier.options.path: {path} holds no image classifier of transformers ({error}).") from error
    if model.config.num_labels != num_classes:
        raise ConfigError(f"the model in {path} has {model.config.num_labels} classes, received num_classes={num_classes}.")
    return HuggingFaceClassifier(model)
