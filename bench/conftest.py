"""`pytest bench -s --record FILE.json` keeps what the benchmarks find; without it they only print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.records import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write what the benchmarks find to this JSON file")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Recorder:
    """Takes every record that a benchmark finds."""
    path = request.config.getoption("record")
    return Recorder(Path(path) if path else None)


@pytest.fixture
def one_core() -> Iterator[None]:
    """One thread for what torch computes on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
