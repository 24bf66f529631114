"""Rebuild a golden case's network from its manifest entry and load its arrays.

    entry, arrays, net = load("tv_0")

Keys of a case: in/<x> inputs, out/<x> what the reference returned, mid/<x> intermediate quantities,
out32/<x> the same call in float32, net/<key> weights. Needs numpy, torch, torchvision.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torchvision.models.resnet as tvr
from torch import nn

ROOT = Path(os.environ.get("GOLDEN_ROOT", Path(__file__).parent / "data"))
TRANSFORMERS = Path(os.environ.get("GOLDEN_TRANSFORMERS_ROOT", Path(__file__).parent / "data"))


# ----------------------------------------------------------------- networks
def _layer(spec):
    k, a = spec[0], spec[1:]
    if k == "conv":  # cin, cout, kernel, stride, padding, bias
        return nn.Conv2d(a[0], a[1], a[2], stride=a[3], padding=a[4], bias=bool(a[5]))
    if k == "relu":
        return nn.ReLU(inplace=False)
    if k == "maxpool":  # kernel, stride, padding
        return nn.MaxPool2d(a[0], a[1], a[2])
    if k == "avgpool":  # kernel, stride
        return nn.AvgPool2d(a[0], a[1])
    if k == "adaptiveavg":
        return nn.AdaptiveAvgPool2d((a[0], a[1]))
    if k == "flatten":
        return nn.Flatten()
    if k == "linear":
        return nn.Linear(a[0], a[1])
    if k == "bn":
        return nn.BatchNorm2d(a[0])
    if k == "dropout":
        return nn.Dropout(a[0])
    if k in ("basicblock", "bottleneck"):  # cin, planes, stride  (torchvision blocks)
        blk = tvr.BasicBlock if k == "basicblock" else tvr.Bottleneck
        cin, planes, stride = a
        out = planes * blk.expansion
        down = None
        if stride != 1 or cin != out:
            down = nn.Sequential(nn.Conv2d(cin, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        return blk(cin, planes, stride, down)
    raise ValueError(k)


class VGGLike(nn.Module):
    """features -> AdaptiveAvgPool2d(avgpool) -> flatten -> classifier (torchvision VGG layout)."""

    def __init__(self, features, avgpool, classifier):
        super().__init__()
        self.features = nn.Sequential(*[_layer(spec) for spec in features])
        self.avgpool = nn.AdaptiveAvgPool2d(tuple(avgpool))
        self.classifier = nn.Sequential(*[_layer(spec) for spec in classifier])

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class ResNetLike(nn.Module):
    """conv1-bn1-relu-[maxpool]-layer1..layerN-avgpool(1)-fc, torchvision ResNet layout.

    stem = [cin, cout, kernel, stride, padding]; maxpool = [k, s, p] or null;
    stages = [[block layer specs], ...].
    """

    def __init__(self, stem, maxpool, stages, fc):
        super().__init__()
        self.conv1 = nn.Conv2d(stem[0], stem[1], stem[2], stride=stem[3], padding=stem[4], bias=False)
        self.bn1 = nn.BatchNorm2d(stem[1])
        self.relu = nn.ReLU(inplace=False)
        self.maxpool = nn.MaxPool2d(*maxpool) if maxpool else nn.Identity()
        self.n = len(stages)
        for i, st in enumerate(stages):
            setattr(self, f"layer{i + 1}", nn.Sequential(*[_layer(spec) for spec in st]))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(*fc)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.n):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build_net(spec, state=None, dtype=torch.float64):
    t = spec["type"]
    if t == "sequential":
        net = nn.Sequential(*[_layer(spec) for spec in spec["layers"]])
    elif t == "vgg":
        net = VGGLike(spec["features"], spec["avgpool"], spec["classifier"])
    elif t == "resnet":
        net = ResNetLike(spec["stem"], spec["maxpool"], spec["stages"], spec["fc"])
    else:
        raise ValueError(t)
    if spec.get("inplace_relu"):
        for m in net.modules():
            if isinstance(m, nn.ReLU):
                m.inplace = True
    net = net.to(dtype).eval()
    if state is not None:
        own = net.state_dict()
        net.load_state_dict({k: torch.as_tensor(np.asarray(state[k])).to(own[k].dtype) for k in own})
    for p in net.parameters():
        p.requires_grad_(False)
    return net


# ----------------------------------------------------------------- loading
def manifest():
    return json.loads((ROOT / "manifest.json").read_text())


def load(name):
    """-> (manifest entry, dict of arrays, network in eval mode or None)."""
    m = manifest()
    entry = next(case for case in m["cases"] if case["name"] == name)
    with np.load(ROOT / entry["file"]) as z:
        arrays = {key: z[key] for key in z.files}
    net = None
    if entry.get("network"):
        state = {key[4:]: value for key, value in arrays.items() if key.startswith("net/")}
        net = build_net(m["networks"][entry["network"]], state, getattr(torch, entry.get("dtype", "float64")))
    return entry, arrays, net


def load_transformer(name, dtype=torch.float64):
    """-> (manifest entry, dict of arrays, timm network in eval mode) of a case in manifest_transformers.json."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    m = json.loads((TRANSFORMERS / "manifest_transformers.json").read_text())
    entry = next(case for case in m["cases"] if case["name"] == name)
    with np.load(TRANSFORMERS / entry["file"]) as z:
        arrays = {key: z[key] for key in z.files}
    spec = m["networks"][entry["network"]]
    classes = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled, SwinTransformer)}
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in spec["args"].items()}
    net = classes[spec["class"]](**args).to(dtype).eval()
    state = {key[4:]: torch.as_tensor(value).to(dtype) for key, value in arrays.items() if key.startswith("net/")}
    missing = net.load_state_dict({k: v if v.ndim else v.long() for k, v in state.items()}, strict=False).missing_keys
    buffers = {key for key, _ in net.named_buffers()}
    assert set(missing) <= buffers, missing
    return entry, arrays, net.requires_grad_(False)


def pair(v):
    return (int(v), int(v)) if np.isscalar(v) else (int(v[0]), int(v[1]))


def build_srd_net(arch, params, dtype=torch.float64):
    """The network of an srd_*.npz case as an nn.Module, submodules named after the nodes; features() ends at the encoder output."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            for n in arch["nodes"]:
                op, nm = n["op"], n["name"]
                if op == "conv":
                    m = nn.Conv2d(
                        n["cin"],
                        n["cout"],
                        pair(n["k"]),
                        pair(n.get("stride", 1)),
                        pair(n.get("pad", 0)),
                        pair(n.get("dil", 1)),
                        n.get("groups", 1),
                        n.get("bias", True),
                    )
                elif op == "bn":
                    m = nn.BatchNorm2d(n["c"], eps=n.get("eps", 1e-5))
                elif op == "act":
                    m = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}[n["fn"]]()
                elif op == "maxpool":
                    m = nn.MaxPool2d(pair(n["k"]), pair(n["stride"]), pair(n.get("pad", 0)))
                elif op == "avgpool":
                    m = nn.AvgPool2d(pair(n["k"]), pair(n["stride"]))
                else:
                    continue
                self.add_module(nm, m)
            for h in arch["head"]:
                if h["op"] == "linear":
                    self.add_module(h["name"], nn.Linear(h["cin"], h["cout"]))

        def features(self, x):
            u = {}
            for n in arch["nodes"]:
                if n["op"] == "input":
                    u[n["name"]] = x
                elif n["op"] == "add":
                    a = [u[s] for s in n["in"]]
                    y = a[0]
                    for z in a[1:]:
                        y = y + z
                    u[n["name"]] = y
                else:
                    source = n["in"][0] if isinstance(n["in"], list) else n["in"]
                    u[n["name"]] = getattr(self, n["name"])(u[source])
            return u[arch["encoder_out"]]

        def classify(self, z):
            for h in arch["head"]:
                if h["op"] == "gap":
                    z = z.mean(dim=(2, 3))
                elif h["op"] == "flatten":
                    z = z.flatten(1)
                elif h["op"] == "linear":
                    z = getattr(self, h["name"])(z)
                elif h["op"] == "relu":
                    z = z.relu()
            return z

        def forward(self, x):
            return self.classify(self.features(x))

    m = M().to(dtype)
    sd = {k: torch.as_tensor(np.asarray(v)).to(dtype) for k, v in params.items()}
    missing, unexpected = m.load_state_dict(sd, strict=False)
    assert not unexpected and all("num_batches" in k for k in missing), (missing, unexpected)
    return m.eval()


def load_srd(file):
    """-> (arch dict, dict of arrays, network). Layer maps are R.<t>.<node>; see manifest_srd.json for the keys."""
    with np.load(ROOT / file) as z:
        arrays = {key: z[key] for key in z.files}
    arch = json.loads(str(arrays["arch"]))
    params = {key[6:]: value for key, value in arrays.items() if key.startswith("param.")}
    return arch, arrays, build_srd_net(arch, params)


if __name__ == "__main__":
    for case in manifest()["cases"]:
        print(f"{case['name']:44} {case['kind']:24} {json.dumps(case['args'])[:110]}")
