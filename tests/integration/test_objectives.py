"""Distillation, scores only, RTIS, areas and retraining through the real command line on tiny data."""

import csv
import json

import pytest
import torch

import explainer
from explainer.cli import main
from explainer.data.samplers import spread
from explainer.models.checkpoints import load_explanandum
from explainer.tasks.explain import ExplainTask
from tests.integration.test_train import TINY

NET = ["--explainer.network", "vgg_unet", "--explainer.options", "{widths: [8, 8], decoder_channels: [8]}", "--explainer.stride", "4"]


class FirstPixelRows:
    """A service: six scores, the means of six horizontal bands."""

    identity = "bands"

    def __call__(self, images):
        return torch.stack([band.mean((1, 2, 3)) for band in images.tensor_split(6, dim=2)], dim=1) * 4 - 2


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    assert main(["fit", "--task", "classify", "--run_dir", str(folder), "--classifier.options", "{widths: [8, 8]}", *TINY]) == 0
    return f"{folder}/checkpoints/best.ckpt"


def rows(folder):
    with (folder / "metrics.csv").open() as stream:
        return [row for row in csv.DictReader(stream) if row.get("train/loss")]


def test_distillation_from_a_cache_and_a_cam_as_a_warm_up(classifier, tmp_path, capsys):
    maps = [
        "maps",
        "--method.name",
        "rise",
        "--method.options",
        "{n_masks: 8, grid: 4}",
        "--cache.folder",
        str(tmp_path / "maps"),
        "--classifier.checkpoint",
        classifier,
        "--data.options",
        "{size: 32, length: 24}",
        "--data.train_options",
        "{augment: symmetry}",
    ]
    teachers = f"[{{name: rise, options: {{n_masks: 8, grid: 4}}, cache: {tmp_path}/maps}}, {{name: grad_cam, scale: max, weight: 0.5}}]"
    fit = [
        "fit",
        "--classifier.checkpoint",
        classifier,
        *TINY,
        *NET,
        "--data.train_options",
        "{augment: symmetry}",
        "--teachers",
        teachers,
        "--losses",
        "{distillation: {weight: [[0, 1], [0.5, 0]]}, classification: {weight: [[0.3, 0], [0.5, 1]]}}",
    ]
    assert main([*fit, "--run_dir", str(tmp_path / "early")]) == 2
    assert "explainer maps --method.name rise --split train" in capsys.readouterr().err
    assert main(maps) == 0
    printed = capsys.readouterr().out
    assert "maps of rise; 24 images" in printed
    assert main(maps) == 0 and "0 maps" not in capsys.readouterr().out
    assert main([*fit, "--run_dir", str(tmp_path / "run")]) == 0
    seen = rows(tmp_path / "run")
    early, late = seen[0], seen[-1]
    assert float(early["train/loss/distillation"]) > 0 and early["train/loss/classification"] == "nan"
    assert float(late["train/loss/classification"]) > 0 and late["train/loss/distillation"] == "nan"
    alone = [
        *fit[:-2],
        "--losses",
        "{distillation: {}}",
        "--teachers",
        f"[{{name: rise, options: {{n_masks: 8, grid: 4}}, cache: {tmp_path}/maps}}]",
    ]
    assert main([*alone, "--run_dir", str(tmp_path / "alone")]) == 2
    assert "the val split has no target maps" in capsys.readouterr().err
    assert main([*maps, "--split", "val", "--time_budget", "0"]) in (0, 1)
    assert main([*maps, "--split", "val"]) == 0
    assert main([*alone, "--run_dir", str(tmp_path / "alone")]) == 0
    assert json.loads((tmp_path / "alone/summary.json").read_text())["val/loss/distillation"] > 0


def test_a_run_computes_the_maps_it_lacks_and_draws_from_them_while_it_only_copies(classifier, tmp_path, capsys, monkeypatch):
    seen, plain = [], ExplainTask._explanation

    def spy(self, batch, stage):
        if stage == "train":
            seen.append(set(batch.ids))
        return plain(self, batch, stage)

    monkeypatch.setattr(ExplainTask, "_explanation", spy)
    teacher = f"name: guided_filter, scale: max, threshold: 0.2, cache: {tmp_path}/maps"
    fit = [
        "fit",
        "--classifier.checkpoint",
        classifier,
        *TINY,
        *NET,
        "--data.train_options",
        "{augment: symmetry}",
        "--losses",
        "{distillation: {weight: [[0, 1], [0.5, 0]], kind: dice}, classification: {weight: [[0.4, 0], [0.5, 1]]}}",
    ]
    assert main([*fit, "--teachers", f"[{{{teacher}, images: 5}}]", "--run_dir", str(tmp_path / "a")]) == 0
    assert "5 images" in capsys.readouterr().out
    known = {f"train/{i:06d}" for i in spread(24, 5)}
    # Six steps: progress 0, 1/6 and 2/6 copy alone; from 0.4 the classifier is asked, on all images.
    assert set().union(*seen[:3]) <= known and not set().union(*seen[3:]) <= known
    assert main([*fit, "--teachers", f"[{{{teacher}}}]", "--run_dir", str(tmp_path / "b")]) == 0
    weights = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in "ab"]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items()), "who filled the cache does not matter"
    elsewhere = f"[{{{teacher.replace('/maps', '/none')}, images: 5}}]"
    for wrong, said in (
        (["--teachers", "[{name: grad_cam, images: 5}]"], "teachers.grad_cam.images is the number of training images"),
        (["--teachers", elsewhere.replace("0.2", "5")], "teachers.threshold must lie in [0,1], received 5"),
        (["--teachers", elsewhere, "--masking.area_temperature", "0"], "masking.area_temperature must be positive"),
        (["--teachers", elsewhere, "--masking.binarize", "3"], "masking.binarize is a share of the images in [0,1], received 3.0"),
        (["--teachers", elsewhere, "--seed", "-1"], "seed must lie in 0..4294967295, received -1"),
        (["--teachers", elsewhere, "--evaluate_with", f"{tmp_path}/none.yaml"], "none.yaml does not exist"),
        (["--teachers", elsewhere, "--optimizer.encoder_lr", "-1"], "optimizer.encoder_lr is a positive factor"),
        (["--teachers", elsewhere, "--losses", "{distillation: {}}"], "the val split has no target maps"),
        (["--teachers", elsewhere.replace("images", "teaches: order, images")], "learns from teachers of masks, and there are none"),
        (["--teachers", elsewhere, "--losses", "{order: {}}"], "teachers of masks are given and no loss asks them"),
        (["--teachers", elsewhere, "--losses", "{distillation: {}, order: {}}"], "learns from teachers of order, and there are none"),
    ):
        assert main([*fit, *wrong, "--run_dir", str(tmp_path / "c")]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and "images in" not in printed.out, "nothing is computed for a run that is refused"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*fit, "--teachers", elsewhere, "--run_dir", str(tmp_path / "c")]) == 2
    assert "--limit 5 --spread true" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["test", *fit[1:], "--teachers", f"[{{{teacher}, images: 9}}]", "--run_dir", str(tmp_path / "a")]) == 0
    assert "images in" not in capsys.readouterr().out, "only training needs maps"
    maps = [
        "maps",
        "--method.name",
        "guided_filter",
        "--cache.folder",
        str(tmp_path / "maps"),
        "--classifier.checkpoint",
        classifier,
        "--data.options",
        "{size: 32, length: 24}",
        "--limit",
        "5",
        "--spread",
        "true",
    ]
    assert main(maps) == 0
    again = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, again[k]) for k, v in weights[0].items())


def test_scores_only(tmp_path, capsys):
    arch = "callable:tests.integration.test_objectives:FirstPixelRows"
    fit = ["fit", "--classifier.arch", arch, *TINY, *NET, "--run_dir", str(tmp_path / "r")]
    losses = ["--losses", "{coalition: {grid: 4, coalitions: 4}, area_bound: {}}"]
    assert main([*fit, *losses, "--classifier.options", f"{{budget: 5000, cache_file: {tmp_path}/answers.db}}"]) == 0
    assert all(float(r["train/loss/coalition"]) >= 0 for r in rows(tmp_path / "r"))
    assert (tmp_path / "answers.db").is_file()
    net = explainer.load(tmp_path / "r/checkpoints/best.ckpt")
    assert net.metadata["fingerprint"] == load_explanandum(None, arch, {}, 6, task="multilabel", class_names=net.class_names).fingerprint()
    again = [*fit, "--overwrite", "true"]
    assert main([*again, *losses, "--classifier.options", "{budget: 20}"]) == 2
    assert "the query budget of bands is used up" in capsys.readouterr().err
    assert main(again) == 2
    assert "gives scores only" in capsys.readouterr().err
    distil = ["--losses", "{distillation: {}}", "--teachers", "[{name: rise, options: {n_masks: 4, grid: 3}}]"]
    assert main([*again, *distil]) == 0


def test_rtis_and_areas_and_a_classifier_retrained_with_the_masks(classifier, tmp_path):
    run = tmp_path / "rtis"
    fit = ["fit", "--classifier.checkpoint", classifier, *TINY, *NET, "--run_dir", str(run)]
    options = [
        "--losses",
        "{rtis: {}}",
        "--masking.fill",
        "alternative",
        "--masking.area_conditioned",
        "0.5",
        "--masking.areas",
        "[0.1, 0.3]",
    ]
    assert main([*fit, *options]) == 0
    assert float(rows(run)[0]["train/loss/rtis"]) > 0
    masks = run / "checkpoints/best.ckpt"
    augmentation = ["--classifier.mask_augmentation.checkpoint", str(masks), "--classifier.mask_augmentation.classes", "[stripes]"]
    again = ["fit", "--task", "classify", "--classifier.options", "{widths: [8, 8]}", *TINY, *augmentation]
    again += ["--run_dir", str(tmp_path / "again"), "--init_from", classifier]
    assert main(again) == 0
    assert load_explanandum(tmp_path / "again/checkpoints/best.ckpt").fingerprint() != load_explanandum(classifier).fingerprint()
