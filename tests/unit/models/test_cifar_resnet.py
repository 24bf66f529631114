"""The networks of Han et al. 2024, Table 4."""

import pytest
import torch
from torch import nn

from explainer.errors import ConfigError
from explainer.models.classifiers import ACTIVATIONS, build_classifier


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_every_activation_is_replaced_and_the_last_map_is_4_by_4(activation):
    net = build_classifier("cifar_resnet50", 10, activation=activation).eval()
    kinds = {type(m) for m in net.modules() if isinstance(m, tuple({type(make()) for make in ACTIVATIONS.values()}))}
    assert kinds == {type(ACTIVATIONS[activation]())}
    seen = []
    net.layer4.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 10) and seen == [(1, 2048, 4, 4)]
    assert isinstance(net.maxpool, nn.Identity)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match=r"activation must be one of relu, .*, received 'mish'"):
        build_classifier("cifar_resnet50", 10, activation="mish")
