"""What the name of a clip tells about its recording, in converted data sets that hold nothing else of it."""

from __future__ import annotations

import numpy as np

from a2mc_fast.data import ntu, pku
from a2mc_fast.data.source import Recording


def named(
    name: str, label: int, joints: np.ndarray, train_in: tuple[str, ...], confidence: np.ndarray | None = None
) -> Recording:
    """A recording with what its name tells."""
    subject, camera, setup = _who(name)
    return Recording(
        name=name,
        label=label,
        joints=joints,
        confidence=confidence,
        subject=subject,
        camera=camera,
        setup=setup,
        train_in=train_in,
    )


def _who(name: str) -> tuple[int, int, int]:
    """Subject, camera and set-up in names such as S001C002P003R002A013 or A01N02-L_5, as far as given."""
    if ids := ntu.parse_name(name):
        return ids.subject, ids.camera, ids.setup
    if video := pku.parse_name(name.rpartition("_")[0], "pku2"):
        return video.subject, video.camera, -1
    return -1, -1, -1
