"""2-D keypoints as joints in metres, so that all that follows is as for 3-D recordings.

Legend: T frames · M persons · V joints.
"""

from __future__ import annotations

import numpy as np

from a2mc_fast.data.rules import UnusableError

BODY = 1.7
"""Metres: what the diagonal of the box around the larger body becomes, in the median frame."""
LEAST = 0.3
"""The confidence below which a joint is missing, unless told otherwise."""


def as_joints(points: np.ndarray, confidence: np.ndarray | None = None, least: float = LEAST) -> np.ndarray:
    """Joints float32 [T, M, V, 3] metres of keypoints [T, M, V, 2] and their confidence [T, M, V].

    What is not a number or exactly (0, 0) was not detected either. `UnusableError` where no frame has a body.
    """
    points = np.array(points, np.float32)
    if not points.size:
        raise UnusableError("no frames")
    seen = points.any(-1) & ~np.isnan(points).any(-1)
    if confidence is not None:
        seen &= confidence >= least  # false for what is not a number
    points[~seen] = 0
    low, high = (np.where(seen[..., None], points, limit) for limit in (np.inf, -np.inf))
    extent = np.maximum(high.max(2) - low.min(2), 0)  # [T, M, 2]
    sizes = np.linalg.norm(extent, axis=-1).max(1)
    if not sizes.any():
        raise UnusableError("no body", f"no frame has two joints of confidence {least:g} or more")
    scale = np.float32(BODY / np.median(sizes[sizes > 0]))
    return np.pad(points * scale, ((0, 0), (0, 0), (0, 0), (0, 1)))
