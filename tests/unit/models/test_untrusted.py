"""What a checkpoint may name: no code, no file and no address that its reader has not named as well."""

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import CheckpointError
from explainer.models.checkpoints import load_explanandum
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer

CALLS = []


def own(num_classes, width=4):
    """A builder outside the project; remembers that it ran."""
    CALLS.append(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


OWN = "tests.unit.models.test_untrusted:own"


def write(path, arch, options, net=None, **section):
    """A checkpoint as the classify task writes it."""
    described = {"arch": arch, "options": options, "mean": [0.5] * 3, "std": [0.5] * 3, "input_size": None, **section}
    values = {"kind": "classifier", "classifier": described, "num_classes": 2, "task": "multilabel", "class_names": ["a", "b"]}
    state = {} if net is None else {f"classifier.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": values}, path)
    return path


def test_a_file_does_not_choose_what_runs(tmp_path):
    """The attack that worked: torch.hub.load of a local folder whose hubconf.py is the payload."""
    payload = tmp_path / "repo/hubconf.py"
    payload.parent.mkdir()
    mark = tmp_path / "executed"
    payload.write_text(f"import pathlib\ndef net(num_classes, **_):\n    pathlib.Path({str(mark)!r}).write_text('')\n")
    options = {"repo_or_dir": str(payload.parent), "model": "net", "source": "local"}
    file = write(tmp_path / "evil.ckpt", "torch.hub:load", options)
    for given in ({}, {"arch": OWN}, {"arch": "torch.hub", "options": options}):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt names the classifier 'torch\.hub:load'.*--classifier\.arch torch\.hub:load"):
            load_explanandum(file, **given)
    with pytest.raises(CheckpointError, match="give the same"):
        load_explanandum(file, "torch.hub:load", {"repo_or_dir": str(tmp_path), "model": "net", "source": "local"})
    assert not mark.exists()


def test_the_users_own_choice_counts(tmp_path):
    torch.manual_seed(0)
    net = own(2, width=5)
    file = write(tmp_path / "mine.ckpt", OWN, {"width": 5}, net)
    CALLS.clear()
    with pytest.raises(CheckpointError, match="code from outside this project"):
        load_explanandum(file)
    with pytest.raises(CheckpointError, match=r"other classifier\.options \({'width': 5}\) than are given \({}\)"):
        load_explanandum(file, OWN)
    assert not CALLS, "nothing was called"
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(load_explanandum(file, OWN, {"width": 5})(x), net.eval()((x - 0.5) / 0.5))
    assert CALLS == [5]


@pytest.mark.parametrize("rest", ["hf-hub:someone/net", "local-dir:net", "someone/net", "resnet18 "])
def test_timm_takes_names_only(tmp_path, rest):
    with pytest.raises(CheckpointError, match="code from outside this project"):
        load_explanandum(write(tmp_path / "x.ckpt", f"timm:{rest}", {}))


def test_networks_that_fetch_something_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="code from outside"):
        load_explanandum(write(tmp_path / "x.ckpt", "torchvision:fasterrcnn_resnet50_fpn", {}))
    for options in (
        {"checkpoint_path": "/etc/x.pth"},
        {"pretrained_cfg_overlay": {"file": "/etc/x.pth"}},
        {"pretrained_cfg": {"url": "http://example.org/x.pth"}},
        {"head": [{"source": "local"}]},
    ):
        file = write(tmp_path / "x.ckpt", "timm:resnet18", options)
        with pytest.raises(CheckpointError, match="makes a library read another file or address"):
            load_explanandum(file)
        with pytest.raises(CheckpointError, match="makes a library read another file or address"):
            load_explanandum(file, "timm:resnet18", {"checkpoint_path": "another"})


@pytest.mark.parametrize(
    ("arch", "start"), [("timm:resnet10t", {"pretrained": True}), ("torchvision:squeezenet1_1", {"weights": "DEFAULT"})]
)
def test_pretrained_starts_are_not_fetched_again(tmp_path, monkeypatch, arch, start):
    net = build_classifier(arch, 2)

    def refuse(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    loaded = load_explanandum(write(tmp_path / "x.ckpt", arch, start, net))
    torch.testing.assert_close(loaded.classifier.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": 7}, "does not say which classifier"),
        ({"options": ["weights"]}, "does not say which classifier"),
        ({"mean": "grey"}, "describes itself wrongly"),
        ({"options": {"widths": [-1]}}, "describes itself wrongly"),
        ({"options": {"color": 1}}, "describes itself wrongly"),
    ],
)
def test_nonsense_is_answered_in_words(tmp_path, change, message):
    arguments = {"arch": "small_vgg", "options": {"widths": [4]}, **change}
    with pytest.raises(CheckpointError, match=message):
        load_explanandum(write(tmp_path / "x.ckpt", **arguments))


def test_a_file_without_its_description(tmp_path):
    torch.save({"hyper_parameters": {"kind": "classifier", "classifier": {"arch": "small_vgg"}}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="does not say num_classes, task, class_names, options, mean, std, input_size"):
        load_explanandum(tmp_path / "x.ckpt")
    file = write(tmp_path / "y.ckpt", "small_vgg", {"widths": [4]})
    torch.save({**torch.load(file), "state_dict": 3}, file)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_explanandum(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_name": "tu-hf-hub:someone/net"}, "names the encoder 'tu-hf-hub:someone/net'"),
        ({"encoder_name": "tu-local-dir:net"}, "names the encoder"),
        ({"encoder_name": "tu-resnet10t", "checkpoint_path": "x.pth"}, "option checkpoint_path"),
        ({"encoder_name": "tu-resnet10t", "pretrained_cfg_overlay": {"file": "x"}}, "option pretrained_cfg_overlay"),
        ("resnet18", "does not say how its Explainer is built"),
    ],
)
def test_an_explainers_file_does_not_fetch_either(tmp_path, options, message):
    config = {**Explainer("vgg_unet", 2, {"widths": [4, 4], "decoder_channels": [4]}).config, "network": "unet", "options": options}
    torch.save({"state_dict": {}, "hyper_parameters": {"kind": "explainer", "explainer": config}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=message):
        explainer.load(tmp_path / "x.ckpt")


def test_pretrained_timm_encoders_are_not_fetched_again(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    options = {"encoder_name": "tu-resnet10t", "encoder_depth": 2, "decoder_channels": [8, 4], "encoder_weights": "imagenet"}
    config = {**Explainer("vgg_unet", 2, {"widths": [4, 4], "decoder_channels": [4]}).config, "network": "unet", "options": options}
    net = Explainer.from_config(config)
    assert net.config["options"] == options
