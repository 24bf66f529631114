"""The Explainer: the network that is trained, and all that is needed at inference (neither Lightning nor the Explanandum)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.attribution import DenseAttributor, check_images
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from explainer.geometry import Size, as_size, height_width
from explainer.models.class_head import order_apart
from explainer.models.class_layer import check_classes, only_classes
from explainer.models.enlarging import resized
from explainer.models.explanandum import IMAGENET_MEAN, IMAGENET_STD, Explanandum
from explainer.models.networks import build_network
from explainer.models.shared import SharedNetwork
from explainer.models.untrusted import network_options

_UNIT = (-1.0, 2.0)  # [0,1] with room for noise and resampling; images normalised by ImageNet's statistics go from -2.1 to 2.6


class Explainer(nn.Module):
    """Images in [0,1] -> one mask per class in [0,1], in a single forward pass (Stalder et al. 2022, section 3.1).

    Preprocessing is inside: normalisation, and padding to the network's stride, so that any image size works.

    Args:
        network: name for :func:`explainer.models.networks.build_network`; with a shared encoder the decoder, ``fpn`` or ``deeplabv3plus``.
        num_classes: number of classes K.
        options: keyword options of the network (encoder_name, encoder_weights, decoder_channels, ...).
        class_names: names of the K classes, or None for "0".."K-1".
        mean, std: normalisation per channel, in units of [0,1] images.
        image_size: side or (height, width) in pixels that it was trained at; ``None`` if unknown. Only a recommendation: any size is
            accepted.
        downscale: run the network at 1/downscale of the image's resolution and upsample the masks (a speed option).
        stride: multiple to which height and width are padded (replicated edge) before the network; not with a shared encoder, whose
            feature maps are those of the classification itself.
        encoder: ``own``, or ``shared``: the frozen classifier's own feature maps (:mod:`explainer.models.shared`).
        explanandum: the classifier, for a shared encoder. It is a part of the module and not of its state_dict.

    Raises:
        ConfigError: names, sizes or encoder do not fit, or a shared encoder has no classifier to share.
    """

    def __init__(
        self,
        network: str = "deeplabv3",
        num_classes: int = 20,
        options: dict[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: Size | None = None,
        downscale: int = 1,
        stride: int = 32,
        encoder: Literal["own", "shared"] = "own",
        explanandum: Explanandum | None = None,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(f"class_names has {len(class_names)} entries for num_classes={num_classes}; give one name per class.")
        for name, value in (("downscale", downscale), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, received {value}.")
        self.num_classes = num_classes
        self.class_names = tuple(class_names) if class_names is not None else tuple(str(k) for k in range(num_classes))
        self.image_size: Size | None = None if image_size is None else as_size(image_size)
        self.downscale, self.stride = downscale, stride
        self.metadata: dict[str, Any] = {}
        self.config: dict[str, Any] = {
            "network": network,
            "num_classes": num_classes,
            "options": dict(options or {}),
            "class_names": list(self.class_names),
            "mean": [float(v) for v in mean],
            "std": [float(v) for v in std],
            "image_size": list(image_size) if isinstance(image_size, tuple) else image_size,
            "downscale": downscale,
            "stride": stride,
            "encoder": encoder,
        }
        self.register_buffer("mean", torch.tensor(self.config["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config["std"]).view(1, -1, 1, 1), persistent=False)
        self.input_size: int | None = None
        self._explanandum = [explanandum if encoder == "shared" else None]  # in a list: its classifier is in the network already
        self.network: nn.Module
        if encoder == "own":
            self.network = build_network(network, num_classes, **self.config["options"])
        elif encoder == "shared":
            self.network = self._shared(network, explanandum)
        else:
            raise ConfigError(f"explainer.encoder must be own or shared, received {encoder!r}.")

    @property
    def explanandum(self) -> Explanandum | None:
        """The classifier of a shared encoder, else None."""
        return self._explanandum[0]

    def _shared(self, decoder: str, explanandum: Explanandum | None) -> SharedNetwork:
        if explanandum is None:
            raise ConfigError(
                "an Explainer with a shared encoder is a decoder on its classifier's features: give the classifier too "
                "(explainer.load(path, explanandum=...), --classifier FILE)."
            )
        if not explanandum.differentiable:
            raise ConfigError("explainer.encoder: shared reads the classifier's layers, and this classifier gives scores only: use own.")
        if self.downscale != 1:
            raise ConfigError(f"explainer.downscale needs an encoder of its own, received {self.downscale} with a shared one: set it to 1.")
        self.input_size, self.stride = explanandum.input_size, 1
        options: dict[str, Any] = {"side": self.probed_side(explanandum), "std": self.config["std"], **self.config["options"]}
        try:
            return SharedNetwork(explanandum.classifier, self.num_classes, explanandum.task, decoder=decoder, **options)  # type: ignore[arg-type]
        except UnsupportedLayerError:  # a TypeError too, and its message says what to do
            raise
        except TypeError as error:
            raise ConfigError(
                f"explainer.options of a shared encoder are width, layers, start, level, order and order_layers, "
                f"received {self.config['options']} ({error})."
            ) from error

    mean: Tensor
    std: Tensor

    def probed_side(self, explanandum: Explanandum) -> int:
        """Side in pixels of the image on which the classifier's feature maps are looked for."""
        return max(64, *height_width(explanandum.input_size or self.image_size or 224))

    @classmethod
    def from_config(cls, config: dict[str, Any], explanandum: Explanandum | None = None) -> Explainer:
        """The network described by :attr:`config`, with random weights: pretrained encoder weights are about to be replaced.

        Args:
            config: the arguments of the constructor, as :attr:`config` gives them.
            explanandum: the classifier; needed for a shared encoder, unused otherwise.

        Raises:
            CheckpointError: the options name files, addresses or encoders outside the installed libraries (the description mostly comes
                from a file).
        """
        options = network_options(config["options"], "the Explainer's configuration")
        net = cls(**{**config, "options": options}, explanandum=explanandum)
        net.config["options"] = dict(config["options"])
        return net

    def logits(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Mask logits at the image's resolution.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            classes: only these, ``[n]`` or for each image its own ``[B,n]``; None: all K.

        Returns:
            ``[B,K,H,W]``, or ``[B,n,H,W]``.
        """
        with only_classes(classes):
            return self._logits(images)

    @property
    def has_order(self) -> bool:
        """Whether the network has a logit of its own for the order of pixels (``options.order``)."""
        return isinstance(self.network, SharedNetwork) and self.network.head.order > 0

    def logits_and_order(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For training with :attr:`has_order`: the logits that decide where masks end, and those for losses that order pixels.

        Args:
            images, classes: see :meth:`logits`.

        Returns:
            Two tensors of the same shape: the logits of a network without an order, and those of :meth:`logits`, whose gradient reaches
            the order alone. They cross 0 at the same positions of the decoder.
        """
        with order_apart():
            extent, order = self.logits(images, classes).chunk(2, dim=1)
        return extent, order

    def _logits(self, images: Tensor) -> Tensor:
        x = self._network_input(images)
        bottom, right = -x.shape[-2] % self.stride, -x.shape[-1] % self.stride
        padded = F.pad(x, (0, right, 0, bottom), mode="replicate")
        scores = _enlarged(self.network(padded), padded)[..., : x.shape[-2], : x.shape[-1]]
        return _enlarged(scores, images)

    def _network_input(self, images: Tensor) -> Tensor:
        """Normalised, in the dtype of the weights, at the resolution at which the network runs, not yet padded."""
        x = (images - self.mean) / self.std
        if x.dtype != self.mean.dtype:  # as the Explanandum does; a branch and not a cast, so that exported graphs have no node for it
            x = x.to(self.mean.dtype)
        height, width = images.shape[-2:]
        if self.input_size is not None and (height, width) != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", align_corners=False)
        if self.downscale > 1:
            # A size and not a factor: runtimes disagree on the scale when a factor does not divide the size.
            small = (max(1, height // self.downscale), max(1, width // self.downscale))
            x = F.interpolate(x, size=small, mode="bilinear", antialias=True)
        return x

    def with_scores(
        self, images: Tensor, choose: Callable[[Tensor], Tensor | None] = lambda logits: None, enlarge: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the classifier says and where its evidence lies, for little more than the classification: a shared encoder only.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            choose: the classifier's logits ``[B,K]`` -> classes ``[B,n]`` whose masks are wanted, or None for all.
            enlarge: enlarge masks to the image's resolution; otherwise the masks have the decoder's.

        Returns:
            The classifier's logits ``[B,K]``, the classes chosen, and mask logits ``[B,n,H,W]`` (``[B,K,H,W]``).
        """
        assert isinstance(self.network, SharedNetwork)
        x = self._network_input(images)
        logits, classes, scores = self.network.with_scores(x, choose)
        return logits, classes, _enlarged(_enlarged(scores, x), images) if enlarge else scores

    def _check_unit(self, images: Tensor) -> None:
        """Refuse images that are normalised already, where this network normalises them itself."""
        low, high = (float(value) for value in images.detach().aminmax())
        if bool(self.mean.any()) and not (low >= _UNIT[0] and high <= _UNIT[1]):
            raise ShapeError(
                f"images must lie in [0,1], received values {low:.4g} to {high:.4g}: this network normalises them itself "
                f"(mean {self.config['mean']}), so leave out Normalize."
            )

    def forward(self, images: Tensor, classes: Tensor | list[int] | None = None) -> Tensor:
        """Class masks; with ``classes`` the cost does not grow with K.

        Args:
            images: ``[B,3,H,W]`` in [0,1], any H and W.
            classes: class indices ``[n]``, or for each image its own ``[B,n]``; None: all K.

        Returns:
            ``[B,K,H,W]`` in [0,1], or ``[B,n,H,W]`` in the order of ``classes``.

        Raises:
            ShapeError: the images are no batch of RGB images in [0,1], or ``classes`` has another shape.
            ConfigError: a class index outside of 0..K-1.
        """
        if not torch.compiler.is_compiling():
            check_images(images)
            self._check_unit(images)
            if classes is not None:
                classes = check_classes(classes, images.shape[0], self.num_classes).to(images.device)
            if images.shape[1] != 3:
                raise ShapeError(f"images must have 3 channels (RGB), received {tuple(images.shape)}: {_to_rgb(images.shape)}.")
        return self.logits(images, classes).sigmoid()  # type: ignore[arg-type]


def _to_rgb(shape: Sequence[int]) -> str:
    """What makes RGB images of a batch of this shape."""
    if shape[1] > 4 and shape[3] in (1, 3, 4):
        return "the channels come second: images.permute(0, 3, 1, 2)"
    return {1: "repeat a grey channel three times", 4: "leave the transparency out: images[:, :3]"}.get(
        shape[1], "give red, green and blue"
    )


def _enlarged(maps: Tensor, like: Tensor) -> Tensor:
    """``[B,n,h,w]`` at the resolution of ``like``, bilinear."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return resized(maps, like.shape[-2:])


class TrainedExplainer(DenseAttributor):
    """A trained :class:`Explainer` (or any module with the same call) as an attributor, for evaluation beside the baselines."""

    name = "explainer"

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.num_classes: int = net.num_classes  # type: ignore[assignment]

    def _explain_all(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            masks: Tensor = self.net(images).to(images.dtype)
            return masks

    def some(self, images: Tensor, classes: Tensor) -> Tensor:
        """See :meth:`DenseAttributor.some`: the network computes these classes alone."""
        if not isinstance(self.net, Explainer):
            return super().some(images, classes)
        check_images(images)
        with torch.no_grad():
            masks: Tensor = self.net(images, classes).to(images.dtype)
            return masks
