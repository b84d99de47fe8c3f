"""The forward pass in one launch: its steps in Triton's interpreter, which runs one program after another and
so can show a wait that succeeds only where a program waits for itself, and one that gives up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel modules are first imported

pytest.importorskip("triton")

from a2mc_fast.kernels import common, gru_resident, gru_steps  # noqa: E402
from a2mc_fast.kernels.gru import gru_pair, make_operands  # noqa: E402

from a2mc_fast.encoders.bigru import BiGRU  # noqa: E402
from a2mc_fast.errors import InputError  # noqa: E402
from a2mc_fast.run.log import RunLog  # noqa: E402
from tests.conftest import SMALL  # noqa: E402

pytestmark = pytest.mark.usefixtures("memory_starts_as_nan")


def inputs(groups: int, t: int, n: int, h: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The input's products, weights and biases."""
    gates = torch.randn(groups, t, n, 2, 3 * h, device=DEVICE).to(dtype)
    weight = (torch.randn(groups, 2, 3 * h, h, device=DEVICE) / h**0.5).to(dtype)
    return [gates, weight, torch.randn(groups, 2, 2, 3 * h, device=DEVICE)]


def run(plan: Any, given: Sequence[Tensor], *, one_by_one: bool = False, **how: Any) -> list[Tensor]:
    """What a planned pass leaves; with `one_by_one` its only launch is cut into one per step."""
    gates = given[0].clone()
    planned = plan(gates, *given[1:], precision="ieee", **how)
    calls = planned.calls
    if one_by_one:
        (call,) = calls
        steps = range(call.arguments["T"])
        calls = [call._replace(arguments=call.arguments | {"first": t, "STEPS": 1}) for t in steps]
    common.launch_all(calls, gates.device)
    return [planned.states, planned.final, planned.inner, gates]


@pytest.mark.parametrize(
    "groups,t,n,h,dtype,reverse,keep,slots",
    [
        (1, 3, 70, 20, torch.float32, True, True, 3),
        (1, 3, 5, 20, torch.float32, False, False, 2),
        (2, 2, 3, 40, torch.bfloat16, False, True, 2),
    ],
    ids=["clips", "ring", "groups"],
)
def test_its_steps_are_those_of_the_other_kernel(
    groups: int, t: int, n: int, h: int, dtype: torch.dtype, reverse: bool, keep: bool, slots: int
) -> None:
    given = inputs(groups, t, n, h, dtype)
    how = {"reverse": reverse, "keep": keep, "slots": slots}
    got = run(gru_resident.plan_resident_forward, given, one_by_one=True, **how)
    error = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, run(gru_steps.plan_forward, given, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error)


@pytest.mark.parametrize("reverse", [False, True])
def test_all_steps_in_one_launch(reverse: bool) -> None:
    """Sixteen units are one program's, which waits for itself alone."""
    given, how = inputs(1, 5, 3, 16), {"reverse": reverse, "keep": True, "slots": 5}
    one = run(gru_resident.plan_resident_forward, given, **how)
    for a, b in zip(one, run(gru_steps.plan_forward, given, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not gru_resident.timed_out(given[0].device)


def test_a_wait_that_is_too_long_ends_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of a direction, of which the interpreter starts one when the other has ended."""
    monkeypatch.setattr(gru_resident, "_PATIENCE", 3)
    given = inputs(1, 4, 3, 20)
    states, final, *_ = run(gru_resident.plan_resident_forward, given, reverse=False, keep=True, slots=4)
    assert states[0, 0].isfinite().all() and final.isnan().any()
    assert gru_resident.timed_out(given[0].device) and not gru_resident.timed_out(given[0].device)


def test_the_log_names_a_wait_that_was_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BiGRU(SMALL, persons=1, hidden=16, layers=1)
    model = SimpleNamespace(query=SimpleNamespace(encoder=encoder))
    device = torch.device("cpu")
    trainer = SimpleNamespace(model=model, device=device, fault=torch.tensor([3]))
    log = object.__new__(RunLog)
    log.folder, log.step = "runs/x", 4  # type: ignore[assignment]
    monkeypatch.setattr(RunLog, "_clips", lambda *_: "a clip")
    for form, late, words in (
        (
            "resident",
            1,
            "in step 4 programs of a recurrent layer waited for one another too long: choose",
        ),
        ("resident", 0, "the loss or a gradient is not finite in step 4"),
        ("fused", 1, "the loss or a gradient is not finite in step 4"),
    ):
        encoder.recurrence = form  # type: ignore[assignment]
        gru_resident.fault(device).fill_(late)
        with pytest.raises(InputError, match=words):
            log.check(trainer, {"loss": torch.tensor(1.0)})  # type: ignore[arg-type]
    gru_resident.fault(device).zero_()


@pytest.mark.gpu
@pytest.mark.parametrize("n,t,h", [(64, 64, 1024), (192, 16, 1024), (5, 7, 100)])
def test_on_a_gpu_it_is_the_same_pass(n: int, t: int, h: int) -> None:
    """Launched, and replayed many times."""
    shapes = [(3 * h, 150)] * 2 + [(3 * h, h)] * 2 + [(3 * h,)] * 4
    weights = [torch.randn(s, device=DEVICE) / h**0.5 for s in shapes]
    x = torch.randn(t, n, 150, device=DEVICE, dtype=torch.bfloat16)
    operands = make_operands(weights, x.dtype, backward=False)
    how = {"reverse": False, "keep": False, "precision": "tf32"}
    assert gru_resident.available(x, operands.state, **how)
    steps = gru_pair(x, weights, operands).float()
    first = gru_pair(x, weights, operands, resident=True)
    torch.testing.assert_close(first.float(), steps, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = gru_pair(x, weights, operands, resident=True)
    for _ in range(100):
        again.fill_(float("nan"))
        graph.replay()
        assert torch.equal(again, first)
    assert not gru_resident.timed_out(x.device)


def test_where_it_cannot_run_the_steps_are_launched() -> None:
    weights = [torch.randn(s) / 4 for s in [(60, 5)] * 2 + [(60, 20)] * 2 + [(60,)] * 4]
    x = torch.randn(3, 2, 5)
    assert torch.equal(gru_pair(x, weights, resident=True), gru_pair(x, weights))


@pytest.mark.parametrize(
    "shared, registers, threads, programs",
    [(147456, 214, 128, 1), (40960, 64, 128, 5), (1024, 255, 256, 1), (0, 32, 1024, 2), (233472, 32, 32, 0)],
)  # fmt: skip
def test_programs_at_once(shared: int, registers: int, threads: int, programs: int) -> None:
    """Of a multiprocessor with 228 KiB: limited by shared memory, by registers, or by threads."""
    assert gru_resident.programs_at_once(shared, registers, threads, 228 * 1024) == programs
