"""The skeletons that estimators and public sets use, by name: what `prepare --skeleton NAME` knows.

A joint is written "name < parent", the root "name" alone, in the order of the estimator's output; left and
right are told by the names. The axes serve 3-D recordings, since flat ones are not turned. The centre is the
joint near the middle that is seen most often: of COCO's and MediaPipe's joints, none of which lies within the
trunk, a shoulder (a nose is lost from behind, hips below the edge of a picture).
"""

from __future__ import annotations

from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25, Skeleton


def _skeleton(center: str, axis_z: tuple[str, str], axis_x: tuple[str, str], joints: str) -> Skeleton:
    pairs = [joint.strip().partition(" < ") for joint in joints.split(",")]
    names = [name for name, _, _ in pairs]
    number = {name: place for place, name in enumerate(names)}
    return Skeleton(
        parents=tuple(number[parent or name] for name, _, parent in pairs),
        mirror=tuple(number[_other_side(name)] for name in names),
        center=number[center],
        axis_z=(number[axis_z[0]], number[axis_z[1]]),
        axis_x=(number[axis_x[0]], number[axis_x[1]]),
        joint_names=tuple(names),
    )


def _other_side(name: str) -> str:
    side, _, rest = name.partition(" ")
    return f"{ {'left': 'right', 'right': 'left'}[side] } {rest}" if side in ("left", "right") else name


_SHOULDERS = ("left shoulder", "right shoulder")
_LEGS = """left knee < left hip, right knee < right hip, left ankle < left knee, right ankle < right knee"""
_COCO_ARMS = """left elbow < left shoulder, right elbow < right shoulder,
    left wrist < left elbow, right wrist < right elbow"""
_OPENPOSE_TOP = """nose < neck, neck, right shoulder < neck, right elbow < right shoulder,
    right wrist < right elbow, left shoulder < neck, left elbow < left shoulder, left wrist < left elbow"""
_FACE = """left eye < nose, right eye < nose, left ear < left eye, right ear < right eye"""
_OPENPOSE_FACE = """right eye < nose, left eye < nose, right ear < right eye, left ear < left eye"""

SKELETONS: dict[str, Skeleton] = {
    "ntu25": NTU25,
    "coco17": _skeleton(
        "left shoulder", ("left hip", "left shoulder"), _SHOULDERS,
        f"""nose, {_FACE}, left shoulder < nose, right shoulder < nose, {_COCO_ARMS},
        left hip < left shoulder, right hip < right shoulder, {_LEGS}""",
    ),
    "openpose18": _skeleton(
        "neck", ("left hip", "left shoulder"), _SHOULDERS,
        f"""{_OPENPOSE_TOP}, right hip < neck, right knee < right hip, right ankle < right knee,
        left hip < neck, left knee < left hip, left ankle < left knee, {_OPENPOSE_FACE}""",
    ),
    "openpose25": _skeleton(
        "neck", ("hip", "neck"), _SHOULDERS,
        f"""{_OPENPOSE_TOP}, hip < neck, right hip < hip, right knee < right hip, right ankle < right knee,
        left hip < hip, left knee < left hip, left ankle < left knee, {_OPENPOSE_FACE},
        left big toe < left ankle, left small toe < left big toe, left heel < left ankle,
        right big toe < right ankle, right small toe < right big toe, right heel < right ankle""",
    ),
    "halpe26": _skeleton(
        "neck", ("hip", "neck"), _SHOULDERS,
        f"""nose < head, {_FACE}, left shoulder < neck, right shoulder < neck, {_COCO_ARMS},
        left hip < hip, right hip < hip, {_LEGS}, head < neck, neck < hip, hip,
        left big toe < left ankle, right big toe < right ankle, left small toe < left big toe,
        right small toe < right big toe, left heel < left ankle, right heel < right ankle""",
    ),
    "h36m17": _skeleton(
        "hip", ("hip", "thorax"), _SHOULDERS,
        """hip, right hip < hip, right knee < right hip, right ankle < right knee, left hip < hip,
        left knee < left hip, left ankle < left knee, spine < hip, thorax < spine, neck < thorax, head < neck,
        left shoulder < thorax, left elbow < left shoulder, left wrist < left elbow, right shoulder < thorax,
        right elbow < right shoulder, right wrist < right elbow""",
    ),
    "mediapipe33": _skeleton(
        "left shoulder", ("left hip", "left shoulder"), _SHOULDERS,
        f"""nose, left eye inner < nose, left eye < left eye inner, left eye outer < left eye,
        right eye inner < nose, right eye < right eye inner, right eye outer < right eye,
        left ear < left eye outer, right ear < right eye outer, left mouth < nose, right mouth < nose,
        left shoulder < nose, right shoulder < nose, {_COCO_ARMS}, left pinky < left wrist,
        right pinky < right wrist, left index < left wrist, right index < right wrist,
        left thumb < left wrist, right thumb < right wrist, left hip < left shoulder,
        right hip < right shoulder, {_LEGS}, left heel < left ankle, right heel < right ankle,
        left foot index < left heel, right foot index < right heel""",
    ),
    "hand21": _skeleton(
        "wrist", ("wrist", "middle mcp"), ("index mcp", "pinky mcp"),
        "wrist, thumb cmc < wrist, thumb mcp < thumb cmc, thumb ip < thumb mcp, thumb tip < thumb ip, "
        + ", ".join(
            f"{finger} mcp < wrist, {finger} pip < {finger} mcp, {finger} dip < {finger} pip, "
            f"{finger} tip < {finger} dip"
            for finger in ("index", "middle", "ring", "pinky")
        ),
    ),
}  # fmt: skip
"""COCO (PYSKL, MMPose, YOLO, ViTPose), OpenPose's COCO and BODY_25, Halpe (AlphaPose), Human3.6M (lifters),
MediaPipe Pose, and a hand (MediaPipe, OpenPose)."""


def skeleton_of(name: str) -> Skeleton:
    """The skeleton of this name; `InputError` lists them."""
    if name not in SKELETONS:
        raise InputError(f"no skeleton is called {name[:40]!r}; --skeleton takes {', '.join(SKELETONS)}")
    return SKELETONS[name]
