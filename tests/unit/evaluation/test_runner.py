"""The runner: resumption, kills, several processes, the cache, and combinations that do not apply."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.evaluation.protocol import parse_protocols
from explainer.evaluation.protocols.segmentation import Segmentation
from explainer.evaluation.results import Row
from explainer.evaluation.runner import Runner
from explainer.evaluation.scene import Method
from tests.unit.evaluation.factories import Brightness, Dense, Noise, method, runner

PROTOCOLS = ["segmentation_per_class", {"insertion_deletion": {"steps": 2}}]


def rows_of(r: Runner) -> list[Row]:
    units, _ = r.collect()
    return [row for part in units.values() for unit in part for row in unit.rows]


def test_a_second_run_computes_nothing_and_a_new_protocol_only_itself(tmp_path):
    first = runner(tmp_path, [method("a"), method("d", Dense())], PROTOCOLS)
    assert first.run().computed == 2 * 2 * 3
    again = runner(tmp_path, [method("a"), method("d", Dense())], PROTOCOLS)
    assert again.run().computed == 0 and again.methods[0].attributor.asked == []
    assert rows_of(again) == rows_of(first)
    more = runner(tmp_path, [method("a"), method("d", Dense())], [*PROTOCOLS, "class_sensitivity"])
    assert more.run().computed == 2 * 3
    assert more.collect()[1] and not runner(tmp_path, [method("b")], PROTOCOLS).collect()[1]


def test_a_row_for_each_image_and_class(tmp_path):
    r = runner(tmp_path, [method("a", scales=("raw", "minmax"))], ["segmentation_per_class", "segmentation", "pointing_game"])
    r.run()
    rows = rows_of(r)
    labels = {i: [k for k, on in enumerate(r.dataset[i].target.tolist()) if on] for i in range(10)}
    per_class = [(x.index, x.class_index) for x in rows if x.protocol == "segmentation_per_class" and x.scale == "raw"]
    assert per_class == [(i, k) for i in range(10) for k in labels[i]]
    assert sum(x.protocol == "segmentation" for x in rows) == 20
    assert {x.scale for x in rows if x.protocol == "pointing_game"} == {"raw"}, "only masks are rescaled"
    assert all(x.image == r.dataset.sample_id(x.index) for x in rows)


def test_rows_are_those_of_a_loop_over_single_images(tmp_path):
    from explainer.metrics.segmentation import soft_iou

    r = runner(tmp_path, [method("a")], ["segmentation_per_class"])
    r.run()
    for row in rows_of(r):
        sample = r.dataset[row.index]
        mask = sample.image.mean(0) * (row.class_index + 1) / 3
        expected = soft_iou(mask[None], sample.masks[row.class_index][None].float())
        assert row.values["iou"] == pytest.approx(float(expected), abs=1e-6)


def test_whatever_decides_a_row_invalidates_it(tmp_path):
    base = {"methods": [method("a")], "protocols": PROTOCOLS}
    key = runner(tmp_path, **base).key(runner(tmp_path, **base).methods[0], "insertion_deletion", 0)

    def other(methods=None, protocols=None, **settings):
        r = runner(tmp_path, methods or [method("a")], protocols or PROTOCOLS, **settings)
        return r.key(r.methods[0], "insertion_deletion", 0)

    assert other() == key
    changed = {
        other(seed=1),
        other(batch_size=5),
        other(classes="predicted"),
        other(cache=tmp_path / "c"),
        other([method("a", scales=("minmax",))]),
        other([method("b")]),
        other(None, [{"insertion_deletion": {"steps": 3}}]),
    }
    assert key not in changed and len(changed) == 7
    r = runner(tmp_path, **base)
    r.fingerprints["classifier"] = "other"
    assert r.key(r.methods[0], "insertion_deletion", 0) != key
    assert other(limit=8) == key, "a batch that is whole in both is reused"


def test_images_and_methods_of_a_protocol(tmp_path):
    r = runner(tmp_path, [method("a"), method("b")], ["segmentation", {"class_sensitivity": {"images": 5, "methods": ["b"]}}])
    outcome = r.run()
    rows = [x for x in rows_of(r) if x.protocol == "class_sensitivity"]
    assert {x.method for x in rows} == {"b"} and [x.index for x in rows] == [0, 1, 2, 3, 4]
    assert outcome.computed == 2 * 3 + 2 and r.collect()[1]
    with pytest.raises(ConfigError, match="names 'c'"):
        runner(tmp_path, [method("a")], [{"segmentation": {"methods": ["c"]}}])


def test_maps_come_from_the_cache_and_give_the_same_rows(tmp_path):
    first = runner(tmp_path / "one", [method("a"), method("n", Noise())], PROTOCOLS, cache=tmp_path / "maps")
    first.run()
    assert first.methods[0].attributor.asked
    second = runner(tmp_path / "two", [method("a"), method("n", Noise())], PROTOCOLS, cache=tmp_path / "maps")
    second.run()
    assert second.methods[0].attributor.asked == [], "all maps were in the cache"
    assert rows_of(second) == rows_of(first)
    (shard, *_) = (tmp_path / "maps").glob("*/shard-*.npz")
    shard.write_bytes(shard.read_bytes()[:100])
    third = runner(tmp_path / "three", [method("a"), method("n", Noise())], PROTOCOLS, cache=tmp_path / "maps")
    outcome = third.run()
    assert rows_of(third) == rows_of(first) and "is damaged" in outcome.notices[0]


def test_two_ranks_share_the_batches_and_agree_with_one(tmp_path):
    alone = runner(tmp_path / "one", [method("a"), method("n", Noise())], PROTOCOLS)
    alone.run()
    ranks = [runner(tmp_path / "two", [method("a"), method("n", Noise())], PROTOCOLS, rank=r, world=2) for r in (0, 1)]
    computed = [r.run().computed for r in ranks]
    assert computed == [8, 4], "batches 0 and 2, and batch 1"
    assert rows_of(ranks[0]) == rows_of(alone)
    assert sorted(p.name[:7] for p in (tmp_path / "two" / "rows").iterdir()) == ["rank000", "rank001"]


def test_a_method_that_refuses_is_left_out_and_the_others_go_on(tmp_path):
    class Refuses(Brightness):
        name = "refuses"

        def _explain(self, images, class_index, generator, masks):
            raise UnsupportedLayerError("no rule for Softplus")

    r = runner(tmp_path, [method("bad", Refuses()), method("a")], ["segmentation"])
    outcome = r.run()
    assert outcome.failures == {"bad": "no rule for Softplus"}
    assert {x.method for x in rows_of(r)} == {"a"} and not r.collect()[1]


def test_a_protocol_that_refuses_the_data_costs_nothing_else(tmp_path, caplog):
    """`shapes` without a shortcut has no cues: the segmentation of every method stays."""
    from explainer.evaluation import summary

    r = runner(tmp_path, [method("a"), method("b")], ["segmentation", "shortcut"])
    outcome = r.run()
    assert outcome.failures == {} and set(outcome.refused) == {("a", "shortcut"), ("b", "shortcut")}
    assert outcome.computed == 2 * 3 and caplog.text.count("protocol shortcut is left out: shortcut: the data has no planted cues") == 2
    assert {x.method for x in rows_of(r)} == {"a", "b"} and not r.collect()[1] and r.collect(outcome.refused)[1]
    content = summary.build(r, rows_of(r), outcome, {}, bootstrap=0, confidence=0.95)
    assert [(x["method"], x["protocol"]) for x in content["skipped"]] == [("a", "shortcut"), ("b", "shortcut")]
    assert all("no planted cues" in x["reason"] for x in content["skipped"])


def test_a_protocol_that_fails_while_scoring_costs_nothing_else(tmp_path):
    class Bad(Segmentation):
        name = "bad"

        def score(self, scene, maps):
            raise UnsupportedLayerError("not with this classifier")

    r = runner(tmp_path, [method("a")], {"bad": Bad(), "segmentation": Segmentation()})
    outcome = r.run()
    assert outcome.refused == {("a", "bad"): "not with this classifier"} and outcome.computed == 3
    assert {x.protocol for x in rows_of(r)} == {"segmentation"}


def pictures(r: Runner, label: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((r.gallery.root / r.gallery.methods[label]).glob("*.png"))}


def test_the_gallery_shows_the_maps_of_the_method_that_was_evaluated_last(tmp_path):
    """Same label, same folder, other weights: the old pictures must not stand beside the new numbers."""

    class Other(Dense):
        def _explain_all(self, images):
            return 1 - images

    old = runner(tmp_path, [Method("explainer", Dense(), {"weights": "old"})], ["segmentation_per_class"], gallery=3)
    old.run()
    new = runner(tmp_path, [Method("explainer", Other(), {"weights": "new"})], ["segmentation_per_class"], gallery=3)
    new.run()
    before, after = pictures(old, "explainer"), pictures(new, "explainer")
    assert before and before.keys() == after.keys() and all(before[k] != after[k] for k in before)
    r = runner(tmp_path, [Method("explainer", Dense(), {"weights": "old"})], ["segmentation_per_class"], gallery=3)
    r.fingerprints["classifier"] = "another"
    assert r._gallery().methods != r.gallery.methods, "the maps of a per-image method are those of its classifier"
    r.fingerprints["data"] = "other"
    assert r._gallery().data != r.gallery.data


def test_a_larger_gallery_is_filled_from_finished_rows(tmp_path):
    protocols = ["segmentation", "segmentation_per_class", {"class_sensitivity": {"images": 4}}]
    first = runner(tmp_path, [method("a")], protocols, gallery=2)
    first.run()
    assert {n[:6] for n in pictures(first, "a")} == {"000002", "000007"}
    more = runner(tmp_path, [method("a")], protocols, gallery=5)
    assert more.run().computed == 0, "no number is computed again"
    assert {n[:6] for n in pictures(more, "a")} == {f"{i:06d}" for i in (1, 3, 5, 7, 9)} | {"000002"}
    whole = runner(tmp_path / "at once", [method("a")], protocols, gallery=5)
    whole.run()
    assert pictures(whole, "a").items() <= pictures(more, "a").items()
    assert all(more.gallery.image(i).is_file() for i in (1, 3, 5, 7, 9))
    third = runner(tmp_path, [method("a")], protocols, gallery=5)
    third.run()
    assert third.methods[0].attributor.asked == [], "everything is there"


def test_a_method_without_maps_is_not_asked_for_pictures(tmp_path):
    r = runner(tmp_path, [method("a")], [{"time": {"methods": ["a"], "images": 2}}], gallery=2)
    r.run()
    asked = len(r.methods[0].attributor.asked)
    again = runner(tmp_path, [method("a")], [{"time": {"methods": ["a"], "images": 2}}], gallery=2)
    again.run()
    assert asked and again.methods[0].attributor.asked == [] and pictures(again, "a") == {}
    assert again.gallery.indices == (0, 1), "only images that a protocol looks at"


def test_combinations_that_do_not_apply(tmp_path):
    r = runner(tmp_path, [method("a")], ["segmentation", {"manipulation": {"max_iterations": 1}}, "apop"])
    outcome = r.run()
    assert outcome.skipped == {("a", "manipulation"): "its map cannot be differentiated"}
    rows = rows_of(r)
    assert {x.method for x in rows if x.protocol == "apop"} == {"classifier"} and r.collect()[1]


def test_without_ground_truth_there_are_no_rows(tmp_path, monkeypatch):
    r = runner(tmp_path, [method("a")], ["segmentation", "pointing_game", "class_sensitivity"])
    original = type(r.dataset).__getitem__

    def bare(self, index):
        sample = original(self, index)
        sample.masks = None
        return sample

    monkeypatch.setattr(type(r.dataset), "__getitem__", bare)
    r.run()
    assert {x.protocol for x in rows_of(r)} == {"class_sensitivity"} and r.collect()[1]


def test_the_time_budget_stops_and_a_rerun_finishes(tmp_path, caplog):
    r = runner(tmp_path, [method("a")], ["segmentation"], time_budget=0.0)
    assert r.run().computed == 0 and "run the same command again" in caplog.text
    assert runner(tmp_path, [method("a")], ["segmentation"]).run().computed == 3


def test_predicted_classes(tmp_path):
    r = runner(tmp_path, [method("a")], ["segmentation_per_class"], classes="predicted")
    r.run()
    with torch.no_grad():
        for index in range(10):
            logits = r.explanandum(r.dataset[index].image[None])[0]
            expected = [k for k in range(3) if logits[k] >= 0] or [int(logits.argmax())]
            assert [x.class_index for x in rows_of(r) if x.index == index] == expected


def test_labels_of_methods(tmp_path):
    with pytest.raises(ConfigError, match="labels of their own"):
        runner(tmp_path, [method("a"), method("a")], ["segmentation"])
    with pytest.raises(ConfigError, match="labels of their own"):
        runner(tmp_path, [method("classifier")], ["segmentation"])
    with pytest.raises(ConfigError, match="twice"):
        parse_protocols(["segmentation", {"segmentation": {}}], "paper")


KILLED = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.unit.evaluation.factories import Brightness, method, runner

class Fatal(Brightness):
    def _explain(self, images, class_index, generator, masks):
        with open(sys.argv[2], "a") as log:
            log.write(f"{len(images)}\\n")
        if len(self.asked) == 2:
            os.kill(os.getpid(), 9)
        return super()._explain(images, class_index, generator, masks)

runner(Path(sys.argv[1]), [method("a", Fatal())], ["segmentation_per_class", {"insertion_deletion": {"steps": 2}}], batch_size=2).run()
"""


def test_kill_nine_in_the_middle_then_run_again(tmp_path):
    """The same numbers as an evaluation that nobody disturbed, and nothing computed twice but the batch in work."""
    root = Path(__file__).resolve().parents[3]
    log = tmp_path / "asked"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(log)], cwd=root, capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    # A kill may also fall into the middle of a write.
    (file,) = (tmp_path / "killed" / "rows").glob("*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"key": "x", "rows": [{"meth')
    before = [int(x) for x in log.read_text().split()]
    undisturbed = runner(tmp_path / "whole", [method("a")], PROTOCOLS, batch_size=2)
    undisturbed.run()
    again = runner(tmp_path / "killed", [method("a")], PROTOCOLS, batch_size=2)
    assert again.run().computed == 2 * 3, "two of five batches were finished"
    assert rows_of(again) == rows_of(undisturbed)
    asked = undisturbed.methods[0].attributor.asked
    assert before == asked[:3] and again.methods[0].attributor.asked == asked[2:]
    assert json.loads(file.read_text().splitlines()[0])["batch"] == 0
