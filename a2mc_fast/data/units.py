"""How large the bodies of a set are, and which unit its coordinates may be in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from a2mc_fast.data.clips import Clips

_SAMPLE = 2000  # frames measured
_PLAUSIBLE = (0.1, 4.0)  # metres: a hand to an outstretched body
_UNITS = {"millimetres": 0.001, "centimetres": 0.01, "inches": 0.0254}
_UPRIGHT = 1.7  # metres
_PERSON = (0.8, 2.6)  # metres
_THIN = 0.01  # of a body: confidences beside pixels, not depths


class Sizes(NamedTuple):
    """Medians over frames, in the set's unit; 0 where there is nothing to measure."""

    bone: float
    body: float  # diagonal of the box around a body
    thickness: float  # the box's shortest side


def measure(clips: Clips) -> Sizes:
    """The sizes of person 0 in evenly chosen frames."""
    step = max(1, len(clips.frames) // _SAMPLE)
    poses = clips.frames[::step, :, :, 0].permute(0, 2, 1).cpu().numpy()  # [F, V, C]
    poses = poses[poses.any((1, 2))]
    child, parent = np.array(clips.skeleton.bones).reshape(-1, 2).T
    bones = np.linalg.norm(poses[:, child] - poses[:, parent], axis=2)
    boxes = poses.max(1) - poses.min(1)
    sizes = (bones, np.linalg.norm(boxes, axis=1), boxes.min(1))
    return Sizes(*(float(np.median(v[v > 0])) if (v > 0).any() else 0.0 for v in sizes))


def doubt(sizes: Sizes, times: str = "--scale") -> str:
    """One sentence for bodies of a size that metres do not give; empty for all others. `times` is how a
    factor is applied there."""
    lowest, highest = _PLAUSIBLE
    if sizes.body == 0 or lowest <= sizes.body <= highest:
        return ""
    fitting = [u for u, scale in _UNITS.items() if _PERSON[0] <= sizes.body * scale <= _PERSON[1]]
    scale = _UNITS[fitting[0]] if fitting else float(f"{_UPRIGHT / sizes.body:.2g}")
    guess = f"{fitting[0]} would fit" if fitting else "no unit fits (pixels?)"
    advice = f"{guess}, {times} {scale:g} makes it {sizes.body * scale:.2g} m"
    if sizes.thickness < _THIN * sizes.body:
        advice = "they are flat: 2-D keypoints are joints [F, M, V, 2], or have axes x, y, confidence"
    return (
        f"the median body measures {sizes.body:.3g}, but coordinates are taken for metres, of which a body "
        f"has {lowest:g} to {highest:g}; {advice}"
    )
