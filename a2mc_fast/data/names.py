"""What the name of a clip tells about its recording, in converted data sets that hold nothing else of it."""

from __future__ import annotations

from typing import NamedTuple

from a2mc_fast.data import ntu, pku


class Who(NamedTuple):
    """Numbers of a recording; -1 where unknown."""

    subject: int = -1
    camera: int = -1
    setup: int = -1


def who(name: str) -> Who:
    """Subject, camera and set-up in names such as S001C002P003R002A013 or A01N02-L_5, as far as given."""
    if ids := ntu.parse_name(name):
        return Who(ids.subject, ids.camera, ids.setup)
    if video := pku.parse_name(name.rpartition("_")[0], "pku2"):
        return Who(video.subject, video.camera)
    return Who()
