"""``explainer.load``: an Explainer from whatever was saved, without Lightning and without the Explanandum."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from explainer.attribution.stages import find_stages
from explainer.errors import CheckpointError
from explainer.files import parse_json
from explainer.inference.classifier import Given, described
from explainer.models.checkpoints import hyper_parameters, load_explanandum, read_weights, sub_state
from explainer.models.classifiers import BUILDERS
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.untrusted import classifier_options

_NAME = re.compile(r"[A-Za-z0-9_.]+")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load(path: str | Path, explanandum: Explanandum | None = None, *, given: Given | None = None) -> Explainer:
    """Load an Explainer in eval mode.

    Args:
        path: a Lightning checkpoint of this project (``.ckpt``), an export folder (``model.safetensors`` and ``config.json``), or its
            ``.safetensors`` file (``config.json`` beside it).
        explanandum: the classifier, which an Explainer with a shared encoder is a decoder of. None: it is built as in training, from
            the classifier's checkpoint or package that the Explainer's own file names. Unused with an encoder of its own.
        given: makes that classifier when the file has said which it is; asked for a shared encoder alone.

    Returns:
        ``net(images [B,3,H,W] in [0,1]) -> class masks [B,K,H,W] in [0,1]``. ``net.metadata`` holds what was stored with it
        (the Explanandum's fingerprint, versions, ...).

    Raises:
        CheckpointError: missing, damaged, unsafe, or of another kind; or the classifier of a shared encoder cannot be had.
        FingerprintMismatchError: a shared encoder's classifier is another one.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        folder = path if path.is_dir() else path.parent
        weights = folder / WEIGHTS if path.is_dir() else path
        metadata = _read_config(folder / CONFIG)
        config: Any
        state: Any
        config, state = metadata.pop("explainer"), read_weights(weights)
    else:
        content = read_weights(path)
        saved = hyper_parameters(content, "explainer", path)
        if saved is None:
            raise CheckpointError(
                f"{path} is not a checkpoint of an Explainer of this project. Give a .ckpt that train.py wrote, or an export folder."
            )
        metadata = {k: v for k, v in saved.items() if k not in ("explainer", "kind")}
        config, state = saved.get("explainer"), content.get("state_dict")
        if not isinstance(config, dict) or not isinstance(state, dict):
            raise CheckpointError(f"{path} lacks the Explainer's configuration or weights. Use another checkpoint of the run.")
        state = sub_state(state, "explainer.")
    if config.get("encoder") == "shared":
        if explanandum is None and given is not None:
            said = {"task": metadata.get("task"), "classes": config.get("class_names"), "classifier": described(metadata.get("classifier"))}
            explanandum = given(said)
        explanandum = _its_classifier(path, metadata, config) if explanandum is None else explanandum
        explanandum.require_fingerprint(str(metadata.get("fingerprint", "none")), str(path))
    try:
        net = Explainer.from_config(config, explanandum)
        if explanandum is not None and _built_without_square_maps(net, state):
            net = Explainer.from_config(_with_earlier_layers(net, explanandum), explanandum)
        net.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, OverflowError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: weights and configuration do not fit together ({' '.join(str(error).split())[:300]}).") from error
    net.metadata = metadata
    return net.eval().requires_grad_(False)


def _its_classifier(path: Path, metadata: dict[str, Any], config: dict[str, Any]) -> Explanandum:
    """The classifier that a shared encoder was trained with, from what its file says about it."""
    c = metadata.get("classifier")
    if not isinstance(c, dict) or not isinstance(c.get("arch"), str):
        raise CheckpointError(f"{path} is a decoder on its classifier's features and does not name the classifier: give it too.")
    checkpoint, given = c.get("checkpoint"), c.get("options") or {}
    options = classifier_options(path, c["arch"], given)
    if checkpoint is None:
        options |= _stock_weights(c["arch"], given)
    elif checkpoint is not None and not Path(str(checkpoint)).is_file():
        raise CheckpointError(
            f"{path} is a decoder on the features of the classifier {checkpoint}, which is not there: give the classifier too "
            "(explainer.load(path, explanandum=...), --classifier FILE)."
        )
    return load_explanandum(
        checkpoint,
        c["arch"],
        options,
        config["num_classes"],
        task=metadata.get("task", "multilabel"),
        class_names=config["class_names"],
        mean=config["mean"],
        std=config["std"],
        input_size=c.get("input_size"),
    )


def _built_without_square_maps(net: Explainer, state: dict[str, Any]) -> bool:
    """Whether the file's decoder read other maps than this one: until they counted, those with as many channels as rows were left out."""
    own = net.state_dict()
    differs = own.keys() != state.keys() or any(state[key].shape != value.shape for key, value in own.items())
    return differs and "layers" not in (net.config.get("options") or {})


def _with_earlier_layers(net: Explainer, explanandum: Explanandum) -> dict[str, Any]:
    """The network's configuration with the layers that were found when maps with as many channels as rows did not count."""
    found = find_stages(explanandum.classifier, net.probed_side(explanandum), square=False)
    return {**net.config, "options": {**net.config["options"], "layers": [stage.path for stage in found]}}


def _stock_weights(arch: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options that say which trained weights a classifier had that is stored nowhere: a builder's or library's own, by name alone."""
    if arch in BUILDERS:
        return {"weights": given.get("weights")}
    if arch.startswith("torchvision:") and _NAME.fullmatch(str(given.get("weights"))):
        return {"weights": given["weights"]}
    return {"pretrained": True} if arch.startswith("timm:") and given.get("pretrained") is True else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        metadata = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: an export folder holds {WEIGHTS} and {CONFIG}. Export again with `explainer export`."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("explainer"), dict):
        raise CheckpointError(f"{path} has no 'explainer' section: it was not written by `explainer export`.")
    return metadata
