"""``explainer data shards CONFIG --out FOLDER``: tar shards of any data set, for ``data: {name: shards}``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.arguments import name_list, positive
from explainer.commands.data_config import SPLITS, add_data_options, data_config, require_splits, unchanged
from explainer.commands.parsing import Command, Parser
from explainer.config import RunConfig
from explainer.locks import claimed


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the shards and their index.json")
    parser.add_argument("--samples", type=positive, default=1000, help="images per shard; some 100 MB a shard read well from afar")
    parser.add_argument("--splits", type=name_list, default=list(SPLITS), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which the training images lie in the shards")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_data_options(parser)


def run(_parser: Parser, options: Namespace) -> int:
    """Write the shards; returns the exit code."""
    require_splits(options.splits)
    config = data_config(options)
    from explainer.commands.building import data_module
    from explainer.data.samplers import shuffled
    from explainer.data.shard_writing import earlier_splits, write_index, write_split
    from explainer.evaluation.progress import Progress
    from explainer.inference.outputs import writable_folder

    writable_folder(options.out)
    out = Path(options.out)
    data = data_module(RunConfig(data=unchanged(config)))
    datasets = {name: data.dataset(name) for name in options.splits}
    first = next(iter(datasets.values()))
    earlier_splits(first, out)  # refuses what does not belong together before anything is written
    splits = {}
    with claimed(out, "shards"), Progress(sum(len(d) for d in datasets.values()), not options.quiet, "shards") as progress:
        for name, dataset in datasets.items():
            progress.show(name)
            order = shuffled(len(dataset), options.seed) if name == "train" else range(len(dataset))
            splits[name] = write_split(dataset, out, options.samples, order, progress=progress.advance)
        write_index(first, out, splits)
    for name, split in splits.items():
        size = sum(s.bytes for s in split.shards)
        print(f"{name}: {sum(s.samples for s in split.shards)} images in {len(split.shards)} shards, {size / 1e6:.1f} MB")
    kept = "".join(f", {key}: {config.options[key]}" for key in ("size", "geometry") if key in config.options)
    print(f"data: {{name: shards, options: {{root: {out}{kept}}}}}")
    return 0


SHARDS = Command("write any data set as tar shards, for data that is too large or too far away for single files", add_options, run)
