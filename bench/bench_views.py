"""Views: compiled against launched one by one, and against a numpy feeder that makes them clip by clip.

`pytest bench/bench_views.py -s` makes the four views of a step on the machine's GPU, or on one core, with the
distance from the memory's limit; and on one core in any case, in one run with the feeder, two basic views of
each of 64 clips.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import default_collate

from a2mc_fast.augment import Views
from a2mc_fast.config import ViewConfig
from a2mc_fast.data import Clips
from a2mc_fast.skeleton import NTU25
from bench.baselines import feeder_pair
from bench.harness import DEVICE, TOY, compare, compiled, compiled_all, seconds, sized
from bench.records import Record, Recorder

CLIPS, FRAMES, BATCH = sized((512, 64, 64), (512, 64, 64), (16, 16, 4))


def clips(device: str = "cpu") -> Clips:
    """Random clips of 60 to 140 frames."""
    random = np.random.default_rng(0)
    lengths = random.integers(60, 141, CLIPS)
    joints = random.standard_normal((lengths.sum(), 2, NTU25.num_joints, 3), np.float32)
    return Clips.pack(joints, lengths, np.zeros(CLIPS, np.int64), NTU25, device=device)


def least_seconds(function: Callable[[int], object], rounds: int) -> float:
    """The least disturbed of some rounds; the round's number is the argument, so that each draws anew."""
    function(-1)
    return min(seconds(function, number) for number in range(rounds))


def test_basic_views(record: Recorder, one_core: None) -> None:
    data = clips()
    views = Views(data, ViewConfig(frames=FRAMES), 0)
    padded = np.zeros((CLIPS, 3, 300, NTU25.num_joints, 2), np.float32)
    for item, start, length in zip(padded, data.offsets.tolist(), data.lengths.tolist(), strict=True):
        item[:, :length] = data.frames[start : start + length].permute(1, 0, 2, 3).numpy()
    random = np.random.default_rng(0)

    def ours(step: int) -> torch.Tensor:
        index = torch.arange(BATCH) * 7 % CLIPS
        first, second = views.draw(step, BATCH, views=2)
        pair = views.make(index.repeat(2), "weak", first + second, step)
        return pair.flatten(2)  # [2 BATCH, T, C*V*M], the recurrent encoder's input

    def feeder(step: int) -> list[torch.Tensor]:
        picked = random.integers(0, CLIPS, BATCH)
        return default_collate([feeder_pair(padded[i], int(data.lengths[i]), FRAMES, random) for i in picked])

    rates = {"ours": 2 * BATCH / least_seconds(ours, 30), "public": 2 * BATCH / least_seconds(feeder, 10)}
    for form, rate in rates.items():
        record(Record(what="basic views", form=form, sizes={"N": BATCH, "T": FRAMES}, per_second=rate))
    fast, slow = rates.values()
    print(
        f"\nbatch {BATCH}: {fast:,.0f} views/s, numpy feeder {slow:,.0f}/s, {fast / slow:.1f} times as many"
    )
    assert TOY or fast > 6 * slow  # eight to ten times as many on a quiet machine


def test_views_of_a_step(record: Recorder, one_core: None) -> None:
    """Two basic views, a weak and a strong view of 64 attacked clips."""
    views = Views(clips(DEVICE), ViewConfig(frames=FRAMES), 0)
    index = torch.arange(BATCH, device=DEVICE) * 7 % CLIPS
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    rho = 0.01 * torch.randn_like(views.whole(index))

    def make() -> list[torch.Tensor]:
        draw0, draw3, draw1, draw2 = views.draw(step, BATCH)
        return [
            views.make(index.repeat(2), "weak", draw0 + draw3, step),
            views.make(index, "weak", draw1, step, rho),
            views.make(index, "strong", draw2, step, rho),
        ]

    fused = compiled(make)
    for got, expected in zip(fused(), make(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    compiled_all()
    # two frames are read for each that is written, and two of the perturbation for the attacked views
    traffic = (4 * 3 + 2 * 2) * 4 * rho.numel()
    forms = {"ours": fused, "eager": make}
    record(*compare("four views of a step", {"N": BATCH, "T": FRAMES}, forms, traffic))
