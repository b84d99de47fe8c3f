"""Linear evaluation with features encoded once, against encoding the same centre crops again in every epoch.

`pytest bench/bench_protocols.py -s` runs the protocol of the paper (80 epochs) both ways on one core; the
classifier and its scores are the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from a2mc_fast.augment import Views
from a2mc_fast.config import demo
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.evaluation.protocols import linear_evaluation
from a2mc_fast.evaluation.settings import LinearConfig

CLIPS = 600


@pytest.fixture
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_linear_evaluation(benchmark: BenchmarkFixture, one_core: None) -> None:
    config, clips = demo(), synthetic_clips(clips=CLIPS)
    torch.manual_seed(0)
    branch = Branch(config, clips.skeleton, clips.num_persons)
    views, linear = Views(clips, config.views, 0), LinearConfig(crop="center")

    start = time.perf_counter()
    again = linear_evaluation(branch, views, "xsub", replace(linear, cache=False))
    encoding = time.perf_counter() - start
    once = benchmark.pedantic(linear_evaluation, (branch, views, "xsub", linear), rounds=3)
    assert torch.equal(once.scores, again.scores) and once.best == again.best

    assert benchmark.stats is not None
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["encoded every epoch, seconds"] = encoding
    print(f"\nencoded once {seconds:.2f} s, every epoch {encoding:.2f} s ({encoding / seconds:.1f}x)")
    assert encoding >= 10 * seconds
