"""Mutated inputs, one after the other in a child process that is held to a time and a memory; and the mutations themselves."""

from __future__ import annotations

import itertools
import os
import resource
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from explainer.errors import ExplainerError
from tests.integration.launch import CONTEXT, OwnClock

SECONDS = 10.0  # that a use may take
BYTES = 2**30  # that it may need beyond what the process had when it began


def endure(kind: str, folder: Path, number: int, seed: int) -> dict[str, int]:
    """How many of ``number`` mutations work and are refused.

    Args:
        kind: of :data:`tests.integration.fuzz_inputs.KINDS`.
        folder: an empty one.
        number: of mutations.
        seed: of their random numbers.

    Raises:
        AssertionError: a mutation ends in anything but success or one of the project's own errors, or ends the process, or takes more
            than :data:`SECONDS` or :data:`BYTES`. It is named, and the bytes lie in the folder as they were.
    """
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_suffer, args=(kind, folder, number, seed, theirs))
    child.start()
    theirs.close()
    outcomes, what, patience = {"works": 0, "refused": 0}, "the preparation", 300.0
    try:
        while True:
            clock = OwnClock(child.pid)
            while not ours.poll(0.5):
                assert clock.passed() < patience, f"{kind}: {what} takes more than {patience:g} s"
            try:
                message, value = ours.recv()
            except EOFError:
                break
            assert message != "fault", f"{kind}: {what}:\n{value}"
            if message == "begin":
                what, patience = value, SECONDS
            else:
                outcomes[value] += 1
                what, patience = f"what follows {what}", 60.0
        child.join(60)
        assert child.exitcode == 0, f"{kind}: {what} ended the process with {child.exitcode}"
        assert sum(outcomes.values()) == number
    finally:
        child.kill()
        child.join()
    return outcomes


def _suffer(kind: str, folder: Path, number: int, seed: int, pipe: Connection) -> None:
    import torch

    from tests.integration.fuzz_inputs import FAULTS, KINDS

    torch.set_num_threads(1)
    os.environ["EXPLAINER_CACHE"] = str(folder / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cases = {**KINDS, **FAULTS}[kind](folder, np.random.default_rng(seed))
        next(cases)[1]()  # as it is: must work, and imports and warms what later uses need
        before = _peak()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data() + BYTES, hard))
        for i, (what, use) in enumerate(itertools.islice(cases, number)):
            pipe.send(("begin", f"mutation {i} of seed {seed} ({what})"))
            outcome = "works"
            try:
                use()
            except ExplainerError as error:
                outcome = "refused"
                assert 10 < len(str(error)) < 6000, f"a message of {len(str(error))} characters: {str(error)[:300]}"
            assert _peak() - before < BYTES, f"it needed {(_peak() - before) / 2**20:.0f} MiB"
            pipe.send(("end", outcome))
    except BaseException:
        pipe.send(("fault", traceback.format_exc()[-6000:]))
    pipe.close()
    os._exit(0)  # without waiting for what hangs


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _data() -> int:
    """Bytes that count for RLIMIT_DATA: the heap and private memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 2**32
