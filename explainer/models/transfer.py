"""Starting a classifier from weights that were trained elsewhere: the user's own file, another head, other names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from explainer.errors import CheckpointError, ConfigError
from explainer.models.checkpoints import hyper_parameters, read_weights, sub_state
from explainer.models.matching import by_name, by_order, unwrapped, without_prefixes

LEAST_SHARE = 0.9
_CALM = 0.01  # standard deviation of a fresh head's weights


@dataclass(frozen=True)
class Transfer:
    """What was taken from a file.

    Attributes:
        loaded: names of the network's tensors that now hold the file's values.
        kept: names of those that kept their own (random) values.
        unused: names of the file's tensors that have no place here.
        description: one line about it.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    description: str


def head_of(net: nn.Module, num_classes: int) -> str | None:
    """Name of the module that gives the logits: timm says it; else the last module whose weight has ``num_classes`` rows; or None."""
    said = (getattr(net, "pretrained_cfg", None) or {}).get("classifier")
    said = said[0] if isinstance(said, (tuple, list)) and said else said
    modules = dict(net.named_modules())
    if isinstance(said, str) and said in modules and list(modules[said].parameters()):
        return said
    weights = {name: getattr(module, "weight", None) for name, module in modules.items()}
    found = [n for n, w in weights.items() if isinstance(w, Tensor) and w.ndim >= 2 and len(w) == num_classes]
    return found[-1] if found and found[-1] else None


def body_names(net: nn.Module, num_classes: int) -> list[str]:
    """Names of all tensors but the head's."""
    head = head_of(net, num_classes)
    return [name for name in net.state_dict() if head is None or not name.startswith(f"{head}.")]


def calm_head(net: nn.Module, num_classes: int) -> None:
    """Shrink a fresh head in place: weights to a standard deviation of at most 0.01, bias to 0.

    The first gradients of a large random head are noise to the trained features below it and distort them (Kumar et al., Fine-Tuning can
    Distort Pretrained Features, ICLR 2022). timm draws the head of an EfficientNet uniformly from +-1/sqrt(K), thirty times as large.
    """
    name = head_of(net, num_classes)
    head = None if name is None else net.get_submodule(name)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    with torch.no_grad():
        if isinstance(weight, Tensor):
            weight.mul_((_CALM / weight.std().clamp_min(1e-12)).clamp(max=1.0))
        if isinstance(bias, Tensor):
            bias.zero_()


def has_fresh_head(net: nn.Module, num_classes: int) -> bool:
    """Whether a network built with its library's trained weights has a head of its own: for another number of classes than recorded."""
    known = (getattr(net, "pretrained_cfg", None) or {}).get("num_classes")
    return known is not None and known != num_classes


def init_from(net: nn.Module, path: str | Path, num_classes: int, option: str = "classifier.init_from") -> Transfer:
    """Load every tensor of a file that fits, in place.

    Names are compared as they are, then without what training scripts put in front of them
    (:data:`~explainer.models.matching.PREFIXES`). Where less than :data:`LEAST_SHARE` of the body has a counterpart by name, the
    tensors are paired by their order, if every single pair agrees in shape and in the last part of its name (two implementations of
    one architecture).

    Args:
        net: the classifier.
        path: state_dict, safetensors file or checkpoint.
        num_classes: number of classes K; tells the head, which may be left out, from the body, which may not.
        option: name of the option, for messages.

    Raises:
        CheckpointError: the file is unusable, names two tensors alike, is of a larger network, or less than 90 % of the body's tensors fit.
    """
    content = read_weights(path)
    ours = hyper_parameters(content, "classifier", path) is not None
    source = sub_state(content.get("state_dict", {}), "classifier.") if ours else unwrapped(content, path)
    own = net.state_dict()
    body = {name for name in body_names(net, num_classes) if not name.endswith("num_batches_tracked")}
    pairs = by_name(source, own, path)
    found = body & set(pairs)
    if len(found) < LEAST_SHARE * len(body):
        ordered = by_order(source, own, body)
        if ordered is None:
            raise CheckpointError(_misfit(option, path, source, own, pairs, body))
        pairs = ordered
    if cut := _cut_out(source, own, pairs):
        raise CheckpointError(
            f"{option}: {path} holds {len(cut)} more tensors inside the parts that the classifier has ({', '.join(cut[:3])}, ...): it is "
            "of a larger network, whose remaining blocks do not fit together. Set classifier.arch and classifier.options to the file's own "
            "architecture."
        )
    new = {mine: source[theirs] for mine, theirs in pairs.items()}
    net.load_state_dict({**own, **new})
    kept = tuple(name for name in own if name not in pairs and not name.endswith("num_batches_tracked"))
    head = head_of(net, num_classes)
    if head is not None and f"{head}.weight" in kept:
        calm_head(net, num_classes)
    used = set(pairs.values())
    unused = tuple(name for name in source if name not in used)
    return Transfer(tuple(pairs), kept, unused, _one_line(option, path, own, source, pairs, kept, unused))


def _cut_out(source: dict[str, Tensor], own: dict[str, Tensor], pairs: dict[str, str]) -> list[str]:
    """The file's tensors that have no place here though others of the same list of blocks do (``layer1.2`` of a deeper ResNet), where they
    are more than a tenth of what is loaded; a decoder or an auxiliary head beside the body is none of them.
    """

    def blocks(name: str) -> str:
        """``layer1`` of ``model.layer1.2.conv1.weight``; empty without a number: not in a list."""
        parts = without_prefixes(name).split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        return ".".join(parts[:place])

    shared = {blocks(theirs) for theirs in pairs.values()} - {""}
    here, used = {without_prefixes(name) for name in own}, set(pairs.values())
    cut = [n for n in source if n not in used and without_prefixes(n) not in here and blocks(n) in shared]
    return cut if len(cut) > (1 - LEAST_SHARE) * len(pairs) else []


def _misfit(option: str, path: str | Path, source: dict[str, Tensor], own: dict[str, Tensor], pairs: dict[str, str], body: set[str]) -> str:
    missing = [name for name in own if name in body and name not in pairs]
    short = {without_prefixes(k): v for k, v in source.items()}
    example = missing[0]
    other = source.get(example, short.get(without_prefixes(example)))
    why = f"is {tuple(other.shape)} there" if other is not None else "is not there"
    return (
        f"{option}: only {len(body) - len(missing)} of the {len(body)} tensors of the classifier's body are in {path} with the same shape, "
        f"at least {LEAST_SHARE:.0%} are needed. For example {example} {tuple(own[example].shape)} {why}; the file holds "
        f"{', '.join(list(source)[:3])}, ... Set classifier.arch and classifier.options to the file's own architecture."
    )


def _one_line(
    option: str,
    path: str | Path,
    own: dict[str, Tensor],
    source: dict[str, Tensor],
    pairs: dict[str, str],
    kept: Sequence[str],
    unused: Sequence[str],
) -> str:
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    line = f"{option}: {sum(n in pairs for n in counted)} of {len(counted)} tensors from {path}"
    if kept:
        shapes = {without_prefixes(k): tuple(source[k].shape) for k in unused}
        there = [f"{n} {tuple(own[n].shape)}" + (f", {shapes[s]} there" if (s := without_prefixes(n)) in shapes else "") for n in kept[:3]]
        line += f"; left as they were: {'; '.join(there)}{', ...' if len(kept) > 3 else ''}"
    other = [n for n in unused if not n.endswith("num_batches_tracked") and without_prefixes(n) not in {without_prefixes(k) for k in kept}]
    if other:
        line += f"; not used: {', '.join(other[:3])}{f' and {len(other) - 3} more' if len(other) > 3 else ''}"
    return line + "."


def freeze(net: nn.Module, chosen: str | Sequence[str], num_classes: int) -> list[str]:
    """Switch off the gradients of a part of the network; returns the names of the frozen parameters.

    Args:
        net: the classifier.
        chosen: ``none``, ``body`` (all but the head), or names of modules, each with all that lies below it.
        num_classes: number of classes K; tells the head from the body.

    Raises:
        ConfigError: a name that no module has, or nothing is left to train.
    """
    if chosen == "none":
        return []
    if chosen == "body":
        if head_of(net, num_classes) is None:
            raise ConfigError(
                f"classifier.freeze: no head with {num_classes} outputs was found: name the modules to freeze instead of body."
            )
        names = set(body_names(net, num_classes))
    else:
        parts = [chosen] if isinstance(chosen, str) else list(chosen)
        modules = [name for name, _ in net.named_modules() if name]
        names = set()
        for part in parts:
            inside = {name for name, _ in net.named_parameters() if name.startswith(f"{part}.")}
            if not inside:
                top = list(dict.fromkeys(name.partition(".")[0] for name in modules))
                raise ConfigError(f"classifier.freeze names {part!r}, which holds no parameters. Use body, none, or of: {', '.join(top)}.")
            names |= inside
    frozen = []
    for name, parameter in net.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(p.requires_grad for p in net.parameters()):
        raise ConfigError(f"classifier.freeze {chosen!r} leaves nothing to train: leave the head out.")
    return frozen


def still(net: nn.Module, every: bool = False) -> None:
    """Put normalisation layers with running statistics into eval mode, so that they use and keep the statistics they have.

    Args:
        net: the classifier.
        every: all of them; else those whose parameters are frozen, for their statistics are a part of what is frozen.
    """
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(getattr(module, "running_mean", None), Tensor) and (every or (own and not any(p.requires_grad for p in own))):
            module.eval()
