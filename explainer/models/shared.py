"""An Explainer without an encoder of its own: a light decoder on the feature maps that the frozen classifier computes anyway.

The class's filter in the last layer is a learned projection of the classifier's own head weights plus a free part. So the decoder
knows a class that no training image shows, and only the filters of the classes asked for are computed. Where the classifier's head
is linear in the mean of its last feature map, masks begin as class activations (Zhou et al. 2016) that spread to positions with
similar features (the pixel correlation of Wang et al., CVPR 2020, section 3.3, without learned weights) and are fitted to the image's
colours by a guided filter. Where an image has several labels, their activations are alike wherever there is something at all; then the
classes of a position can compete for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.attribution.rest import at_rest
from explainer.attribution.shares import SHARP, similarity
from explainer.attribution.stages import Stage, find_stages, linear_head, named_stages
from explainer.errors import ConfigError
from explainer.models.class_head import ClassHead, Start
from explainer.models.class_layer import only_classes
from explainer.models.explanandum import answer_of
from explainer.models.guided import make_guide
from explainer.models.scores import logits_of

Decoder = Literal["deeplabv3plus", "panoptic_deeplab", "fpn"]


def _block(channels: int, width: int, dilation: int = 1) -> nn.Sequential:
    """Depthwise 3x3, pointwise, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _project(channels: int, width: int, factor: int = 1) -> nn.Sequential:
    """Pointwise, batch norm, ReLU; with a ``factor`` every position becomes so many squared (a transposed convolution)."""
    if factor > 1:
        wide = nn.Conv2d(channels, width * factor**2, 1, bias=False)
        return nn.Sequential(wide, nn.PixelShuffle(factor), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Pyramid(nn.Module):
    """Atrous separable convolutions and the image's mean at the coarsest stage (DeepLabV3+, Chen et al. 2018).

    Args:
        channels: number of channels of the stage.
        width: number of channels of the output.
        rates: dilations; a map of 7x7 positions has room for small ones only.
    """

    def __init__(self, channels: int, width: int, rates: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        self.reduce = _project(channels, width)
        self.branches = nn.ModuleList(_block(width, width, rate) for rate in rates)
        self.mean = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True))
        self.merge = _project(width * (len(rates) + 2), width)

    def forward(self, features: Tensor) -> Tensor:
        """``[B,C,h,w]`` -> ``[B,width,h,w]``."""
        x = self.reduce(features)
        # Enlarged and not expanded: onnxruntime keeps its fast layout of channels then.
        mean = F.interpolate(self.mean(x.mean(dim=(2, 3), keepdim=True)), size=x.shape[-2:], mode="nearest")
        merged: Tensor = self.merge(torch.cat([x, *(branch(x) for branch in self.branches), mean], dim=1))
        return merged


class FeatureDecoder(nn.Module):
    """Stages of a classifier -> one map of embeddings at the finest stage's resolution.

    Args:
        stages: feature maps from fine to coarse; with a ``factor``, features are enlarged by it as in DPT (Ranftl et al., ICCV 2021).
        width: channels of the embeddings.
        kind: ``fpn`` adds every stage on the way up; ``deeplabv3plus`` goes from the coarsest to the finest at once, as its paper does;
            ``panoptic_deeplab`` is the same with the two finest stages (Cheng et al., CVPR 2020).
    """

    def __init__(self, stages: Sequence[Stage], width: int, kind: Decoder) -> None:
        super().__init__()
        skips = {"fpn": len(stages) - 1, "panoptic_deeplab": min(2, len(stages) - 1), "deeplabv3plus": 1}
        if kind not in skips:
            raise ConfigError(f"a shared encoder has the decoders {', '.join(skips)}, received {kind!r}.")
        self.used = list(range(skips[kind]))
        above = [*self.used[1:], len(stages) - 1]  # whose resolution each of them finds
        self.grows = {i: stages[i].stride != stages[j].stride for i, j in zip(self.used, above, strict=True)}
        self.top = Pyramid(stages[-1].channels, width)
        # Fine stages are large: few channels there, and in the finest one, keep the decoder light.
        side = {i: width if i > 0 and stages[i].stride > 4 else max(8, width // 2) for i in self.used}
        self.sides = nn.ModuleDict({str(i): _project(stages[i].channels, side[i], stages[i].factor) for i in self.used})
        self.fuse = nn.ModuleDict({str(i): _block(width + side[i], width) for i in self.used})

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps ``[B,C_i,h_i,w_i]``, fine to coarse -> ``[B,width,f h_0,f w_0]`` with the factor f of the finest stage."""
        x: Tensor = self.top(features[-1])
        for i in reversed(self.used):
            side = self.sides[str(i)](features[i])
            if self.grows[i]:
                x = F.interpolate(x, size=side.shape[-2:], mode="bilinear", align_corners=False)
            x = self.fuse[str(i)](torch.cat([x, side], dim=1))
        return x


def _quicken(decoder: nn.Module) -> None:
    """Shrink the weights before batch norms: the output stays, and every step turns them further. An order is learned in few steps so."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.weight.data.mul_(0.1)


class SharedNetwork(nn.Module):
    """The frozen classifier with a decoder on its feature maps: normalised images -> mask logits.

    The classifier is a part of the module, so that it follows to another device, and is left out of its state_dict: a checkpoint holds
    the decoder alone.

    Args:
        classifier: frozen; takes normalised images ``[B,3,H,W]``.
        num_classes: number of classes K.
        task: ``multilabel`` or ``multiclass``: what its scores mean.
        decoder: ``fpn``, ``deeplabv3plus`` or ``panoptic_deeplab``.
        width: channels of the decoder.
        layers: module paths of the feature maps; None: the last one of each of the strides 4, 8, 16 and 32, or four depths of a vision
            transformer.
        start: what masks begin as, where the classifier's head allows it; see :class:`~explainer.models.class_head.ClassHead`.
        level: how much a class's probability counts in its mask, before training; see :class:`~explainer.models.class_head.ClassHead`.
        order: range of logits for an order of pixels beside a mask's edge, by a small decoder of its own; see
            :class:`~explainer.models.class_head.ClassHead`.
        order_layers: module paths of the feature maps which that decoder reads, at least two; None: the two coarsest of ``layers``.
        side: side in pixels of the image that the stages are looked for with.
        std: what the images were divided by, per channel.
    """

    def __init__(
        self,
        classifier: nn.Module,
        num_classes: int,
        task: Literal["multilabel", "multiclass"] = "multilabel",
        *,
        decoder: Decoder = "fpn",
        width: int = 64,
        layers: Sequence[str] | None = None,
        start: Start = "activation",
        level: float = 0.5,
        order: float = 0.0,
        order_layers: Sequence[str] | None = None,
        side: int = 224,
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"explainer.options.width must be a whole number of channels, at least 1, received {width!r}.")
        for name, value in (("layers", layers), ("order_layers", order_layers)):
            if isinstance(value, str):
                raise ConfigError(f"explainer.options.{name} must be a list of module paths, received {value!r}: write [{value}, ...].")
        self.classifier = classifier
        self.task = task
        self.stages = find_stages(classifier, side) if layers is None else named_stages(classifier, layers, side)
        # In a list: it is the classifier's, not a part.
        self._head = [linear_head(classifier, self.stages[-1], num_classes, side, logits_of)]
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)
        self.decoder = FeatureDecoder(self.stages, width, decoder)
        weight = None if self._head[0] is None else self._head[0].weight.detach()
        self.head = ClassHead(num_classes, width, weight, start=start, level=level, order=order)
        self.order_stages: list[Stage] = []
        self.order_decoder = None
        if order_layers is not None and order == 0:
            raise ConfigError("explainer.options.order_layers says what an order reads, and there is none: give order, too (order: 4).")
        if order > 0:
            self.order_stages = self.stages[-2:] if order_layers is None else named_stages(classifier, order_layers, side, "order_layers")
            self.order_decoder = FeatureDecoder(self.order_stages, width, "fpn")
            _quicken(self.order_decoder)
        self.register_state_dict_post_hook(_without_classifier)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_classifier)  # type: ignore[no-untyped-call]

    std: Tensor

    @property
    def has_start(self) -> bool:
        """Whether masks begin as the classifier's own activations, so that the untrained network knows something."""
        return self.head.gain is not None

    def train(self, mode: bool = True) -> SharedNetwork:
        """The decoder's mode; the classifier stays in eval."""
        super().train(mode)
        self.classifier.eval()
        return self

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps ``[B,C_i,h_i,w_i]`` of the stages, fine to coarse, then those of the order's, and the classifier's logits ``[B,K]``,
        without gradients.
        """
        stages = [*self.stages, *self.order_stages]
        with at_rest(self.classifier), _no_grad_in_eager(), _captured(self.classifier, stages) as found:
            logits = logits_of(answer_of(self.classifier, x), len(self.head.own))
        maps = [stage.spatial(found[stage.path], x.shape[-2:]) for stage in stages]
        return maps, logits

    def decode(self, x: Tensor, maps: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Normalised images and what :meth:`features` gives of them -> mask logits ``[B,K,h,w]`` at the finest stage's resolution."""
        for_order = None if self.order_decoder is None else self.order_decoder(maps[len(self.stages) :])
        maps = maps[: len(self.stages)]
        embeddings = self.decoder(maps)
        with _as_given(x):
            # In bfloat16 the guided filter's small variances vanish, and it divides by them.
            embeddings, logits, deep, middle = (t.to(x.dtype) for t in (embeddings, logits, maps[-1], maps[-2]))
            log_p = F.logsigmoid(logits) if self.task == "multilabel" else F.log_softmax(logits, dim=1)
            head = self._head[0]
            weight = None if head is None else head.weight.detach().to(x.dtype)
            height, width = maps[1].shape[-2:]  # the second finest stage: finer ones gain nothing and cost four times as much
            guide = make_guide(x, (height, width), unit=self.std)
            # The last stage but one: fine enough to follow objects, coarse enough to know what they are, and few positions.
            similar = similarity(middle, 1 if self.head.start == "activation" else SHARP)
            masks: Tensor = self.head(embeddings, deep, log_p, weight, similar, guide, None if for_order is None else for_order.to(x.dtype))
            return masks

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[B,3,H,W]`` -> mask logits ``[B,K,h,w]``."""
        return self.decode(x, *self.features(x))

    def with_scores(self, x: Tensor, choose: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Classification and masks of one pass through the classifier.

        Args:
            x: normalised images ``[B,3,H,W]``.
            choose: the classifier's logits ``[B,K]`` -> classes ``[B,n]`` whose masks are wanted, or None for all.

        Returns:
            The classifier's logits, the classes, and mask logits ``[B,n,h,w]`` (``[B,K,h,w]``).
        """
        maps, logits = self.features(x)
        classes = choose(logits)
        with only_classes(classes):
            return logits, classes, self.decode(x, maps, logits)


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off. Where it is not on, nothing is entered: an exporter would record the switch as an operation of its own."""
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()


@contextmanager
def _no_grad_in_eager() -> Iterator[None]:
    """No graph of the frozen part. An exporter records the switch as an operation of its own, and needs none."""
    if torch.compiler.is_compiling():
        yield
        return
    with torch.no_grad():
        yield


@contextmanager
def _captured(classifier: nn.Module, stages: Sequence[Stage]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the stages' modules by path, while the classifier runs inside."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: found.__setitem__(path, output)

    handles = [classifier.get_submodule(stage.path).register_forward_hook(keep(stage.path)) for stage in stages]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _without_classifier(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}classifier.")]:
        del state[key]


def _keep_classifier(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The classifier's own weights stand in for those that a checkpoint leaves out."""
    assert isinstance(module, SharedNetwork)
    for key, value in module.classifier.state_dict().items():
        state.setdefault(f"{prefix}classifier.{key}", value)
