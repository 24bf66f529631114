"""The planted-evidence data set: deterministic, exact masks, textures inside alike silhouettes, an optional shortcut."""

import pytest
import torch
from torch.utils.data import DataLoader

from explainer.data.contract import collate
from explainer.data.shapes import DEFAULT_CLASSES, TEXTURES, Shapes, _symmetry
from explainer.errors import ConfigError


def test_same_index_same_image_whatever_the_order_and_the_workers():
    a, b = Shapes(split="val", length=12, cache=False), Shapes(split="val", length=12)
    forward = [a[i] for i in range(12)]
    backward = {i: b[i] for i in reversed(range(12))}
    for i, sample in enumerate(forward):
        torch.testing.assert_close(sample.image, backward[i].image, rtol=0, atol=0)
        torch.testing.assert_close(sample.masks, backward[i].masks, rtol=0, atol=0)
    loaded = [DataLoader(Shapes(split="val", length=12), batch_size=4, num_workers=n, collate_fn=collate) for n in (0, 2)]
    for one, two in zip(*loaded, strict=True):
        assert torch.equal(one.images, two.images) and one.ids == two.ids


def test_splits_seeds_and_indices_differ():
    images = [Shapes(split=s, seed=seed, length=2)[i].image for s in ("train", "val") for seed in (0, 1) for i in (0, 1)]
    for i, one in enumerate(images):
        for other in images[i + 1 :]:
            assert (one - other).abs().max() > 0.1


def test_targets_are_the_classes_of_the_masks():
    data = Shapes(split="test", length=60)
    counts = torch.zeros(data.num_classes)
    for i in range(60):
        s = data[i]
        assert s.image.shape == (3, 64, 64) and s.image.min() >= 0 and s.image.max() <= 1
        assert torch.equal(s.target, s.masks.flatten(1).amax(dim=1))
        assert s.masks.sum(dim=0).max() <= 1, "objects do not overlap"
        assert 1 <= s.target.sum() <= 3
        counts += s.target
    assert (counts > 5).all()


def test_texture_is_inside_the_mask_and_nowhere_else():
    """High-frequency energy: strong inside objects; distractors and background carry only the pixel noise."""
    data = Shapes(split="test", length=40)
    inside, outside = [], []
    for i in range(40):
        s = data[i]
        grey = s.image.mean(dim=0)
        step = (grey[1:-1, 2:] - grey[1:-1, :-2]).abs() + (grey[2:, 1:-1] - grey[:-2, 1:-1]).abs()
        union = s.masks.amax(dim=0)
        eroded = -torch.nn.functional.max_pool2d(-union[None], 5, 1, 2)[0]
        inside.append(step[eroded[1:-1, 1:-1] > 0].mean())
        outside.append(step[union[1:-1, 1:-1] == 0].median())
    assert torch.stack(inside).nanmean() > 3 * torch.stack(outside).mean()


def test_every_texture_is_its_own():
    """With the same coordinates, period and phase, no two textures agree."""
    import numpy as np

    v, u = np.mgrid[-20:20, -20:20].astype(np.float32)
    drawn = {name: draw(u, v, 8.0, 0.2) for name, draw in TEXTURES.items()}
    for name, one in drawn.items():
        assert one.min() >= 0 and one.max() <= 1 and one.std() > 0.2, name
        for other in TEXTURES:
            if other != name:
                assert abs(np.corrcoef(one.ravel(), drawn[other].ravel())[0, 1]) < 0.8, (name, other)


def test_scale_follows_the_size():
    small, large = (Shapes(split="val", size=size, length=40) for size in (64, 160))
    area = [torch.stack([d[i].masks.amax(dim=0).mean() for i in range(40)]).mean() for d in (small, large)]
    assert abs(area[0] - area[1]) < 0.04 and 0.15 < area[0] < 0.28


def test_shortcut_co_occurs_with_its_class():
    data = Shapes(split="train", length=200, shortcut_class="dots", shortcut_probability=0.8, shortcut_leak=0.1)
    k = data.class_names.index("dots")
    seen = {True: [], False: []}
    for i in range(200):
        s = data[i]
        assert s.cues.shape == s.masks.shape and s.cues.sum(dim=(1, 2)).nonzero().tolist() in ([], [[k]])
        cue = s.cues[k]
        if cue.any():
            assert (s.masks * cue).sum() == 0
            color = s.image[:, cue.bool()].mean(dim=1)
            assert color[2] < 0.7 and abs(color[0] - 0.5) < 0.15
        seen[bool(s.target[k])].append(bool(cue.any()))
    assert 0.65 < sum(seen[True]) / len(seen[True]) < 0.92
    assert 0.03 < sum(seen[False]) / len(seen[False]) < 0.2
    assert Shapes(split="val", length=1)[0].cues is None


def test_unlabelled_textures_have_no_mask():
    plain = Shapes(split="val", length=30)
    unseen = Shapes(split="val", length=30, unlabelled=("waves", "triangles"))
    different = [i for i in range(30) if not torch.equal(plain[i].image, unseen[i].image)]
    assert different and all(unseen[i].target.shape == (6,) for i in different)


def test_fingerprint_follows_the_options():
    base = Shapes(split="val")
    assert base.fingerprint() == Shapes(split="val").fingerprint()
    for change in ({"size": 96}, {"seed": 1}, {"length": 5}, {"shortcut_class": "dots"}, {"class_names": DEFAULT_CLASSES[::-1]}):
        assert Shapes(split="val", **change).fingerprint() != base.fingerprint(), change


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be"),
        ({"size": 16}, "32..512"),
        ({"class_names": ["stripes", "plaid"]}, "unknown class 'plaid'. Textures: stripes"),
        ({"class_names": ["dots", "dots"]}, "distinct"),
        ({"shortcut_class": "waves"}, "shortcut_class must be one of"),
        ({"length": 0}, "at least 1"),
        ({"max_objects": 0}, "max_objects must be >= 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Shapes(**{"split": "val", **options})


def test_symmetry_moves_image_and_masks_together_and_follows_the_epoch():
    plain, turned = Shapes(split="train", length=8), Shapes(split="train", length=8, augment="symmetry")
    changed = 0
    for index in range(8):
        a, b = plain[index], turned[index]
        fits = [e for e in range(8) if torch.equal(_symmetry(a.image, e), b.image)]
        assert len(fits) == 1 and torch.equal(_symmetry(a.masks, fits[0]), b.masks) and torch.equal(a.target, b.target)
        changed += fits != [0]
    assert changed >= 4
    first = turned[3].image
    turned.set_epoch(1)
    others = []
    for epoch in range(1, 6):
        turned.set_epoch(epoch)
        others.append(torch.equal(first, turned[3].image))
    assert not all(others)
