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

from a2mc_fast.kernels import common, gru, gru_plan, gru_resident  # noqa: E402
from a2mc_fast.kernels.gru import gru_pair, gru_pairs, make_operands  # noqa: E402

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


def launch(planned: Any, one_by_one: bool) -> Any:
    """With `one_by_one` a plan's only launch is cut into one per step."""
    calls = planned.calls
    if one_by_one:
        (call,) = calls
        steps = range(call.arguments["T"])
        calls = [call._replace(arguments=call.arguments | {"step": t, "STEPS": 1}) for t in steps]
    common.launch_all(calls, planned.calls[0].arguments["states_ptr"].device)
    return planned


def forward(given: Sequence[Tensor], *, one_by_one: bool = False, **how: Any) -> list[Tensor]:
    """What a forward pass leaves."""
    gates = given[0].clone()
    planned = launch(gru_plan.plan_forward(gates, *given[1:], precision="ieee", **how), one_by_one)
    return [planned.states, planned.final, planned.inner, gates]


FORMS = [
    (1, 3, 70, 20, torch.float32, True, 3),
    (1, 3, 5, 40, torch.float32, False, 2),
    (2, 2, 3, 20, torch.bfloat16, False, 2),
]  # groups, T, N, H, type, reverse, slots
IDS = ["clips", "ring", "groups"]


@pytest.mark.parametrize("groups,t,n,h,dtype,reverse,slots", FORMS, ids=IDS)
def test_its_steps_are_those_of_the_other_kernel(
    groups: int, t: int, n: int, h: int, dtype: torch.dtype, reverse: bool, slots: int
) -> None:
    given = inputs(groups, t, n, h, dtype)
    how = {"reverse": reverse, "followed": int(slots == t), "slots": slots}
    got = forward(given, one_by_one=True, form="resident", **how)
    error = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, forward(given, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error)


@pytest.mark.parametrize("groups, reverse", [(1, False), (1, True), (2, True)])
def test_all_steps_in_one_launch(groups: int, reverse: bool) -> None:
    """Sixteen units are one program's, which waits for itself alone; of two groups each has a launch."""
    given = inputs(groups, 3, 3, 16)
    how: dict[str, Any] = {"reverse": reverse, "followed": 1, "slots": 3}
    one = forward(given, form="resident", apart=groups > 1, **how)
    for a, b in zip(one, forward(given, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not gru_resident.timed_out(given[0].device)


def test_a_wait_that_is_too_long_ends_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of a direction, of which the interpreter starts one when the other has ended."""
    monkeypatch.setattr(gru_plan, "PATIENCE", 3)
    given = inputs(1, 4, 3, 40)
    states, final, *_ = forward(given, form="resident", reverse=False, followed=1, slots=4)
    assert states[0, 0].isfinite().all() and final.isnan().any()
    assert gru_resident.timed_out(given[0].device) and not gru_resident.timed_out(given[0].device)


def test_the_log_names_a_wait_that_was_too_long() -> None:
    encoder = BiGRU(SMALL, persons=1, hidden=16, layers=1)
    model = SimpleNamespace(query=SimpleNamespace(encoder=encoder))
    device = torch.device("cpu")
    trainer = SimpleNamespace(model=model, device=device, fault=torch.tensor([3]))
    log = object.__new__(RunLog)
    log.folder, log.step, log.main = "runs/x", 4, False  # type: ignore[assignment]
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
@pytest.mark.parametrize(
    "groups,n,t,h,tried",
    [
        (1, 64, 64, 1024, [True]), (1, 192, 16, 1024, [True]), (2, 64, 16, 1024, [False, True]),
        (2, 5, 7, 200, [True]), (2, 64, 32, 64, []), (1, 192, 32, 128, []), (2, 5, 7, 100, []),
    ],
)  # fmt: skip
def test_on_a_gpu_it_is_the_same_pass(groups: int, n: int, t: int, h: int, tried: list[bool]) -> None:
    """Launched, and replayed many times; groups together where they fit, else one after another, and narrow
    ones without asking whether they fit."""
    shapes = [(3 * h, 150)] * 2 + [(3 * h, h)] * 2 + [(3 * h,)] * 4
    weights = [torch.randn(shape, device=DEVICE) / h**0.5 for shape in shapes * groups]
    for weight in weights[: len(shapes)]:
        weight.requires_grad_()
    x = torch.randn(groups, t, n, 150, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    operands = make_operands(weights, x.dtype)
    direction = torch.randn(groups, t, n, 2 * h, device=DEVICE, dtype=x.dtype)

    def passes(form: gru_plan.Form) -> list[Tensor]:
        states = gru_pairs(x, weights, operands, form=form)
        return [states, *torch.autograd.grad(states, [x, *weights[: len(shapes)]], direction)]

    gru._stays.clear()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # all of it there, for a gradient that once flowed on another stream would draw that into the capture
    with torch.cuda.stream(stream):
        for a, b in zip(first := passes("resident"), passes("fused"), strict=True):
            assert (a - b).float().norm() <= 2e-2 * b.float().norm()
        assert [*gru._stays.values()] == tried
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            again = passes("resident")
    torch.cuda.synchronize()
    for _ in range(100):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert not gru_resident.timed_out(x.device)


def test_where_it_cannot_run_the_steps_are_launched() -> None:
    h = 130  # more than one program carries
    shapes = [(3 * h, 5)] * 2 + [(3 * h, h)] * 2 + [(3 * h,)] * 4
    weights = [torch.randn(shape) / h**0.5 for shape in shapes]
    x = torch.randn(3, 2, 5)
    assert torch.equal(gru_pair(x, weights, form="resident"), gru_pair(x, weights))


@pytest.mark.parametrize(
    "shared, registers, threads, programs",
    [(147456, 214, 128, 1), (40960, 64, 128, 5), (1024, 255, 256, 1), (0, 32, 1024, 2), (233472, 32, 32, 0)],
)  # fmt: skip
def test_programs_at_once(shared: int, registers: int, threads: int, programs: int) -> None:
    """Of a multiprocessor with 228 KiB: limited by shared memory, by registers, or by threads."""
    assert gru_resident.programs_at_once(shared, registers, threads, 228 * 1024) == programs
