"""The map cache: precision, resumption, several writers, and shards that cannot be trusted."""

from __future__ import annotations

import shutil

import pytest
import torch

from explainer.attribution.map_cache import MapCache, cached_maps, compute_pairs, dequantize, method_key, quantize
from explainer.commands.filling import wanted_classes
from explainer.errors import ConfigError, FingerprintMismatchError, ShapeError
from explainer.evaluation.scene import Scene
from explainer.tensors import Batch
from tests.unit.evaluation.factories import Brightness, Dense, explanandum

KEY = {"classifier": "c", "method": "m", "data": "d"}


def maps(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 5, 4, generator=torch.Generator().manual_seed(number))


def batch(first: int = 0, number: int = 2) -> Batch:
    images = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(first))
    return Batch(images, torch.zeros(number, 3), ids=tuple(f"i{first + i}" for i in range(number)))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-7), ("float16", 5e-4), ("uint8", 1 / 500)])
def test_precision_is_relative_to_each_map(dtype, error, scale):
    original = maps().double() * scale
    original[1] *= 1e-3
    back = dequantize(quantize(original, dtype)).double()
    span = (original.amax((1, 2)) - original.amin((1, 2)))[:, None, None]
    assert ((back - original).abs() <= error * 1.01 * span).all()
    constant = torch.full((1, 2, 2), 0.3 * scale)
    assert torch.allclose(dequantize(quantize(constant, dtype)), constant, rtol=1e-3, atol=0)


def test_undefined_maps_stay_undefined():
    broken = maps()
    broken[1, 0, 0] = torch.nan
    assert torch.isnan(dequantize(quantize(broken, "float16"))[1]).sum() == 1
    eight = dequantize(quantize(broken, "uint8"))
    assert torch.isnan(eight[1]).all() and not torch.isnan(eight[[0, 2]]).any()


def test_what_is_put_is_what_another_process_gets(tmp_path):
    first = MapCache(tmp_path, KEY)
    stored = first.put(["a", "a", "b"], [0, 2, 1], maps())
    second = MapCache(tmp_path, KEY, rank=1)
    found = second.get(["b", "a", "a", "a"], [1, 0, 2, 1])
    assert torch.equal(found[0], stored[2]) and torch.equal(found[1], stored[0]) and torch.equal(found[2], stored[1])
    assert found[3] is None and len(second) == 3 and ("a", 2) in second
    second.put(["c"], [0], maps(1))
    assert first.get(["c"], [0])[0] is not None, "a shard written later by another process must be found"


def test_keys_do_not_mix(tmp_path):
    MapCache(tmp_path, KEY).put(["a"], [0], maps(1))
    for other in ({**KEY, "method": "n"}, {**KEY, "options": {"layer": "x"}}):
        assert MapCache(tmp_path, other).get(["a"], [0]) == [None]
    assert MapCache(tmp_path, KEY, "uint8").get(["a"], [0]) == [None]


def test_a_foreign_shard_is_set_aside_with_a_notice(tmp_path, caplog):
    mine, foreign = MapCache(tmp_path, KEY), MapCache(tmp_path, {**KEY, "method": "n"})
    foreign.put(["a"], [0], maps(1))
    (shard,) = foreign.folder.glob("shard-*.npz")
    shutil.copy(shard, mine.folder / shard.name)
    fresh = MapCache(tmp_path, KEY)
    assert fresh.get(["a"], [0]) == [None]
    assert "belongs to another classifier, method or data set" in caplog.text and fresh.notices
    assert not list(fresh.folder.glob("shard-*.npz")) and list(fresh.folder.glob("*.rejected"))
    assert MapCache(tmp_path, KEY).notices == [], "the notice is given once"


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "text"])
def test_a_damaged_shard_is_computed_again(tmp_path, caplog, damage):
    attributor = Brightness()
    fresh = [m for _, m in cached_maps(MapCache(tmp_path, KEY), attributor, [batch(0), batch(2)])]
    assert sum(attributor.asked) == 12
    shards = sorted(MapCache(tmp_path, KEY).folder.glob("shard-*.npz"))
    content = bytearray(shards[0].read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 0xFF
    shards[0].write_bytes({"truncated": bytes(content[:-60]), "empty": b"", "altered": bytes(content), "text": b"not a zip"}[damage])
    again = [m for _, m in cached_maps(MapCache(tmp_path, KEY), attributor, [batch(0), batch(2)])]
    assert sum(attributor.asked) == 18, "only the damaged shard's six maps are computed again"
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    assert "its maps are computed again" in caplog.text


def test_a_shard_damaged_after_it_was_indexed(tmp_path):
    cache = MapCache(tmp_path, KEY)
    for i in range(8):
        cache.put([f"i{i}"], [0], maps(1))
    reader = MapCache(tmp_path, KEY)
    for shard in reader.folder.glob("shard-*.npz"):
        shard.write_bytes(b"")
    found = reader.get([f"i{i}" for i in range(8)], [0] * 8)
    assert all(m is None for m in found) and len(reader.notices) == 8


def test_an_unfinished_write_is_not_seen(tmp_path):
    cache = MapCache(tmp_path, KEY)
    cache.put(["a"], [0], maps(1))
    (shard,) = cache.folder.glob("shard-*.npz")
    shard.rename(cache.folder / f".{shard.name}.tmp")
    assert MapCache(tmp_path, KEY).get(["a"], [0]) == [None]


def test_wanted_classes_only(tmp_path):
    attributor = Brightness()
    wanted = torch.tensor([[True, False, False], [False, True, True]])
    ((_, found),) = cached_maps(MapCache(tmp_path, KEY, "float32"), attributor, [batch()], wanted=lambda _: wanted)
    assert sum(attributor.asked) == 3
    assert torch.isnan(found[~wanted]).all()
    assert torch.allclose(found[1, 2], batch().images[1].mean(0))


def test_dense_methods_and_shared_classes_give_the_same_pairs():
    images, wanted = batch().images, torch.tensor([[True, False, True], [True, False, True]])
    assert torch.equal(compute_pairs(Dense(), images, wanted), images[:, [0, 2]].flatten(0, 1))

    class Shared(Brightness):
        classes_share_work = True

        def all_classes(self, images, classes=None, **kwargs):
            self.asked.append(100 * len(images) + len(classes))
            return torch.stack([images.mean(1) * (k + 1) / 3 for k in classes], 1)

    shared = Shared()
    wanted = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.allclose(compute_pairs(shared, images, wanted), compute_pairs(Brightness(), images, wanted))
    assert shared.asked == [102, 102], "images that want other classes do not share a call"
    assert compute_pairs(Brightness(), images, torch.zeros(2, 3, dtype=torch.bool)).shape == (0, 6, 6)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match="float16"):
        MapCache(tmp_path, KEY, "int4")
    with pytest.raises(ConfigError, match="plain values"):
        MapCache(tmp_path, {"x": torch.ones(1)})
    with pytest.raises(ShapeError, match="N ids"):
        MapCache(tmp_path, KEY).put(["a"], [0, 1], maps(1))
    cache = MapCache(tmp_path, KEY)
    (cache.folder / "key.json").write_text("{}")
    with pytest.raises(FingerprintMismatchError, match="Delete it"):
        MapCache(tmp_path, KEY)


def test_options_with_defaults_and_a_revision_decide_a_methods_key():
    class Old(Brightness):
        def __init__(self, explanandum, steps=20, sizes=(1, 2)):
            pass

    class Changed(Old):
        def __init__(self, explanandum, steps=30, sizes=(1, 2)):
            pass

    class Repaired(Old):
        revision = 1

    plain = method_key("m", Old, {})
    assert plain == {"name": "m", "options": {"steps": 20, "sizes": [1, 2]}, "revision": 0}
    assert method_key("m", Old, {"steps": 20}) == plain, "typing a default out is no other method"
    assert plain != method_key("m", Changed, {}), "another default is another method"
    assert plain != method_key("m", Repaired, {}), "changed code is another method"
    assert plain != method_key("m", Old, {"sizes": [1, 3]})


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_predicted_means_the_same_for_the_cache_and_for_rows(task):
    net = explanandum(1, task)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        net.classifier[-1].bias -= net(images).mean(0) + 0.02
        net.classifier[-1].bias[0] -= net(images[:1])[0, 0]
        logits = net(images)
    assert (logits < 0).all(1).any() and ((logits > 0).sum(1) > 1).any() and logits[0, 0].abs() < 1e-6
    batch = Batch(images, torch.zeros(16, 3), ids=tuple("abcdefghijklmnop"))
    wanted = wanted_classes(batch, net, "predicted")
    assert torch.equal(wanted, Scene(batch, list(range(16)), net).predicted) and wanted.any(1).all()
    if task == "multiclass":
        assert (wanted.sum(1) == 1).all()


def test_few_of_many_classes_are_asked_by_name():
    asked = []

    class Many(Dense):
        num_classes = 40

        def _explain_all(self, images):
            pytest.fail("all classes were computed")

        def some(self, images, classes):
            asked.append(classes.tolist())
            return images[:, :1] * 0 + classes[:, :, None, None].to(images)

    wanted = torch.zeros(3, 40, dtype=torch.bool)
    wanted[0, [3, 30]] = wanted[2, 7] = True
    images = torch.rand(3, 3, 4, 4)
    maps = compute_pairs(Many(), images, wanted)
    assert maps[:, 0, 0].tolist() == [3, 30, 7] and len(asked[0]) == 2 and asked[0][0] == [3, 30] and 7 in asked[0][1]
