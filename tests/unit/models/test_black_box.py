"""Classifiers that give scores only: answers, cache, budget, ONNX files, and clear refusals of gradients."""

import copy
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer.baselines import build
from explainer.errors import CheckpointError, ConfigError, NumericalError, QueryBudgetError, ShapeError, UnknownNameError
from explainer.models.black_box import BlackBox, OnnxScores
from explainer.models.checkpoints import load_explanandum
from explainer.models.response_cache import ResponseCache


class Means:
    """Scores: the three channel means; counts its images."""

    def __init__(self, scale=1.0):
        self.scale, self.asked, self.calls = scale, 0, 0

    def __call__(self, images):
        self.asked += len(images)
        self.calls += 1
        return (images.mean((2, 3)) * self.scale).numpy()


def function_of_images(images):
    return images.mean((2, 3))


def images(n=4, seed=0):
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_interface_of_an_explanandum():
    x = images()
    box = BlackBox(Means(), 3, mean=(0.1, 0.2, 0.3), std=0.5)
    assert isinstance(box, explainer.Explanandum) and not box.differentiable and explainer.Explanandum.differentiable
    torch.testing.assert_close(box(x), x.mean((2, 3)))
    assert box(x.double()).dtype == torch.float64
    normalized = BlackBox(Means(), 3, mean=(0.1, 0.2, 0.3), std=0.5, normalize=True)
    torch.testing.assert_close(normalized(x), (x.mean((2, 3)) - torch.tensor([0.1, 0.2, 0.3])) / 0.5)
    assert box.mean.tolist() == pytest.approx([0.1, 0.2, 0.3]), "the fill colour"
    assert BlackBox(Means(), 3, input_size=3)(x).shape == (4, 3)
    with pytest.raises(ShapeError, match=r"expected logits \(B,4\)"):
        BlackBox(Means(), 4)(x)
    with pytest.raises(ShapeError, match="for 2 images"):
        BlackBox(lambda batch: torch.zeros(1, 3), 3)(images(2))


def test_probabilities_become_logits():
    x = images()
    p = x.mean((2, 3))
    torch.testing.assert_close(BlackBox(Means(), 3, scores="probability")(x).sigmoid(), p)
    single = BlackBox(lambda batch: batch.mean((2, 3)).softmax(1), 3, task="multiclass", scores="probability")
    torch.testing.assert_close(single.probabilities(single(x)), p.softmax(1))
    certain = BlackBox(lambda batch: torch.tensor([[0.0, 1.0]]), 2, scores="probability")(images(1))
    assert torch.isfinite(certain).all() and certain[0, 0] < -20 and certain[0, 1] > 20


def test_each_image_is_asked_about_once_and_order_is_kept():
    f, x = Means(), images()
    box = BlackBox(f, 3, batch_size=3)
    double = torch.cat([x, x.flip(0)])
    torch.testing.assert_close(box(double), double.mean((2, 3)))
    assert f.asked == box.queries == 4 and f.calls == 2
    box(x[1:3])
    assert f.asked == 4
    box(x + 0.001)
    assert f.asked == 8


def test_memory_is_bounded_and_a_file_outlives_it(tmp_path):
    f, x = Means(), images()
    box = BlackBox(f, 3, cache_size=2)
    box(x), box(x[2:]), box(x[:1])
    assert f.asked == 5, "the two last stay, the first was forgotten"
    file = str(tmp_path / "deep" / "answers.db")
    one = BlackBox(Means(), 3, cache_size=0, cache_file=file)
    first = one(x)
    second = Means()
    torch.testing.assert_close(BlackBox(second, 3, cache_file=file)(x), first)
    assert second.asked == 0
    BlackBox(second, 3, cache_file=file, identity="retrained")(x)
    assert second.asked == 4, "another classifier's answers are not used"
    (tmp_path / "noise.db").write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match="cannot be used"):
        ResponseCache(4, tmp_path / "noise.db")


def test_budget_counts_new_images_and_asks_nothing_beyond():
    f, x = Means(), images()
    box = BlackBox(f, 3, budget=5)
    box(x), box(x)
    with pytest.raises(QueryBudgetError, match=r"4 of 5 images asked about, 2 more wanted.*budget"):
        box(images(2, seed=1))
    assert f.asked == 4
    box(images(1, seed=2))
    assert box.queries == 5


def test_a_budget_with_a_file_counts_what_was_paid_before(tmp_path):
    """A resume must not have the whole budget again, nor must every process."""
    file, x = str(tmp_path / "answers.db"), images(6)

    def box(identity="service", budget=5):
        return BlackBox(Means(), 3, identity=identity, cache_file=file, budget=budget)

    first, second = box(), box()
    first(x[:2]), second(x[1:4])
    assert (first.queries, second.queries) == (2, 2), "one of the second's was known"
    again = box()
    with pytest.raises(QueryBudgetError, match="4 of 5 images asked about, 2 more"):
        again(x[4:])
    again(x[:5])
    assert again.queries == 1
    box("another")(x[:5])
    with pytest.raises(QueryBudgetError, match="5 of 5"):
        first(x[5:])
    box(budget=6)(x[5:])


def test_images_that_were_never_sent_are_not_paid_for(tmp_path):
    calls = []

    def failing(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise ConnectionError("the service is down")
        return batch.mean((2, 3))

    for file in (None, str(tmp_path / "answers.db")):
        calls.clear()
        box = BlackBox(failing, 3, batch_size=2, budget=8, cache_file=file)
        with pytest.raises(ConnectionError):
            box(images(6))
        assert calls == [2, 2] and box.classifier.cache.paid() == 4, "two answered, two lost, two not sent"
        box(images(6))
        assert box.classifier.cache.paid() == 8


def test_answers_of_an_older_file_count(tmp_path):
    import sqlite3

    path = tmp_path / "old.db"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, scores BLOB)")
        old.execute("INSERT INTO answers VALUES ('x', x'00')")
    old.close()
    for _ in range(2):
        assert ResponseCache(4, path, "a").paid() == 1
    assert ResponseCache(4, path, "a").pay(2, 3) and not ResponseCache(4, path, "a").pay(1, 3)
    assert ResponseCache(4, path, "b").paid() == 1


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    import sqlite3

    file = str(tmp_path / "answers.db")
    box = BlackBox(Means(), 3, cache_file=file)
    box(images(1))
    with sqlite3.connect(file) as other:
        other.execute("DROP TABLE paid")
    other.close()
    with pytest.raises(CheckpointError, match=r"cannot be written \(no such table: paid\)"):
        box(images(2))
    BlackBox(Means(), 3, cache_file=file)(images(2))


def _ask(file, first, done):
    """A process that asks about 40 images, one at a time, until the budget is used up."""
    box, number = BlackBox(Means(), 3, identity="service", cache_file=file, budget=30), 0
    for seed in range(first, first + 40):
        try:
            box(images(1, seed))
        except QueryBudgetError:
            break
        number += 1
    done.put(number)


def test_processes_share_the_budget(tmp_path):
    import multiprocessing

    file, done = str(tmp_path / "answers.db"), multiprocessing.get_context("fork").Queue()
    jobs = [multiprocessing.get_context("fork").Process(target=_ask, args=(file, 1000 * n, done)) for n in range(2)]
    for job in jobs:
        job.start()
    assert sum(done.get(timeout=60) for _ in jobs) == 30
    for job in jobs:
        job.join(60)


def test_fingerprint_is_the_identity_and_what_surrounds_it():
    base = BlackBox(Means(), 3).fingerprint()
    assert base == BlackBox(Means(), 3).fingerprint() and len(base) == 16
    others = [
        BlackBox(Means(), 3, identity="v2"),
        BlackBox(Means(), 4),
        BlackBox(Means(), 3, task="multiclass"),
        BlackBox(Means(), 3, normalize=True),
        BlackBox(Means(), 3, mean=0.5),
        BlackBox(function_of_images, 3),
        BlackBox(Means(), 3, scores="probability"),
    ]
    assert len({base, *(o.fingerprint() for o in others)}) == 8


def test_gradients_are_refused_and_scores_are_enough_for_rise():
    box, x = BlackBox(Means(), 3), images(2)
    with pytest.raises(ConfigError, match="gives scores only"):
        box(x.clone().requires_grad_())
    with pytest.raises(ConfigError, match="gives scores only"):
        build("gradient", box)(x, 0)
    maps = build("rise", box, n_masks=8, grid=2)(x, 1)
    assert maps.shape == (2, 6, 6) and maps.std() > 0
    assert not box.train().training


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """A tiny network as ONNX (any batch and size), and itself."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(2, 3)).astype(np.float32), random.normal(size=2).astype(np.float32)
    files = {}
    for name, batch in (("free", "B"), ("fixed", 3)):
        graph = helper.make_graph(
            [
                helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
                helper.make_node("Flatten", ["pooled"], ["flat"]),
                helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
            ],
            "net",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, "H", "W"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        files[name] = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        onnx.save(model, files[name])
    return files, torch.from_numpy(weight), torch.from_numpy(bias)


@pytest.mark.parametrize("batch", ["free", "fixed"])
def test_onnx_file(onnx_file, batch):
    files, weight, bias = onnx_file
    x = images(5)
    box = load_explanandum(
        None,
        f"onnx:{files[batch]}",
        {"budget": 100, "arguments": {"threads": 1}},
        2,
        task="multilabel",
        class_names=("a", "b"),
        std=(1, 1, 1),
    )
    torch.testing.assert_close(box(x), x.mean((2, 3)) @ weight.T + bias)
    assert box.class_names == ("a", "b") and box.queries == 5
    torch.testing.assert_close(copy.deepcopy(box)(x + 0.1), (x + 0.1).mean((2, 3)) @ weight.T + bias)


def test_onnx_fingerprint_is_the_file(onnx_file, tmp_path):
    files, _, _ = onnx_file
    assert OnnxScores(files["free"]).identity != OnnxScores(files["fixed"]).identity
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(files["free"].read_bytes())
    assert OnnxScores(moved).identity == OnnxScores(files["free"]).identity


def test_configuration_errors(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    box = load_explanandum(None, f"onnx:{tmp_path / 'bad.onnx'}", {}, 2)
    with pytest.raises(CheckpointError, match="not a model that onnxruntime can open"):
        box(images(1))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_explanandum(None, "onnx:nowhere.onnx", {}, 2)
    with pytest.raises(UnknownNameError, match=r"callable:package\.module:function"):
        load_explanandum(None, "callable:tests.unit.models.test_black_box:missing", {}, 2)
    with pytest.raises(ConfigError, match="could not be built with options"):
        load_explanandum(None, "callable:tests.unit.models.test_black_box:function_of_images", {"budgett": 2}, 3)
    with pytest.raises(ConfigError, match="takes no checkpoint"):
        load_explanandum("x.ckpt", "callable:tests.unit.models.test_black_box:function_of_images", {}, 3)
    for options, message in (
        ({"scores": "rank"}, "logit or probability"),
        ({"budget": -1}, "budget at least 0"),
        ({"cache_size": -1}, "cache_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            BlackBox(Means(), 3, **options)


def test_callables_by_import_path():
    path = "callable:tests.unit.models.test_black_box"
    x = images()
    torch.testing.assert_close(load_explanandum(None, f"{path}:function_of_images", {}, 3)(x), x.mean((2, 3)))
    torch.testing.assert_close(load_explanandum(None, f"{path}:Means", {"arguments": {"scale": 2.0}}, 3)(x), 2 * x.mean((2, 3)))


def test_a_torch_module_may_be_the_function():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(BlackBox(net, 3)(images()), images().mean((2, 3)))


def test_nan_answers_are_refused_and_never_stored(tmp_path):
    answers = iter([float("nan"), float("inf"), 0.25])

    def moody(images):
        value = next(answers)
        return torch.full((len(images), 2), 0.25).index_put((torch.tensor(len(images) - 1), torch.tensor(1)), torch.tensor(value))

    images = torch.rand(3, 3, 4, 4)
    box = BlackBox(moody, 2, cache_file=str(tmp_path / "a.sqlite"), identity="moody")
    for _ in range(2):
        with pytest.raises(NumericalError, match=r"moody answered \[0\.25, (nan|inf)\] for image 2 of 3: scores must be finite"):
            box(images)
    with sqlite3.connect(tmp_path / "a.sqlite") as file:
        assert file.execute("SELECT COUNT(*) FROM answers").fetchone() == (0,)
    expected = box(images)
    assert torch.isfinite(expected).all()
    with sqlite3.connect(tmp_path / "a.sqlite") as file:  # as an older version, or a stranger, may have left it
        rows = file.execute("SELECT key FROM answers ORDER BY key").fetchall()
        bad = [np.full(2, np.nan, np.float32).tobytes(), b"odd", "text"]
        for (key,), value in zip(rows, bad, strict=True):
            file.execute("UPDATE answers SET scores = ? WHERE key = ?", (value, key))
    again = BlackBox(lambda x: torch.full((len(x), 2), 0.25), 2, cache_file=tmp_path / "a.sqlite", identity="moody")
    assert torch.allclose(again(images), expected) and again.queries == 3, "what is no answer is asked again"
