"""The configuration of a training run as plain dataclasses. Importing this module does not import torch: ``--help`` must be instant.

Every field is a command-line option (``--data.batch_size 32``) and a key of the YAML file. ``options`` dictionaries go to the plug-in
that ``name`` (or ``network``, ``arch``) chooses and are checked against its signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from explainer.classifier_config import ClassifierConfig, ClassifierLossConfig, MaskAugmentationConfig, OcclusionConfig
from explainer.vocabulary import FillKind

__all__ = [
    "ClassifierConfig",
    "ClassifierLossConfig",
    "DataConfig",
    "ExplainerConfig",
    "LoggingConfig",
    "MaskAugmentationConfig",
    "MaskingConfig",
    "OcclusionConfig",
    "OptimizerConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainerConfig",
    "without_paths",
]


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that do not name files and folders: those mean nothing on another machine and may be private."""
    return {key: value for key, value in options.items() if not (isinstance(value, str | PurePath) and {"/", "\\"} & set(str(value)))}


@dataclass
class DataConfig:
    """Which images.

    Attributes:
        name: data set: shapes, voc, coco, cub, image_folder, csv, images (photographs without labels).
        batch_size: training images per device and step.
        eval_batch_size: images per step in validation, test and prediction (default: batch_size).
        num_workers: loader processes; 0 loads in the main process.
        options: keyword options of the data set (root, size, class_names, ...). size is the side of square images in pixels, or [height,
            width]. Those of image files also take geometry (squash, letterbox or crop: how a picture becomes an image of that size) and
            no_region (names of classes that no pixel belongs to, e.g. [free]).
        train_options: further options for the training split only (augmentation).
        eval_options: further options for the val and test splits only.
        targets: labels, or predicted: the classifier's own decisions, for images with or without labels. What is explained is the
            classifier, not the annotator.
        top: with predicted targets of a single-label classifier: the classes of an image are its most probable ones, this many.
        threshold: with predicted targets of a multi-label classifier: those with at least this probability.
        on_error: raise stops at an unreadable sample, skip leaves it out and reports the count.
        global_batch: batch_size is the total over all devices.
        prefetch_factor: batches that each loader process prepares ahead (default: torch's 2); needs num_workers.
        pin_memory: page-locked batches, which copy faster to a GPU (default: where CUDA is available).
        balance: draw every class equally often in training, whatever its number of images; an epoch keeps its length.
        copies: batch augmentation (Hoffer et al. 2020): every training image so many times in its batch, each time augmented and
            occluded by itself. batch_size counts images, so that a batch holds batch_size * copies samples.
        permute_labels: a seed: the training labels are handed to other images, once. For the sanity test data_randomisation only.
    """

    name: str = "shapes"
    batch_size: int = 16
    eval_batch_size: int | None = None
    num_workers: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train_options: dict[str, Any] = field(default_factory=dict)
    eval_options: dict[str, Any] = field(default_factory=dict)
    targets: Literal["labels", "predicted"] = "labels"
    top: int = 1
    threshold: float = 0.5
    on_error: Literal["raise", "skip"] = "raise"
    global_batch: bool = False
    prefetch_factor: int | None = None
    pin_memory: bool | None = None
    balance: bool = False
    copies: int = 1
    permute_labels: int | None = None


@dataclass
class ExplainerConfig:
    """The Explainer network.

    Attributes:
        encoder: own, or shared: no encoder at all but a light decoder on the frozen classifier's own feature maps. Training needs no
            encoder gradients, inference costs one decoder more than the classification; checkpoints hold the decoder alone.
        network: deeplabv3, deeplabv3plus, unet, fpn, ... (segmentation-models-pytorch), torchvision_deeplabv3, vgg_deeplab or vgg_unet
            (the encoder of small_vgg).
            With a shared encoder its decoder: fpn, deeplabv3plus or panoptic_deeplab.
        options: options of the network (encoder_name, encoder_weights, decoder_channels, ...); of a shared encoder width, layers, start,
            level, order.
            encoder_name: auto is the classifier's own architecture (timm's, torchvision's, efficientnet_lite).
        downscale: run at 1/downscale of the resolution and upsample the masks.
        stride: multiple to which images are padded.
        init_encoder: start the encoder from the Explanandum's own weights (same architecture needed, whatever library built it).
    """

    encoder: Literal["own", "shared"] = "own"
    network: str = "deeplabv3"
    options: dict[str, Any] = field(default_factory=lambda: {"encoder_name": "resnet50"})
    downscale: int = 1
    stride: int = 32
    init_encoder: bool = False


@dataclass
class MaskingConfig:
    """How masks are applied to the image in the two classifier passes of a training step.

    Attributes:
        fill: what replaces removed pixels: mean (the paper's), black, grey, white, blur, noise, shuffle (another image), random (one
            of mean, blur, noise, shuffle per step), alternative (blur or coloured noise per step, as losses.rtis was published with), or
            tokens (for vision transformers: nothing replaces them, the tokens of removed pixels are left out).
        binarize: share of the images whose mask is thresholded at a random level in [0.1, 0.9] (straight-through gradient); against the
            grey solution. 0 is the paper's.
        subset: share of the multi-label images of which only a random part of the labels is shown; ties each mask to its class. 0 is the
            paper's.
        area_conditioned: share of the images whose present classes' masks are cut to a random area, so that the Explainer learns the
            right order of pixels for any area (explainer.models.area_conditioned). 0 switches it off.
        areas: least and greatest of these areas, log-uniform.
        area_temperature: softness of the cut, in mask logits.
        absent_classes: how many absent classes of each training image get a mask, drawn at random, besides all present ones: it bounds time
            and memory for many classes. Default: all of up to 100 classes, 20 of more.
    """

    fill: Literal[FillKind, "random", "alternative", "tokens"] = "mean"
    binarize: float = 0.0
    subset: float = 0.0
    area_conditioned: float = 0.0
    areas: list[float] = field(default_factory=lambda: [0.02, 0.4])
    area_temperature: float = 1.0
    absent_classes: int | None = None


@dataclass
class TeacherConfig:
    """Where target maps of losses.distillation come from. Several teachers are averaged with their weights.

    Attributes:
        name: a baseline, e.g. grad_cam, rise, extremal_perturbation, or guided_filter around one (srd, agf, guided_backprop: their
            relevance is sparse and makes a poor mask as it is).
        options: keyword options of the baseline.
        weight: weight in the average of the teachers that know a class.
        cache: folder of maps, filled by ``explainer maps`` or by the run (images); null asks the baseline at every step (for cheap ones:
            the CAM family).
        dtype: number format of the cache.
        seed: random seed of the cache.
        scale: how a raw map becomes [0,1]: minmax, max (negative to 0, maximum to 1; right for CAMs) or clamp.
        images: number of training images, drawn from all over the split, to learn from; the run computes their maps into the cache
            before it trains, where they are missing. 0 takes all that are in the cache. While maps alone are copied, batches hold only
            images that have one.
        threshold: null keeps maps soft; a number makes them binary, {class name: number} only those classes.
        teaches: masks, for losses.distillation, or order, for losses.order: the maps' order of pixels alone.
        memory_mib: how much of the cache is kept in memory.
    """

    name: str = "grad_cam"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    cache: str | None = None
    dtype: Literal["float32", "float16", "uint8"] = "float16"
    seed: int = 0
    scale: Literal["minmax", "max", "clamp"] = "minmax"
    images: int = 0
    threshold: float | dict[str, float] | None = None
    teaches: Literal["masks", "order"] = "masks"
    memory_mib: float = 2048.0


@dataclass
class OptimizerConfig:
    """Optimiser and learning-rate schedule.

    Attributes:
        name: adam, adamw or sgd.
        lr: (peak) learning rate.
        encoder_lr: factor of lr for the Explainer's encoder, or for all of a classifier but its head. Below 1 it keeps what it knows
            (explainer.init_encoder, encoder_weights, classifier.init_from) while the rest learns to read it.
        weight_decay: weight decay of adamw and sgd.
        schedule: constant, one_cycle (warm-up and cosine to 0 over the whole run), cosine, or steps (a tenth at 30, 60 and 90 % of it).
        warmup: share of the run used for warming up (one_cycle).
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-4
    encoder_lr: float = 1.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "one_cycle", "cosine", "steps"] = "constant"
    warmup: float = 0.2


@dataclass
class TrainerConfig:
    """What Lightning's Trainer is told; anything it accepts beyond these goes under ``extra``.

    Attributes:
        max_epochs: passes over the training data.
        max_steps: optimiser steps; -1 for no limit.
        max_time: "DD:HH:MM:SS", or null.
        accelerator: auto, cpu, gpu.
        devices: number of devices, a list of indices, or auto.
        num_nodes: machines.
        strategy: auto, ddp, fsdp, ... (fsdp is Lightning's, passed through and not tested here: the networks fit on one GPU).
        precision: 32-true, bf16-mixed, 16-mixed, ..., or auto: a few steps of this run's own networks are timed in float32 and bfloat16,
            contiguous and channels_last, before training (half a minute at most, of large networks); the fastest is used and remembered in
            precision.json. Several processes use bf16-mixed where the hardware computes in it. The losses are always computed in float32.
        accumulate_grad_batches: steps whose gradients are summed.
        gradient_clip_val: largest gradient norm, or null.
        sync_batchnorm: share BatchNorm statistics between GPUs; ignored on the CPU, where torch cannot.
        channels_last: memory layout of the networks; null: the faster one with precision: auto, else true.
        compile: torch.compile the networks.
        compile_explainer: the Explainer alone (null: as ``compile``).
        compile_classifier: the classifier alone (null: as ``compile``). Frozen, it runs forwards and backwards to the image only.
        patience: epochs without improvement of the monitored value before stopping; null never stops early.
        min_delta: smallest improvement that counts.
        check_val_every_n_epoch: epochs between validations. A training ends with one, whatever ends it; extra: {limit_val_batches: 0}
            switches all off.
        save_every_n_steps: write last.ckpt also within epochs, every so many optimiser steps; null only at their ends.
        log_every_n_steps: steps between logged training values.
        progress_bar: show it; without a terminal (CI, nohup, SLURM) a line an epoch and one a minute. False shows nothing.
        extra: further keyword arguments of pytorch_lightning.Trainer; those that this section or the run decides are refused.
    """

    max_epochs: int = 10
    max_steps: int = -1
    max_time: str | None = None
    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    sync_batchnorm: bool = False
    channels_last: bool | None = None
    compile: bool = False
    compile_explainer: bool | None = None
    compile_classifier: bool | None = None
    patience: int | None = None
    min_delta: float = 0.001
    check_val_every_n_epoch: int = 1
    save_every_n_steps: int | None = None
    log_every_n_steps: int = 10
    progress_bar: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoggingConfig:
    """Where curves and pictures go. CSV and PNG are always written into the run folder.

    Attributes:
        wandb: auto (online if you are logged in, else off), online, offline or off.
        project: wandb project.
        tensorboard: also write the curves for TensorBoard, into the run folder (extra: tensorboard).
        images: number of fixed validation images whose masks are drawn.
        images_every_n_epochs: how often.
    """

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "explainer"
    tensorboard: bool = False
    images: int = 6
    images_every_n_epochs: int = 5


@dataclass
class RunConfig:
    """One training run.

    Attributes:
        task: explain trains an Explainer, classify trains a classifier to be explained.
        run_dir: folder of this run: config.yaml, checkpoints, metrics.csv, pictures.
        seed: random seed of weights, order, augmentation and random masks.
        data: images.
        classifier: the Explanandum (or the classifier to train).
        explainer: the Explainer network.
        losses: terms by name, each with weight and options; for task explain.
        teachers: whose maps losses.distillation copies.
        masking: how masks are applied.
        optimizer: optimiser and schedule.
        trainer: Lightning's Trainer.
        logging: curves and pictures.
        evaluate_with: evaluation configuration that is run after fit, or null.
        init_from: checkpoint whose Explainer (or classifier) weights are loaded before training; nothing else of it is used.
    """

    task: Literal["explain", "classify"] = "explain"
    run_dir: str = "runs/default"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    explainer: ExplainerConfig = field(default_factory=ExplainerConfig)
    losses: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "classification": {"weight": 1.0},
            "entropy": {"weight": 1.0},
            "target_area": {"weight": 0.1},
            "non_target_area": {"weight": 0.3},
            "area_bound": {"weight": 1.0, "min_area": 0.05, "max_area": 0.3},
            "total_variation": {"weight": 1.0},
        }
    )
    teachers: list[TeacherConfig] = field(default_factory=list)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluate_with: str | None = None
    init_from: str | None = None
