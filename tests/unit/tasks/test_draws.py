"""Random numbers of a step belong to images, not to places in a batch or to processes."""

import pytest
import torch

from explainer.config import MaskingConfig
from explainer.fills import alternative_fill, make_fill
from explainer.tasks.draws import Draws
from explainer.tensors import Batch
from tests.unit.tasks.test_explain import make_batch, make_task


def batch(ids, epochs=()):
    return Batch(torch.zeros(len(ids), 3, 4, 4), torch.zeros(len(ids), 2), ids=tuple(ids), epochs=tuple(epochs))


def test_an_images_numbers_do_not_depend_on_its_neighbours_or_the_step():
    whole = Draws(7, 3, batch("abcd", (1, 1, 1, 1))).uniform(5)
    even, odd = Draws(7, 3, batch("ac", (1, 1))).uniform(5), Draws(7, 3, batch("bd", (1, 1))).uniform(5)
    assert torch.equal(whole[[0, 2]], even) and torch.equal(whole[[1, 3]], odd)
    assert torch.equal(whole, Draws(7, 9, batch("abcd", (1, 1, 1, 1))).uniform(5)), "seed, epoch and image alone"
    assert len({*whole.flatten().tolist()}) == 20
    for other in (Draws(8, 3, batch("a", (1,))), Draws(7, 3, batch("a", (2,))), Draws(7, 3, batch("a", (1,)), "other use")):
        assert not torch.equal(other.uniform(5)[0], whole[0])


def test_a_stream_goes_on_and_the_steps_own_stream_is_shared():
    draws = Draws(7, 3, batch("ab", (0, 0)))
    first, second = draws.uniform(2), draws.uniform(2)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second], 1), Draws(7, 3, batch("ab", (0, 0))).uniform(4))
    assert torch.rand(1, generator=draws.common) == torch.rand(1, generator=Draws(7, 3, batch("c", (5,))).common)
    assert torch.rand(1, generator=Draws(7, 3, batch("a")).common) != torch.rand(1, generator=Draws(7, 4, batch("a")).common)


def test_evaluation_draws_the_same_in_every_epoch():
    a, b = Draws(7, -1, batch("ab", (0, 0))), Draws(7, -1, batch("ab", (4, 4)))
    assert torch.equal(a.uniform(3), b.uniform(3))


@pytest.mark.parametrize(
    "fill",
    [
        lambda x, g: make_fill(x, "noise", generator=g),
        lambda x, g: alternative_fill(x, torch.zeros(3), torch.ones(3), generator=g, kind="color"),
    ],
)
def test_fills_by_one_generator_an_image_are_each_images_own(fill):
    images = torch.rand(3, 3, 8, 8)
    each = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    whole = fill(images, each(1, 2, 3))
    torch.testing.assert_close(whole[1:2], fill(images[1:2], each(2)), rtol=0, atol=0)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("fill", ["noise", "blur", "alternative"])
def test_a_step_shared_by_two_processes_computes_what_one_does(fill):
    """Everything random of a step: binarisation, subsets, areas, fill. Rank r takes every second image."""
    task = make_task(MaskingConfig(binarize=0.5, subset=0.5, area_conditioned=0.5, fill=fill))
    task.eval()
    whole = make_batch()
    parts = [whole.map(lambda t, r=r: t[r::2]) for r in (0, 1)]
    parts = [Batch(p.images, p.targets, p.masks, ids=whole.ids[r::2]) for r, p in enumerate(parts)]
    e = task._explanation(whole, "train")
    for rank, part in enumerate(parts):
        own = task._explanation(part, "train")
        assert torch.equal(own.shown, e.shown[rank::2])
        torch.testing.assert_close(own.class_masks, e.class_masks[rank::2], rtol=0, atol=1e-6)
        torch.testing.assert_close(own.logits_masked, e.logits_masked[rank::2], rtol=0, atol=1e-5)
