"""Image and masks move together, and a sample's augmentation is a function of its generator."""

from __future__ import annotations

import pytest
import torch

from explainer.data.transforms import Augmentation, resize_image, resize_masks
from explainer.errors import ConfigError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coordinates(size: int = 64) -> torch.Tensor:
    """An image whose red channel says the column and whose green channel says the row."""
    ramp = torch.arange(size, dtype=torch.uint8) * 3
    return torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size, dtype=torch.uint8)])


def test_masks_are_resized_by_the_nearest_centre() -> None:
    mask = torch.tensor([[[1, 2, 3, 4, 5, 6]]], dtype=torch.uint8)
    assert resize_masks(mask, 1, 2).tolist() == [[[2, 5]]]  # centres 1.5 and 4.5; torchvision's default would take 1 and 4
    assert resize_masks(mask, 1, 12).tolist() == [[[1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]]]
    labels = torch.randint(0, 2, (1, 31, 17), generator=generator(0)).to(torch.uint8) * 255
    assert set(resize_masks(labels, 20).unique().tolist()) <= {0, 255}


def test_images_are_squashed_with_antialiasing() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).expand(3, 16, 64)
    squashed = resize_image(stripes, 16)
    assert squashed.shape == (3, 16, 16) and squashed.dtype == torch.uint8
    assert (squashed.float() - 127.5).abs().max() < 40  # without antialiasing: 0 or 255
    assert resize_image(squashed, 16) is squashed


def test_no_augmentation_changes_nothing() -> None:
    image, mask = coordinates(), torch.arange(64 * 64).view(1, 64, 64).remainder(7).to(torch.uint8)
    out, layers = Augmentation()(image, mask, (64, 64), generator(0))
    assert torch.equal(out, image) and layers is not None and torch.equal(layers, mask)
    assert type(out) is torch.Tensor and Augmentation()(image, None, (64, 64), generator(0))[1] is None


def test_flip_mirrors_both_with_its_probability() -> None:
    image = coordinates()
    mask = image[:1]
    flipped = [Augmentation(flip=0.3)(image, mask, (64, 64), generator(s)) for s in range(400)]
    share = sum(int(not torch.equal(i, image)) for i, _ in flipped) / 400
    assert 0.22 < share < 0.38
    for i, m in flipped:
        assert m is not None and torch.equal(i[:1], m)
    always, _ = Augmentation(flip=1.0)(image, mask, (64, 64), generator(0))
    assert torch.equal(always, image.flip(-1))


@pytest.mark.parametrize("seed", range(5))
def test_crops_move_image_and_mask_alike_and_keep_the_asked_area(seed: int) -> None:
    image = coordinates()
    augmentation = Augmentation(flip=0.5, crop_scale=(0.3, 0.6))
    out, layers = augmentation(image, image[:2], (32, 32), generator(seed))
    assert layers is not None and out.shape == (3, 32, 32)
    assert (out[:2].float() - layers.float()).abs().max() <= 3 * 2  # bilinear against nearest: within two source pixels
    spread = [(layers[c].max().item() - layers[c].min().item()) / 3 + 1 for c in (0, 1)]
    assert 0.25 < spread[0] * spread[1] / 64**2 < 0.65


def test_the_working_size_keeps_the_smallest_crop_sharp() -> None:
    assert Augmentation(flip=0.5).working_size((96, 64)) == (96, 64)
    assert Augmentation(crop_scale=(0.5, 1)).working_size((96, 64)) == (136, 91)
    assert Augmentation(crop_scale=(0.01, 1)).working_size((96, 64)) == (192, 128)


def test_colour_factors_stay_in_their_ranges() -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    values = [Augmentation(brightness=0.2)(grey, None, (8, 8), generator(s))[0][0, 0, 0].item() for s in range(100)]
    assert 79 <= min(values) < 85 and 115 < max(values) <= 120
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 200
    hues = torch.stack([Augmentation(hue=0.2)(red, None, (8, 8), generator(s))[0][:, 0, 0] for s in range(30)])
    assert hues.unique(dim=0).shape[0] > 10 and (hues.max(1).values > 195).all()
    flat = Augmentation(contrast=0.5, saturation=0.5)(grey, None, (8, 8), generator(1))[0]
    assert (flat.int() - 100).abs().max() <= 2  # nothing to contrast or saturate: rounding only


def test_the_result_depends_on_the_generator_alone() -> None:
    everything, image = Augmentation.parse("standard"), coordinates()
    torch.manual_seed(0)
    first = everything(image, None, (32, 32), generator(5))[0]
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(everything(image, None, (32, 32), generator(5))[0], first)
    assert not torch.equal(everything(image, None, (32, 32), generator(6))[0], first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was not touched


def test_configurations_are_parsed_and_checked() -> None:
    assert Augmentation.parse(None) == Augmentation() == Augmentation.parse("none")
    assert Augmentation.parse({"flip": 0.1, "crop_scale": [0.5, 1.0]}) == Augmentation(flip=0.1, crop_scale=(0.5, 1.0))
    for value, message in (
        ("strong", "augment must be one of none, light, standard or a mapping, got 'strong'"),
        (3, "augment must be one of"),
        ({"flp": 1}, "augment has no key 'flp'. Its keys: flip"),
        ({"flip": 2}, r"augment.flip must be a number in \[0, 1\], got 2"),
        ({"hue": 0.7}, r"augment.hue must be a number in \[0, 0.5\]"),
        ({"crop_scale": [1.0, 0.5]}, "augment.crop_scale must be two numbers, ascending"),
    ):
        with pytest.raises(ConfigError, match=message):
            Augmentation.parse(value)


def test_a_crop_has_the_form_of_an_image_that_is_not_square() -> None:
    ramp = torch.arange(90, dtype=torch.uint8).view(1, 90, 1).expand(3, 90, 60).contiguous()
    ramp[1] = torch.arange(60, dtype=torch.uint8)
    half = Augmentation(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))  # half the height and half the width: 45 x 30
    out, layers = half(ramp, ramp[:2], (45, 30), generator(3))
    assert out.shape == (3, 45, 30) and layers is not None and layers.shape == (2, 45, 30)
    assert torch.equal(out[:2], layers) and int(out[0].max() - out[0].min()) == 44 and int(out[1].max() - out[1].min()) == 29
