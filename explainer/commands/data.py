"""``explainer data check CONFIG``: read every sample once and say what training would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from explainer.commands.arguments import name_list, positive
from explainer.commands.data_config import SPLITS, add_data_options, data_config, require_splits, unchanged
from explainer.commands.data_shards import SHARDS
from explainer.commands.parsing import Command, Group, Parser
from explainer.config import DataConfig, RunConfig
from explainer.errors import ExplainerError
from explainer.files import write_json
from explainer.geometry import size_text

if TYPE_CHECKING:
    from explainer.data.check import SplitCheck
    from explainer.data.contract import ExplainerDataset
    from explainer.data.datamodule import DataModule

_NAMED = 5  # samples named for each finding


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.epilog = "Exit code 0: nothing is wrong, 1: something is, 2: the data cannot be found or the options are wrong."
    parser.add_argument("--splits", type=name_list, default=list(SPLITS), help="which, separated by commas")
    parser.add_argument("--workers", type=positive, default=2, help="threads that decode")
    parser.add_argument("--out", metavar="FILE", help="also write everything found, sample by sample, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_data_options(parser)


def run(_parser: Parser, options: Namespace) -> int:
    """Check; returns 0, or 1 if something is wrong."""
    require_splits(options.splits)
    config = data_config(options)
    from explainer.commands.building import data_module
    from explainer.data.survey import advice, describe, survey
    from explainer.inference.outputs import writable_file

    if options.out is not None:
        writable_file(options.out)
    data = data_module(RunConfig(data=unchanged(config)))
    splits, wrong = _split_datasets(data, options.splits)
    surveys = [survey(dataset) for dataset in splits.values()]
    some = next(iter(splits.values()))
    print("\n".join(describe(some, surveys)), flush=True)
    found = _read(splits, options.workers, options.quiet)
    findings, notes = _findings(found)
    notes += advice(splits.get("train", some), surveys, config.balance)
    lines = [*_facts(found), "", *(f"WRONG  {line}" for line in [*wrong, *findings]), *(f"note   {line}" for line in notes)]
    print("\n".join(lines if wrong or findings or notes else [*lines, "nothing is wrong"]))
    print("\n".join(["", "training would:", *(f"- {line}" for line in _consequences(found, config))]))
    if options.out is not None:
        _write(Path(options.out), found, [*wrong, *findings], notes)
    return int(bool(wrong or findings))


def _split_datasets(data: DataModule, names: Sequence[str]) -> tuple[dict[str, ExplainerDataset], list[str]]:
    """The splits that can be built, and why the others cannot."""
    splits, wrong, first = {}, [], None
    for name in names:
        try:
            splits[name] = data.dataset(name)
        except ExplainerError as error:
            first = first or error
            wrong.append(f"{name}: {error}")
    if not splits and first is not None:
        raise first
    orders = {s: d.class_names for s, d in splits.items()}
    if len(set(orders.values())) > 1:
        wrong.append(f"the splits have different classes: {'; '.join(f'{s}: {list(o)[:8]}' for s, o in orders.items())}. Give class_names.")
    return splits, wrong


def _read(splits: Mapping[str, ExplainerDataset], workers: int, quiet: bool) -> dict[str, SplitCheck]:
    from explainer.data.check import check_split
    from explainer.evaluation.progress import Progress

    found = {}
    with Progress(sum(len(d) for d in splits.values()), not quiet, "check") as progress:
        for name, dataset in splits.items():
            progress.show(name)
            found[name] = check_split(dataset, workers, progress.advance)
    return found


def _facts(found: Mapping[str, SplitCheck]) -> list[str]:
    modes = Counter(s.mode for split in found.values() for s in split.samples if s.mode)
    lines = [f"files: {', '.join(f'{n} {mode}' for mode, n in modes.most_common(6))}"] if modes else []
    return [*lines, f"read: {', '.join(f'{len(split.samples)} {name}' for name, split in found.items())}"]


def _findings(found: Mapping[str, SplitCheck]) -> tuple[list[str], list[str]]:
    """What is wrong, and what may be meant."""
    from explainer.data.check import duplicates, leakage

    wrong: list[str] = []
    notes: list[str] = []
    for name, split in found.items():
        wrong += [f"{name}: {sample.error}" for sample in split.broken[:_NAMED]]
        if len(split.broken) > _NAMED:
            wrong.append(f"{name}: {len(split.broken) - _NAMED} more cannot be read (all of them: --out FILE).")
        if counts := split.count("without_pixels"):
            notes.append(f"{name}: labelled, but without a pixel in the masks: {_counted(counts)}. Such a class has no ground truth there.")
        if counts := split.count("unlabelled"):
            notes.append(f"{name}: pixels of classes that are not labelled: {_counted(counts)}.")
        if counts := split.count("vanished"):
            size = split.dataset.size
            notes.append(f"{name}: objects too small to have a pixel at {size_text(size)}: {_counted(counts)}. Raise data.options.size.")
        if groups := duplicates(split):
            notes.append(f"{name}: {_number(len(groups), 'picture')} more than once, e.g. {' = '.join(groups[0][:3])}.")
        readable = [s for s in split.samples if s.error is None]
        every, lacking = len(readable), sum(not s.truth for s in readable)
        if 0 < lacking < every:
            notes.append(f"{name}: {lacking} of {every} images have no masks: they are left out of what needs them.")
    for (first, second), pairs in leakage(found).items():
        wrong.append(
            f"leakage: {_number(len(pairs), 'picture')} of {second} also in {first}, e.g. {pairs[0][1]} = {pairs[0][0]}. Numbers on "
            f"{second} flatter: remove such pictures from one of both."
        )
    return wrong, notes


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def _counted(counts: Counter[str]) -> str:
    listed = ", ".join(f"{name} {n}" for name, n in counts.most_common(8))
    return listed + (f" and {len(counts) - 8} more classes" if len(counts) > 8 else "")


def _consequences(found: Mapping[str, SplitCheck], config: DataConfig) -> list[str]:
    """What training would do with the data as they are."""
    lines = []
    broken = {name: split.broken for name, split in found.items() if split.broken}
    if broken and config.on_error == "raise":
        name, samples = next(iter(broken.items()))
        lines.append(f"stop at the first broken file it meets ({name}: {samples[0].id}), because data.on_error is raise")
    elif broken:
        listing = ", ".join(f"{len(samples)} of {name}" for name, samples in broken.items())
        lines.append(f"leave out {listing} and say so at the end, because data.on_error is skip")
    if (train := found.get("train")) is not None:
        usable, batch = len(train.samples), config.batch_size
        rest = usable % batch
        left = f", and leave {rest} other images out of each" if rest else ""
        lines.append(f"see {usable // batch} batches of {batch} an epoch{left}")
        if usable < batch:
            lines[-1] = f"refuse: {usable} training images are fewer than one batch of {batch}; lower data.batch_size"
    for name, use in (("val", "choose the best epoch"), ("test", "be measured")):
        if name in found:
            lines.append(f"{use} on {len(found[name].samples) - len(found[name].broken)} {name} images")
    return lines


def _write(path: Path, found: Mapping[str, SplitCheck], wrong: list[str], notes: list[str]) -> None:
    samples = {name: [{**asdict(s), "content": d} for s, d in _paired(split)] for name, split in found.items()}
    classes = {name: list(split.dataset.class_names) for name, split in found.items()}
    write_json(path, {"classes": classes, "wrong": wrong, "notes": notes, "samples": samples})


def _paired(split: SplitCheck) -> list[tuple[Any, str | None]]:
    return [(s, split.digests[i] if split.digests else None) for i, s in enumerate(split.samples)]


CHECK = Command(
    "read every sample once: counts, sizes, broken files, labels without masks, the same picture in two splits", add_options, run
)
GROUP = Group("what a data set holds, what is wrong with it, and shards of it", {"check": CHECK, "shards": SHARDS})
