"""What the name of a clip tells about its recording, in converted data sets that hold nothing else of it."""

from __future__ import annotations

from typing import Any

from a2mc_fast.data import ntu, pku
from a2mc_fast.data.source import Recording


def named(name: str, **about: Any) -> Recording:
    """A recording with subject, camera and set-up as far as names such as S001C002P003R002A013 or A01N02-L_5
    tell them."""
    if ids := ntu.parse_name(name):
        about |= {"subject": ids.subject, "camera": ids.camera, "setup": ids.setup}
    elif video := pku.parse_name(name.rpartition("_")[0], "pku2"):
        about |= {"subject": video.subject, "camera": video.camera}
    return Recording(name=name, **about)
