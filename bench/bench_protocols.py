"""Linear evaluation on centre crops, encoded once, against random crops, encoded anew in every epoch.

`pytest bench/bench_protocols.py -s` runs the protocol of the paper (80 epochs) both ways on one core.
"""

from __future__ import annotations

import statistics

import torch

from a2mc_fast.augment import Views
from a2mc_fast.config import demo
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.evaluation.protocols import linear_evaluation
from a2mc_fast.evaluation.settings import LinearConfig
from bench.harness import seconds
from bench.records import Record, Recorder

CLIPS = 600


def test_linear_evaluation(record: Recorder, one_core: None) -> None:
    config, clips = demo(), synthetic_clips(clips=CLIPS)
    torch.manual_seed(0)
    branch = build_branch(config, clips.skeleton, clips.num_persons)
    views = Views(clips, config.views, 0)

    def run(options: LinearConfig) -> float:
        return seconds(linear_evaluation, branch, views, "xsub", options)

    kept = statistics.median(run(LinearConfig(crop="center")) for _ in range(3))
    encoding = run(LinearConfig(crop="random"))
    for form, time in (("ours", kept), ("encoded in every epoch", encoding)):
        record(Record(what="linear evaluation", form=form, ms=1e3 * time))
    print(f"\nencoded once {kept:.2f} s, every epoch {encoding:.2f} s ({encoding / kept:.1f}x)")
    assert encoding >= 10 * kept
