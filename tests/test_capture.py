"""Compiled parts and the captured step: what a compiler refuses, whenever it does, runs as it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from a2mc_fast.data import Clips
from a2mc_fast.errors import InputError
from a2mc_fast.run import parts
from a2mc_fast.run.capture import Captured, Part
from a2mc_fast.train import main
from tests.conftest import SMALL


class Refusal(torch.autograd.Function):
    """A backward pass that its compiler refuses, as the first time it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("PassManager::run failed\nbackward")


def refusing(name: str, backward: bool) -> Callable[..., Any]:
    """torch.compile of a machine whose compiler refuses the functions of that name."""

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        if function.__qualname__ != name:
            return function

        def call(*args: Any) -> Any:
            if not backward:
                raise RuntimeError("Scalar 3528531795 is out of range for type int32")
            return tree_map_only(
                Tensor, lambda x: Refusal.apply(x) if x.requires_grad else x, function(*args)
            )

        return call

    return compiled


FLAGS = """--encoder.name stgcn --encoder.channels 16 --encoder.projection 16 --bank.size 16
--bank.warmup-steps 1 --optim.batch-size 8 --optim.epochs 1 --views.frames 8
--run.log-every 1 --run.threads 1 --run.device cpu --attack.classes 2 --data"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of four steps on clips of five joints; the folder comes last."""
    file, count = tmp_path_factory.mktemp("clips") / "clips.safetensors", 32
    joints = np.random.default_rng(0).standard_normal((count * 9, 1, 5, 3), dtype=np.float32)
    split = np.arange(count) < 24
    Clips.pack(joints, [9] * count, np.arange(count) % 2, SMALL, splits={"xsub": split}).save(file)
    return ["demo", *FLAGS.split(), str(file), "--run.out"]


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def plain(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that compiles nothing."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    main([*command, str(folder)])
    assert json.loads((folder / "result.json").read_text())["ran"] == {
        "views": "as written",
        "losses": "as written",
        "perturbation": "as written",
        "spread of features": "as written",
        "search for faults": "as written",
        "query encoder": "as written",
        "key encoder": "as written",
        "step": "launched",
        "loss and bank": "plain torch",
        "random numbers": "plain torch",
    }
    return losses_of(folder)


@pytest.mark.parametrize(
    ("part", "function", "backward"),
    [
        ("views", "Views.make", False),
        ("losses", "A2MC.losses", False),
        ("losses", "A2MC.losses", True),
        ("perturbation", "perturbation", False),
        ("spread of features", "spread", False),
        ("search for faults", "first_fault", False),
        ("query encoder", "STGCN.encode", False),
        ("query encoder", "STGCN.encode", True),
    ],
    ids=["views", "losses", "losses-backward", "attack", "spread", "faults", "encoder", "encoder-backward"],
)
def test_a_run_goes_on_without_what_the_compiler_refuses(
    part: str,
    function: str,
    backward: bool,
    command: list[str],
    plain: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "compile", refusing(function, backward))
    # as on a GPU, where parts are compiled unless told otherwise
    monkeypatch.setattr(parts, "Part", lambda name, f, _, *rest: Part(name, f, True, *rest))
    main([*command, str(tmp_path / "run")])
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if "runs uncompiled" in line]
    words = "PassManager::run failed" if backward else "Scalar 3528531795 is out of range for type int32"
    assert f"{part} runs uncompiled, because the compiler refused: RuntimeError: {words}" in told
    ran = json.loads((tmp_path / "run" / "result.json").read_text())["ran"]
    assert ran[part] == f"as written: RuntimeError: {words}"
    assert ran["losses" if part == "views" else "views"] == "compiled"
    # to the bit: the step in which it was refused is done whole, once
    assert losses_of(tmp_path / "run") == plain


def test_a_refusal_ends_a_strict_run_with_a_sentence(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", refusing("A2MC.losses", True))
    with pytest.raises(SystemExit) as ended:
        main([*command, str(tmp_path / "run"), "--run.compile", "on"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(
        "error: --run.compile on: losses cannot be compiled here (RuntimeError: PassManager"
    )
    assert "\n" not in said and "--run.compile auto" in said


NO_COMPILER = """
import torch, torch._inductor.config as inductor
from torch import nn
from a2mc_fast.run.capture import Part

inductor.cpp.cxx = ("no-such-compiler",)
inductor.force_disable_caches = True
layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
part = Part("layers", layers, True, False, print)
x = torch.randn(7, 3)
torch.testing.assert_close(part(x), nn.Sequential(layers[0], nn.BatchNorm1d(5), nn.Tanh())(x))
# its statistics have seen the batch once
torch.testing.assert_close(layers[1].running_mean, 0.1 * layers[0](x).mean(0))
print(part.ran)
"""


def test_inductor_without_a_compiler_is_a_refusal() -> None:
    """A real one: the C++ compiler that Inductor needs on a CPU is not there. torch remembers what it looked
    for, hence a process of its own."""
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, ran = done.stdout.splitlines()
    assert said.startswith("layers runs uncompiled, because the compiler refused: ")
    assert "compiler" in ran and said.endswith(ran.removeprefix("as written: "))


def test_a_trial_leaves_no_trace() -> None:
    """Compiled and tried, a module draws the same dropout, keeps its statistics and gets its gradient."""

    def run(compile: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        part = Part("module", module.forward, compile, False, pytest.fail, module)
        for rows in (8, 8, 5):
            part(torch.randn(rows, 4)).square().sum().backward()
        return [
            *module.buffers(),
            *(p.grad for p in module.parameters() if p.grad is not None),
            torch.rand(3),
        ]

    with torch._inductor.config.patch(fallback_random=True):
        for got, expected in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(got, expected)


def test_what_the_user_got_wrong_is_no_refusal() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise InputError("the clips are wrong")

    part = Part("wrong", wrong, True, False, pytest.fail)
    part._compiled = wrong
    with pytest.raises(InputError, match="the clips are wrong"):
        part(torch.zeros(1))
    assert part.ran == "compiled"


def test_gradients_of_parts_go_where_they_should() -> None:
    weight = torch.randn(3, requires_grad=True)
    part = Part("product", lambda x: (x * 2, {"sum": (x * 3).sum()}), True, False, pytest.fail)
    first, second = part(weight * 5)
    (first.sum() + second["sum"]).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((3,), 25.0))


class _Stream:
    device = torch.device("cuda", 0)

    def wait_stream(self, other: _Stream) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA streams and graphs without CUDA; `events` tells what was asked of them."""
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    class Generator:
        def get_state(self) -> str:
            return "before"

        def set_state(self, state: str) -> None:
            events.append(f"random state {state}")

        def graphsafe_get_state(self) -> str:
            return "fresh"

        def graphsafe_set_state(self, state: str) -> None:
            events.append(f"random state {state}")

    @contextmanager
    def recording(graph: Graph, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        events.append("capture")
        yield
        events.append("captured")

    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    monkeypatch.setattr(torch, "Generator", lambda device: Generator())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return events


def test_the_fourth_call_is_captured_and_later_ones_replay(stand_in: list[str]) -> None:
    def function() -> dict[str, Tensor]:
        stand_in.append("run")
        return {"loss": torch.zeros(())}

    step = Captured(function, _Stream())  # type: ignore[arg-type]
    results = [step() for _ in range(6)]
    assert stand_in == ["run"] * 3 + ["capture", "run", "captured"] + ["replay"] * 3
    assert results[3] is results[4] is results[5] and results[2] is not results[3]
    assert step.ran == "captured"


@pytest.mark.parametrize("strict", [False, True])
def test_a_refused_capture_is_launched_instead(stand_in: list[str], strict: bool) -> None:
    """Once refused it is not asked for again; the generator forgets the graph that it waited for."""
    said: list[str] = []

    def function() -> dict[str, Tensor]:
        if stand_in and stand_in[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        stand_in.append("run")
        return {"loss": torch.ones(())}

    step = Captured(function, _Stream(), strict, said.append)  # type: ignore[arg-type]
    for _ in range(3):
        step()
    if strict:
        with pytest.raises(InputError, match=r"--run.graph on: the step cannot be captured here"):
            step()
        return
    for _ in range(2):
        assert step()["loss"] == 1
    states = ["random state fresh", "random state before"]
    assert stand_in == ["run"] * 3 + ["capture", *states] + ["run"] * 2
    assert said == [
        "steps are launched, because their capture was refused: RuntimeError: operation not permitted when "
        "stream is capturing"
    ]
    assert step.ran.startswith("launched: RuntimeError")
