"""A small results folder made by the runner itself, with names that try to break out of the page."""

from __future__ import annotations

from pathlib import Path

from explainer import baselines
from explainer.evaluation import summary
from explainer.evaluation.protocol import parse_protocols
from explainer.evaluation.results import write_rows
from explainer.evaluation.runner import Runner, Settings
from explainer.evaluation.scene import Method
from explainer.models.explanandum import Explanandum
from tests.unit.evaluation.factories import Dense, data, explanandum

EVIL = "<script>document.title='broken'</script>"
EVIL_METHOD = 'grad & cam"><img src=x onerror=alert(1)>'
PROTOCOLS = [
    "segmentation_per_class",
    {"insertion_deletion": {"steps": 5}},
    "masking_matrix",
    {"label_leakage": {"folds": 3, "permutations": 20}},
    {"randomized_classifier": {"networks": 2}},
    {"parameter_randomization": {"steps": 3}},
    "fill_swap",
]


def make_results(folder: Path, images: int = 10, gallery: int = 6) -> Path:
    """Evaluate four methods on a few ``shapes`` images and write the folder."""
    net = explanandum()
    classifier = Explanandum(net.classifier, 3, class_names=(EVIL, "checks & balances", "dots"))
    methods = [
        Method("explainer", Dense(), {"name": "explainer"}, ("raw", "minmax")),
        Method(EVIL_METHOD, baselines.build("grad_cam", classifier), {"name": "grad_cam"}),
        Method("ground_truth", baselines.build("ground_truth", classifier), {"name": "ground_truth"}),
        Method("edges", baselines.build("edges", classifier), {"name": "edges"}),
    ]
    settings = Settings(folder, batch_size=5, limit=images, gallery=gallery)
    runner = Runner(methods, parse_protocols(PROTOCOLS, "corrected"), classifier, data(), settings)
    outcome = runner.run()
    units, outcome.complete = runner.collect()
    rows = [row for part in units.values() for unit in part for row in unit.rows]
    write_rows(folder, rows)
    provenance = {
        "versions": {"explainer": "0"},
        "hardware": {"cpus": 2},
        "seconds": 12.0,
        "finished": "2026-01-01",
        "config": {"data": {"name": f"shapes {EVIL}"}, "methods": {"explainer": {"name": "explainer"}}},
        "fingerprints": {"classifier": "abc"},
    }
    summary.write(folder, summary.build(runner, rows, outcome, provenance, bootstrap=50, confidence=0.95))
    return folder
