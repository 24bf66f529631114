"""From an :class:`~explainer.evaluation.config.EvaluateConfig` to a finished results folder."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from explainer.commands import assembly
from explainer.commands.numbers import require_least, require_share
from explainer.evaluation import summary
from explainer.evaluation.config import EvaluateConfig
from explainer.evaluation.results import Row, write_rows
from explainer.evaluation.runner import Outcome, Runner
from explainer.files import write_text
from explainer.locks import claimed
from explainer.provenance import provenance
from explainer.tasks.stopping import restarted

log = logging.getLogger(__name__)


def run(config: EvaluateConfig, resolved: str | None = None) -> int:
    """Evaluate, write the results folder, print the tables.

    Args:
        config: the evaluation.
        resolved: the configuration as YAML, saved beside the results.

    Returns:
        Exit code: 0; 1 if a method failed, a protocol had to be left out, or the time budget cut the run short.
    """
    require_least(config, 1, "batch_size", "limit", "sample", "threads")
    require_least(config, 0, "bootstrap", "gallery")
    require_share(config, "confidence")  # now: the intervals are computed at the end
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    start = time.monotonic()
    with contextlib.ExitStack() as held, assembly.process_group() as (rank, world):
        runner = assembly.build_runner(config, rank, world)
        if rank == 0:
            held.enter_context(claimed(config.out, "evaluate", restarted()))
        if rank == 0 and resolved is not None:
            write_text(Path(config.out) / "config.yaml", resolved)
        try:
            outcome = runner.run()
        except KeyboardInterrupt:
            if rank == 0:
                finish(runner, config, runner.outcome, world, start)
                log.warning("stopped; what is finished is in %s. Run the same command again to go on.", config.out)
            raise
        outcomes: list[Any] = [outcome]
        if world > 1:
            outcomes = [None] * world
            torch.distributed.all_gather_object(outcomes, outcome)
        if rank != 0:
            return int(any(o.failures or o.refused for o in outcomes))
        for other in outcomes:
            outcome.failures.update(other.failures)
            outcome.refused.update(other.refused)
            outcome.notices += [n for n in other.notices if n not in outcome.notices]
        content = finish(runner, config, outcome, world, start)
        summary.show(content)
        print(f"{config.out}: {summary.TABLE}, {summary.SUMMARY}, {summary.CSV}, results.jsonl")
        if data_note := runner.data.skipped_summary():
            log.warning(data_note)
        for name, message in outcome.failures.items():
            log.error("%s was left out: %s", name, message)
        for (name, label), message in outcome.refused.items():
            log.error("%s: protocol %s was left out: %s", name, label, message)
        return int(not outcome.complete or bool(outcome.refused))


def finish(runner: Runner, config: EvaluateConfig, outcome: Outcome, world: int, start: float) -> dict[str, Any]:
    """Write the results folder from the store; returns the content of ``summary.json``."""
    units, complete = runner.collect(outcome.refused)
    outcome.complete = complete
    rows = [row for part in units.values() for row in sorted((r for unit in part for r in unit.rows), key=Row.order)]
    write_rows(config.out, rows)
    fingerprints = {**runner.fingerprints, "methods": {m.label: m.fingerprint for m in runner.methods}}
    record = provenance(asdict(config), fingerprints, runner.settings.device, world, time.monotonic() - start)
    content = summary.build(runner, rows, outcome, record, bootstrap=config.bootstrap, confidence=config.confidence)
    summary.write(Path(config.out), content)
    return content
