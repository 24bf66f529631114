"""Context managers that watch or change a network and undo themselves, also after an exception or Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from explainer.attribution.rest import at_rest
from explainer.errors import ConfigError

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the model is at rest (:func:`~explainer.attribution.rest.at_rest`): in eval mode, frozen, in one thread's hands.

    Whatever happens there, the model leaves with its modes, ``requires_grad``, ``.grad``, hooks, ``inplace`` flags, ``forward``
    overrides and the global RNG state (CPU, and CUDA where the model lives there) as they were, and without new attributes (captum
    leaves some on its modules after an exception).
    """
    with at_rest(model), _restored(model):
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [m.training for m in modules]
    inplace = [(m, m.inplace) for m in modules if hasattr(m, "inplace")]
    overrides = [m.__dict__.get("forward") for m in modules]
    attributes = [set(vars(m)) for m in modules]
    tables = [[dict(getattr(m, t)) for t in _HOOK_TABLES] for m in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _, _ in parameters if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode, saved, override in zip(modules, modes, tables, overrides, strict=True):
                module.training = mode
                for name, table in zip(_HOOK_TABLES, saved, strict=True):
                    current = getattr(module, name)
                    for key in [k for k in current if k not in table]:
                        del current[key]
                if override is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = override
            for module, known in zip(modules, attributes, strict=True):
                for name in set(vars(module)) - known:
                    del module.__dict__[name]
            for module, flag in inplace:
                if module.inplace != flag:  # of scripted modules it is a constant
                    module.inplace = flag
            for parameter, wanted, grad in parameters:
                parameter.requires_grad_(wanted)
                parameter.grad = grad


@contextlib.contextmanager
def capture(*modules: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect every output of the modules, in call order, attached to the graph."""
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in modules}
    handles = [m.register_forward_hook(lambda mod, _, out: seen[mod].append(out)) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_paths(classifier: nn.Module) -> list[str]:
    """Module paths that can be named as a layer."""
    return [name for name, _ in classifier.named_modules() if name]


def find_layer(classifier: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` (relative to the user's classifier); a wrong path is answered with the list."""
    try:
        if not path:
            raise AttributeError
        return classifier.get_submodule(path)
    except AttributeError:
        known = ", ".join(layer_paths(classifier))
        raise ConfigError(f"layer {path!r} is not a module of {type(classifier).__name__}. Its modules: {known}.") from None
