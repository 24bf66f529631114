"""Every key of a run's configuration has a rule for resumes, and the rule is what happens."""

import copy
import logging
from types import SimpleNamespace

import pytest

from explainer.config import RunConfig, TeacherConfig
from explainer.errors import ConfigError
from explainer.tasks.run_identity import FACTS, RULES, Earlier, facts, images_per_step, keys, settings

KEYS = tuple(keys(RunConfig))
OF_A_CLASSIFIER = ("classifier.freeze", "classifier.batch_norm", "classifier.loss", "classifier.occlusion", "classifier.mask_augmentation")


def test_every_key_has_a_rule():
    assert set(KEYS) == set(RULES), "a new key of RunConfig needs a rule in RULES: refuse, say or free"
    assert len(KEYS) == len(set(KEYS)) > 90


def config(task):
    run = RunConfig(task=task, teachers=[TeacherConfig()])
    run.classifier.mean, run.classifier.std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    return run


def values(run):
    """As :func:`explainer.commands.fit.fit` collects them."""
    c = run.classifier
    data = SimpleNamespace(class_names=("a", "b"), task="multilabel", size=32, fingerprints=lambda: {"train": "12", "val": "34"})
    task = SimpleNamespace(explanandum=SimpleNamespace(normalization=(c.mean, c.std)))
    if run.task == "explain":
        task.explainer = SimpleNamespace(config={"options": run.explainer.options})
    return {**settings(run), **facts(run, task, data), **images_per_step(run, 1)}


def another(value):
    """A value of about the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {**value, "another": 1}
    if isinstance(value, list):
        return [0.125, *value[1:]]
    return "another"


def changed(run, key):
    run = copy.deepcopy(run)
    section, *parts = run, *key.split(".")
    for name in parts[:-1]:
        section = getattr(section, name)
        section = section[0] if isinstance(section, list) else section
    setattr(section, parts[-1], another(getattr(section, parts[-1])))
    return run


@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("task", "teachers.options")])
def test_the_rule_is_what_happens(key, caplog):
    run = config("classify" if key.startswith(OF_A_CLASSIFIER) else "explain")
    earlier, given = Earlier("old.ckpt", values(run)), values(changed(run, key))
    earlier.require_same(values(run))
    assert not caplog.records
    dictionaries = ("data.options", "data.train_options", "data.eval_options", "losses", "trainer.extra")
    named = f"{key}.another" if key in dictionaries else key
    with caplog.at_level(logging.WARNING):
        if RULES[key] == "refuse":
            with pytest.raises(ConfigError, match=rf"{named}.* is .* and was .* when old\.ckpt was written.*--init_from old\.ckpt"):
                earlier.require_same(given)
            return
        earlier.require_same(given)
    assert (f"{named} is " in caplog.text) == (RULES[key] == "say")


def test_which_keys_make_a_run_another_one():
    refused = {key for key, rule in RULES.items() if rule == "refuse"}
    assert {
        "seed",
        "task",
        "data.batch_size",
        "data.options",
        "data.global_batch",
        "masking.fill",
        "explainer.network",
        "classifier.arch",
        "classifier.mean",
        "trainer.accumulate_grad_batches",
        "optimizer.lr",
    } <= refused
    assert RULES["losses"] == "say", "weights of the losses may be changed on the way"
    assert {RULES[k] for k in ("trainer.max_epochs", "data.num_workers", "logging.wandb", "run_dir")} == {"free"}


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("classes", ["b", "a"], r"trained for the classes a, b, the data has b, a \(in another order\)"),
        ("classes", ["a", "c"], "trained for the classes a, b, the data has a, c"),
        ("labels", "multiclass", "labels is multiclass and was multilabel"),
        ("image_size", 64, "image_size is 64 and was 32"),
        ("images", {"train": "99", "val": "34"}, "images.train is 99 and was 12"),
        ("classifier.std", [1.0, 1.0, 1.0], "classifier.std is"),
    ],
)
def test_facts_are_compared(fact, value, words):
    known = values(config("explain"))
    assert set(FACTS) <= set(known)
    with pytest.raises(ConfigError, match=words):
        Earlier("old.ckpt", known).require_same({**known, fact: value})


def test_another_number_of_processes_is_said(caplog):
    run = config("explain")
    earlier = Earlier("old.ckpt", values(run))
    earlier.require_same(images_per_step(run, 2))
    assert "images_per_step is 32 and was 16" in caplog.text
    caplog.clear()
    run.data.global_batch = True
    earlier.require_same(images_per_step(run, 2))
    assert not caplog.text


def test_paths_and_starts_are_no_difference():
    run, moved = config("explain"), config("explain")
    run.data.options = {"root": "/data/one", "size": 32}
    moved.data.options = {"root": "/mnt/two", "size": 32}
    run.explainer.options = {"encoder_name": "resnet18", "encoder_weights": "imagenet"}
    moved.explainer.options = {"encoder_name": "resnet18", "encoder_weights": None}
    run.classifier.arch, moved.classifier.arch = "onnx:/a/net.onnx", "onnx:net.onnx"
    moved.classifier.checkpoint = "/mnt/two/best.ckpt"
    Earlier("old.ckpt", values(run)).require_same(values(moved))
    assert "/" not in str(values(run))


def test_older_checkpoints_are_compared_in_what_they_say():
    earlier = Earlier("old.ckpt", {"optimizer.lr": 0.1})
    earlier.require_same({"optimizer.lr": 0.1, "seed": 4})
    with pytest.raises(ConfigError, match=r"optimizer\.lr is 0\.2 and was 0\.1"):
        earlier.require_same({"optimizer.lr": 0.2})
