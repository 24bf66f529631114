"""``explainer reproduce NAME``: from the images of a paper to its tables, with one command."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.parsing import Command, Parser, check_configs
from explainer.errors import ConfigError

FOLDER = Path("configs")


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.epilog = "Example: explainer reproduce voc2007_vgg16 --dry_run true"
    parser.add_argument("name", help="an Explainer of configs/explainer, without .yaml: voc2007_vgg16, coco2014_resnet50, ...")
    parser.add_argument("--configs", default=str(FOLDER), help="folder of the configurations")
    parser.add_argument("--data", type=str | None, default=None, help="folder of the images; null: where the configurations look")
    parser.add_argument("--download", type=bool, default=False, help="fetch the official archives where they are missing (VOC only)")
    parser.add_argument("--dry_run", type=bool, default=False, help="say what would be done, with images, passes and hours on this machine")
    parser.add_argument("--tables", type=list[str] | None, default=None, help="names in configs/evaluate; null: all of this Explainer")
    parser.add_argument("--out", type=str | None, default=None, help="the report; null: results/reproduce_NAME.html")
    parser.add_argument("--with_classifier", type=str | None, default=None, help="YAML laid over every classifier's configuration")
    parser.add_argument("--with_explainer", type=str | None, default=None, help="YAML laid over every Explainer's configuration")
    parser.add_argument("--with_evaluation", type=str | None, default=None, help="YAML laid over every evaluation")


def run(_parser: Parser, options: Namespace) -> int:
    """Download or name what is missing, train, evaluate, report; returns the exit code."""
    known = sorted(p.stem for p in (Path(options.configs) / "explainer").glob("*.yaml"))
    if options.name not in known:
        raise ConfigError(f"{options.name!r} is not an Explainer of {options.configs}/explainer. There are: {', '.join(known) or 'none'}.")
    for path in (options.with_classifier, options.with_explainer, options.with_evaluation):
        if path is not None:
            check_configs(["--config", path])
    from explainer.commands.reproduction import Request, reproduce
    from explainer.inference.outputs import writable_file

    out = options.out or f"results/reproduce_{options.name}.html"
    if not options.dry_run:
        writable_file(out)
    request = Request(
        options.name,
        Path(options.configs),
        options.data,
        options.download,
        options.tables,
        out,
        options.with_classifier,
        options.with_explainer,
        options.with_evaluation,
    )
    return reproduce(request, options.dry_run)


COMMAND = Command("train, evaluate and report what a paper printed: explainer reproduce voc2007_vgg16", add_options, run)
