"""What the name of a clip tells about its recording, in converted data sets that hold nothing else of it."""

from __future__ import annotations

from a2mc_fast.data import ntu, pku


def who(name: str) -> dict[str, int]:
    """Subject, camera and set-up in names such as S001C002P003R002A013 or A01N02-L_5, as far as given."""
    if ids := ntu.parse_name(name):
        return {"subject": ids.subject, "camera": ids.camera, "setup": ids.setup}
    if video := pku.parse_name(name.rpartition("_")[0], "pku2"):
        return {"subject": video.subject, "camera": video.camera}
    return {}
