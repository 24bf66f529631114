"""The batched ascent: step rules, early ends, budget, history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from explainer.baselines.kernels.mask_search import Ascent, Limits, maximize
from explainer.errors import ConfigError, NumericalError

PEAK = torch.tensor([0.2, 0.5, 0.4, 0.5], dtype=torch.float64)
SGD = Ascent("sgd", lambda _: 0.1, 0.9, 0.9)


def towards_peak(x: Tensor, rows: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
    gain = -((x[:, 0] - PEAK[rows]) ** 2)
    return gain, {"gain": gain}


@pytest.mark.parametrize(
    ("ascent", "theirs"),
    [
        (SGD, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.9)),
        (Ascent("sgd", lambda _: 0.01), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)),
        (Ascent("adam", lambda _: 0.1), lambda p: torch.optim.Adam(p, 0.1)),
    ],
)
def test_steps_equal_torch_optim(ascent: Ascent, theirs) -> None:
    start = torch.tensor([[0.0], [0.9], [1.0], [0.1]], dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = theirs([parameter])
    for _ in range(8):
        optimizer.zero_grad()
        (-towards_peak(parameter, torch.arange(4), 0)[0].sum()).backward()
        optimizer.step()
        with torch.no_grad():
            parameter.clamp_(0, 1)
    found = maximize(start, towards_peak, ascent, 9)  # the ninth iteration only evaluates
    torch.testing.assert_close(found.parameters, parameter.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.history.values["gain"][-1], -((parameter.detach()[:, 0] - PEAK) ** 2), rtol=1e-6, atol=1e-9)


def test_converged_rows_leave_and_the_others_do_not_notice() -> None:
    start = torch.tensor([[0.2], [0.9], [0.0], [0.5]], dtype=torch.float64)  # rows 0 and 3 start at their peak
    alone = maximize(start[1:3], lambda x, r, t: towards_peak(x, r + 1, t), SGD, 60)
    found = maximize(start, towards_peak, SGD, 60, Limits(tolerance=1e-9, patience=5))
    assert found.iterations.tolist() == [5, 60, 60, 5]
    assert found.history.active[:6] == [4, 4, 4, 4, 4, 2]
    torch.testing.assert_close(found.parameters[1:3], alone.parameters, rtol=0, atol=0)
    assert found.history.values["gain"].shape == (60, 4)
    assert found.history.values["gain"][-1, 0] == found.history.values["gain"][4, 0]


def test_all_rows_converged_ends_the_search() -> None:
    found = maximize(PEAK[:, None].clone(), towards_peak, SGD, 100, Limits(tolerance=1e-9, patience=3))
    assert len(found.history.active) == 3
    torch.testing.assert_close(found.parameters[:, 0], PEAK)


def test_limits_end_early_without_stretching_the_schedule() -> None:
    start = torch.zeros(4, 1, dtype=torch.float64)
    whole = maximize(start, towards_peak, SGD, 20)
    part = maximize(start, towards_peak, SGD, 20, Limits(max_iterations=7))
    torch.testing.assert_close(part.history.values["gain"], whole.history.values["gain"][:7], rtol=0, atol=0)
    spent = maximize(start, towards_peak, SGD, 20, Limits(budget_s=0.0))
    assert spent.iterations.tolist() == [1] * 4


def test_passes_do_not_change_the_result() -> None:
    start = torch.rand(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []

    def recorded(x: Tensor, rows: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(len(rows))
        return towards_peak(x, rows, t)

    whole = maximize(start, towards_peak, SGD, 5)
    torch.testing.assert_close(maximize(start, recorded, SGD, 5, Limits(rows_per_pass=3)).parameters, whole.parameters, rtol=0, atol=0)
    assert seen == [3, 1] * 5


def test_bad_limits_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows_per_pass"):
        Limits(rows_per_pass=0)
    with pytest.raises(ConfigError, match="budget_s"):
        Limits(budget_s=-1.0)
    with pytest.raises(ConfigError, match="iterations"):
        maximize(torch.zeros(1, 1), towards_peak, SGD, 0)
    with pytest.raises(NumericalError, match="gain"):
        maximize(torch.zeros(1, 1), lambda x, r, t: (x[:, 0] / 0.0, {"gain": x[:, 0] / 0.0}), SGD, 3)
