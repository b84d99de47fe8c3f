"""What the trainer hands to torch.compile, compiled for real chips without one.

torch must believe in a GPU, and Triton must not be in interpreter mode, so the cases run in subprocesses of
`tests.offline_cases`. From an empty cache and on one core, views and losses take some 4 minutes together,
and each encoder 3 to 7. (2026-11-28)
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch.utils.cpp_extension import include_paths

from a2mc_fast.config import preset

ROOT = Path(__file__).parent.parent
TESTED = {"torch": "2.13", "triton": "3.9"}
"""Releases whose internals `tests/offline_gpu.py` and `tests/offline_gpu.cpp` are known to fit."""

CHECKS = ("arange_times_a_large_constant", "data_times_a_large_constant", "own_operations")
# of views and losses what takes seconds is compiled for both chips
VIEWS = ("view weak", "view strong attacked", "view whole attacked")
LOSSES = ("losses ntu60-xsub triton", "losses ntu60-xsub-b4 torch")
OTHER_VIEWS = ("view weak attacked", "view strong", "view whole")
ABLATIONS = (
    *(f"losses ntu60-xsub-{row} torch" for row in ("b1", "b2", "b3")),
    *(f"losses ntu60-xsub-{row} triton" for row in ("b1", "b2", "b3", "b4")),
)
# the bank of the paper, in four blocks
WHOLE_BANK = ("losses ntu60-xsub torch 16384",)
ENCODERS = ("encoder stgcn", "encoder dsta", "encoder scd")
REST = ("perturb", "watch")
FIRST = (*CHECKS, *VIEWS, *LOSSES, *REST)

Outcome = dict[str, Any]


def untested(**versions: str) -> str:
    """What to do about a release that the make-believe GPU has not met; "" if it has met all."""
    new = [f"{name} {v}" for name, v in versions.items() if not v.startswith(TESTED[name] + ".")]
    return bool(new) * (
        f"{' and '.join(new)} may have moved what tests/offline_gpu.py replaces: see in make_believe that "
        "each name is there and asked as before, and in _compile_to_module that kernels are still written as "
        "async_compile.triton(...); once `pytest tests/test_offline_gpu.py` and `pytest -m offline` pass "
        "with the release, enter it in TESTED"
    )


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Outcome]]:
    """outcomes(chip, case, ...): what came of each case, compiled in one process."""
    new = untested(torch=torch.__version__, triton=triton.__version__)
    if new:
        pytest.fail(new)
    folder = tmp_path_factory.mktemp("offline")
    library, libraries = folder / "offline_gpu.so", Path(torch.__file__).parent / "lib"
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", "-o", str(library)]
    includes = [f"-I{path}" for path in include_paths()]
    links = [f"-L{libraries}", "-lc10", "-ltorch_cpu"]
    _run([*compiler, *includes, str(ROOT / "tests" / "offline_gpu.cpp"), *links], os.environ)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "OFFLINE_GPU_LIBRARY": str(library),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }

    @functools.cache
    def compile_cases(chip: int, *cases: str) -> dict[str, Outcome]:
        module = [sys.executable, "-m", "tests.offline_cases", str(chip)]
        return json.loads(_run([*module, *cases], environment).splitlines()[-1])

    return compile_cases


def _run(command: list[str], environment: Any) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels(outcome: Outcome, backward: bool = False) -> list[str]:
    return [name for graph in outcome["graphs"] if graph["backward"] == backward for name in graph["kernels"]]


def calls(outcome: Outcome) -> list[str]:
    return [name for graph in outcome["graphs"] for name in graph["calls"]]


def check(outcome: Outcome, backward: bool) -> None:
    """Compiled, with kernels in each direction, and no constant in them that an index could not hold."""
    assert not outcome["error"], outcome["error"]
    assert kernels(outcome)
    assert bool(kernels(outcome, backward=True)) == backward
    assert not [n for graph in outcome["graphs"] for n in graph["large"]]


@pytest.mark.offline
def test_what_a_chip_refuses_is_refused(outcomes: Callable[..., dict[str, Outcome]]) -> None:
    found = outcomes(90, *FIRST)
    error = found["arange_times_a_large_constant"]["error"]
    assert "Scalar 3528531795 is out of range for type int32" in error
    data = found["data_times_a_large_constant"]
    assert not data["error"] and data["graphs"][0]["large"] == ["3528531795"]


@pytest.mark.offline
def test_operations_of_our_own_stay_what_they_are(outcomes: Callable[..., dict[str, Outcome]]) -> None:
    outcome = outcomes(90, *FIRST)["own_operations"]
    assert not outcome["error"], outcome["error"]
    assert calls(outcome) == ["offline.doubled", "offline.double_"]
    assert len(kernels(outcome)) == 2


@pytest.mark.offline
@pytest.mark.parametrize("case", [*VIEWS, *LOSSES, *REST])
def test_views_and_losses(outcomes: Callable[..., dict[str, Outcome]], case: str) -> None:
    outcome = outcomes(90, *FIRST)[case]
    check(outcome, backward=case in LOSSES)
    assert ("a2mc.philox" in calls(outcome)) == ("strong" in case)
    assert ("a2mc.mixing_contrast" in calls(outcome)) == ("triton" in case)


@pytest.mark.offline
@pytest.mark.parametrize("case", [*OTHER_VIEWS, *ABLATIONS, *WHOLE_BANK])
def test_other_views_and_losses(outcomes: Callable[..., dict[str, Outcome]], case: str) -> None:
    check(outcomes(90, *OTHER_VIEWS, *ABLATIONS, *WHOLE_BANK)[case], backward=case.startswith("losses"))


@pytest.mark.offline
@pytest.mark.parametrize("case", [*VIEWS, *LOSSES])
def test_views_and_losses_for_the_older_chip(outcomes: Callable[..., dict[str, Outcome]], case: str) -> None:
    check(outcomes(80, *VIEWS, *LOSSES)[case], backward=case in LOSSES)


@pytest.mark.offline
@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_in_bf16(outcomes: Callable[..., dict[str, Outcome]], case: str) -> None:
    outcome = outcomes(90, case)[case]
    check(outcome, backward=True)
    directions = [graph["backward"] for graph in outcome["graphs"]]
    # forward: basic views, whole views, keys, attack, its perturbation, whole views for the other queries,
    # queries, loss, faults, spread
    assert directions.count(False) == 10
    # backward: attack, loss, queries
    assert directions.count(True) == 3
    # those of the encoder
    assert sum(graph["low"] for graph in outcome["graphs"]) == 5


def test_the_other_ablations_have_the_losses_of_these() -> None:
    for row, same in (("-a1", "-b1"), ("-a2", ""), ("-a3", "")):
        assert preset(f"ntu60-xsub{row}").loss == preset(f"ntu60-xsub{same}").loss


def test_a_release_that_was_not_tried_is_named_with_what_to_do() -> None:
    assert untested(torch="2.13.1+cpu", triton="3.9.0") == ""
    sentence = untested(torch="2.14.0", triton="3.9.0")
    assert sentence.startswith("torch 2.14.0 may have moved what tests/offline_gpu.py replaces")
    assert "TESTED" in sentence and "triton 3" not in sentence
